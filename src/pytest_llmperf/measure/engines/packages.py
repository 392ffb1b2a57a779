"""uv and pip: what they would install for requirements, how large that is, and installing just that.

Both with the settings that they have on this machine. Nothing is imported of either: they are commands.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pytest_llmperf.measure.engines.remains import folder_prefix

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PIP = "pip>=25"
"""Older ones download what they resolve, even with `--dry-run`."""
_HEAD_TIMEOUT_S = 10.0
_TAIL = 15


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
    direct: bool = False
    """It is asked for by its address, and may be in no index that the tool is told of."""

    @property
    def pin(self) -> str:
        """Return the requirement that only this release meets."""
        return f"{self.name} @ {self.url}" if self.direct else f"{self.name}=={self.version}"


class Installer(Protocol):
    """What resolves and installs packages."""

    @property
    def name(self) -> str:
        """Return its name in messages."""

    def uv(self) -> Uv | None:
        """Return a uv, which can ask PyTorch's index of CPU builds; None where there is none."""

    def create(self, folder: Path) -> None:
        """Make a virtual environment."""

    def resolve(self, python: Path, requirements: Sequence[str], *, alone: bool = False) -> list[Wheel]:
        """Return what would be installed for these requirements, `alone` without their dependencies.

        Raises InstallError where they cannot be met.
        """

    def install(self, python: Path, wheels: Sequence[Wheel]) -> None:
        """Install just these; raises InstallError."""


def find_installers(tools: Path) -> list[Installer]:
    """Return uv where it is installed, then pip; `tools` is a folder for a pip of its own, made when it is needed."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    return [*([Uv(uv)] if uv else []), Pip(tools)]


class Uv:
    """uv: resolves and installs in seconds, and knows the address of PyTorch's index."""

    def __init__(self, command: str) -> None:
        """Note which uv."""
        self._command = command
        links = [] if "UV_FIND_LINKS" in os.environ else os.environ.get("PIP_FIND_LINKS", "").split()
        self._links = [word for link in links for word in ("--find-links", link)]

    @property
    def name(self) -> str:
        """Return its name in messages."""
        return "uv"

    def uv(self) -> Uv:
        """Return itself."""
        return self

    def create(self, folder: Path) -> None:
        """Make a virtual environment."""
        run([self._command, "venv", "--quiet", "--python", sys.executable, str(folder)])

    def pytorch_wheel(self, python: Path, requirement: str) -> str | None:
        """Return the address of a CPU build in PyTorch's index, None where that cannot be reached or has none."""
        # Alone: with this option uv looks for other packages too (triton) in that index only.
        try:
            # A closed network answers at once or never.
            [wheel] = self._compile(
                python, [requirement], "--no-deps", "--torch-backend=cpu", UV_HTTP_TIMEOUT="20", UV_HTTP_RETRIES="1"
            )
        except InstallError:
            return None
        return wheel.url

    def resolve(self, python: Path, requirements: Sequence[str], *, alone: bool = False) -> list[Wheel]:
        """Return what would be installed."""
        return self._compile(python, requirements, *(["--no-deps"] if alone else []))

    def _compile(self, python: Path, requirements: Sequence[str], *options: str, **env: str) -> list[Wheel]:
        with tempfile.TemporaryDirectory(prefix=folder_prefix("lock")) as folder:
            lock = Path(folder) / "pylock.toml"
            command = [self._command, "pip", "compile", "--quiet", "--format", "pylock.toml", "--python", str(python)]
            run([*command, "-o", str(lock), *self._links, *options, "-"], text="\n".join(requirements), env=env)
            return [locked_wheel(package, lock.parent) for package in tomllib.loads(lock.read_text())["packages"]]

    def install(self, python: Path, wheels: Sequence[Wheel]) -> None:
        """Install just these."""
        quiet = [] if sys.stderr.isatty() else ["--quiet"]
        command = [self._command, "pip", "install", "--python", str(python), "--no-deps", *self._links, *quiet]
        run([*command, *(wheel.pin for wheel in wheels)], shown=True)


def locked_wheel(package: dict[str, object], folder: Path) -> Wheel:
    """Return what a package of uv's lock file would load; paths in it are relative to `folder`."""
    archive = package.get("archive")
    files = [archive] if archive else package.get("wheels") or [package.get("sdist") or {}]
    assert isinstance(files, list)
    file = files[0]
    url = str(file.get("url") or file.get("path", ""))
    size = file.get("size") or _file_size((folder / url).resolve().as_uri() if url and "://" not in url else url)
    return Wheel(str(package["name"]), str(package["version"]), url, size, direct=bool(archive))


class Pip:
    """pip, in a new enough release of its own, and the standard library's virtual environments."""

    def __init__(self, tools: Path) -> None:
        """Note the folder for its own environment, which is made when it is needed."""
        self._tools = tools

    @property
    def name(self) -> str:
        """Return its name in messages."""
        return "pip"

    def uv(self) -> Uv | None:
        """Return a uv that is loaded for this installation."""
        try:
            run([*self._command, "install", "--quiet", "uv"])
        except InstallError:
            return None
        return Uv(str(self._tools / "bin" / "uv"))

    @cached_property
    def _command(self) -> list[str]:
        self.create(self._tools)
        command = [str(self._tools / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        with contextlib.suppress(InstallError):  # without an index the one that Python brings has to do
            run([*command, "install", "--quiet", _PIP])
        return command

    def create(self, folder: Path) -> None:
        """Make a virtual environment."""
        run([sys.executable, "-m", "venv", str(folder)])

    def resolve(self, python: Path, requirements: Sequence[str], *, alone: bool = False) -> list[Wheel]:
        """Return what would be installed."""
        with tempfile.TemporaryDirectory(prefix=folder_prefix("report")) as folder:
            report, asked = Path(folder) / "report.json", Path(folder) / "asked.txt"
            asked.write_text("\n".join(requirements))
            options = ["--quiet", "--dry-run", "--ignore-installed", "--report", str(report), *(["--no-deps"] if alone else [])]
            run([*self._command, "--python", str(python), "install", *options, "-r", str(asked)])
            planned = json.loads(report.read_text())["install"]
        urls = [package["download_info"]["url"] for package in planned]
        with ThreadPoolExecutor(8, "llmperf-sizes") as pool:
            sizes = list(pool.map(_file_size, urls))
        return [
            Wheel(package["metadata"]["name"], package["metadata"]["version"], url, size, direct=package["is_direct"])
            for package, url, size in zip(planned, urls, sizes, strict=True)
        ]

    def install(self, python: Path, wheels: Sequence[Wheel]) -> None:
        """Install just these."""
        quiet = [] if sys.stderr.isatty() else ["--quiet"]
        command = [*self._command, "--python", str(python), "install", "--no-deps", *quiet]
        run([*command, *(wheel.pin for wheel in wheels)], shown=True)


def _file_size(url: str) -> int | None:
    """Return the bytes of a file, None where its server does not tell."""
    if url.startswith("file:"):
        with contextlib.suppress(OSError):
            return Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path)).stat().st_size
        return None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_HEAD_TIMEOUT_S) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, http.client.HTTPException, ValueError, TypeError):
        return None


def run(
    command: Sequence[str],
    *,
    text: str | None = None,
    env: Mapping[str, str] | None = None,
    shown: bool = False,
    timeout_s: float | None = None,
) -> str:
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
            env={"PYTHONSAFEPATH": "1", **os.environ, **(env or {})},  # modules of the current folder are nobody's business
            check=False,
            timeout=timeout_s,
        )
    except OSError as error:
        raise InstallError(f"{command[0]} cannot be run ({error})") from error
    except subprocess.TimeoutExpired:
        raise InstallError(f"{command[0]} has not ended within {timeout_s:g} s") from None
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout or "").strip().splitlines()[-_TAIL:])
        raise InstallError(f"{' '.join(command[:6])} ... ended with exit code {done.returncode}:\n{tail}")
    return done.stdout or ""
