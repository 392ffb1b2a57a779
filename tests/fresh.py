"""The README's first command as a newcomer runs it: a fresh copy, an empty HOME, the package index alone, no caches.

    python tests/fresh.py                  # all of it
    python tests/fresh.py --install-only   # without the demo: does the engine install, and does it import?
    python tests/fresh.py --keep FOLDER    # leave the copy there

What tells pip and uv of other places (settings, link folders, other indexes) is taken away; certificates and proxies, without
which some machines reach nothing at all, stay.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAYS = ("LANG", "LC_ALL", "PATH", "TERM", "TMPDIR", "PIP_CERT", "SSL_CERT_DIR", "SSL_CERT_FILE",
         "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")  # fmt: skip
DEMO = "examples/quickstart/demo.py"


def command(readme: str) -> str:
    """Return the command under `## Try it`."""
    section = readme.partition("\n## Try it\n")[2].partition("\n## ")[0]
    found = re.search(r"^```\w*\n(.+?)^```", section, re.M | re.S)
    if not found:
        raise SystemExit("README.md has no command under '## Try it'")
    return found[1].strip()


def without_demo(whole: str) -> str:
    """Return the command up to where the demo begins, failing where that fails."""
    before, demo, _ = whole.partition(DEMO)
    install = before.rpartition(";")[0].strip()
    if not demo or "engine install" not in install:
        raise SystemExit(f"the command of '## Try it' does not run the demo behind `engine install ...;`: {whole}")
    return f"{install}; }}" if "{" in install else install


def environment(home: Path) -> dict[str, str]:
    """Return the variables of a machine that has nothing set up."""
    stays = {name: os.environ[name] for name in STAYS if name in os.environ}
    # The interpreter of tox's environment must not stand in for the machine's own.
    venv = os.environ.get("VIRTUAL_ENV")
    paths = [path for path in stays.get("PATH", os.defpath).split(os.pathsep) if not venv or not path.startswith(venv)]
    base = str(Path(sys.base_prefix) / "bin")
    return {
        **stays,
        "PATH": os.pathsep.join([base, *paths]),
        "HOME": str(home),
        "PIP_CONFIG_FILE": os.devnull,
        "UV_NO_CONFIG": "1",
    }


def copy(folder: Path) -> None:
    """Copy what git knows of the working tree, without a cache or an environment."""
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
                           capture_output=True, text=True).stdout  # fmt: skip
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def main() -> int:
    """Run it; return the exit code of the command, or 1 where it did not do what it is for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install-only", action="store_true", help="leave the demo out")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="copy into this new folder, and leave it there")
    args = parser.parse_args()
    line = command((ROOT / "README.md").read_text())
    line = without_demo(line) if args.install_only else line
    with contextlib.ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmperf-fresh-")))
        project, home = folder / "project", folder / "home"
        project.mkdir(parents=True)
        home.mkdir()
        copy(project)
        print(f"+ {line}", flush=True)
        began_s = time.monotonic()
        process = subprocess.Popen(["bash", "-c", line], cwd=project, env=environment(home), stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True)  # fmt: skip
        assert process.stdout is not None
        output = []
        for text in process.stdout:
            output.append(text)
            print(text, end="", flush=True)
        code = process.wait()
        print(f"fresh: exit code {code} after {time.monotonic() - began_s:.0f} s", flush=True)
    told = "".join(output)
    # The demo falls back to the simulated engine, which is right for a newcomer and not what is tested here.
    missing = [words for words in (" imports;", "" if args.install_only else "Done in") if words not in told]
    if missing or "simulated engine" in told:
        print("fresh: no real engine was installed and used", flush=True)
        return code or 1
    return code


if __name__ == "__main__":
    sys.exit(main())
