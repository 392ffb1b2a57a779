"""What `tox -e fresh` runs: the README's first command, with nothing set up."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests import fresh

if TYPE_CHECKING:
    from pathlib import Path


def test_the_command_is_the_readmes_and_can_leave_the_demo_out() -> None:
    whole = fresh.command((fresh.ROOT / "README.md").read_text())
    assert "\n" not in whole
    assert whole.startswith("python3 -m venv .venv && ")
    install = fresh.without_demo(whole)
    assert "engine install" in install
    assert "demo.py" not in install
    assert install.count("{") == install.count("}")


@pytest.mark.parametrize("readme", ["# a\n## Try it\nno command\n## Test it\n```\ntox\n```\n", "# a\n"])
def test_a_readme_without_a_command_is_an_error(readme: str) -> None:
    with pytest.raises(SystemExit, match="no command under '## Try it'"):
        fresh.command(readme)


def test_no_setting_of_this_machine_gets_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "PIP_FIND_LINKS",
        "PIP_INDEX_URL",
        "PIP_EXTRA_INDEX_URL",
        "UV_INDEX",
        "UV_FIND_LINKS",
        "PYTHONPATH",
        "XDG_CONFIG_HOME",
    ):
        monkeypatch.setenv(name, "somewhere")
    monkeypatch.setenv("VIRTUAL_ENV", "/tox/fresh")
    monkeypatch.setenv("PATH", os.pathsep.join(["/tox/fresh/bin", "/usr/bin"]))
    found = fresh.environment(tmp_path)
    assert "somewhere" not in found.values()
    assert found["HOME"] == str(tmp_path)
    assert found["PIP_CONFIG_FILE"] == os.devnull
    assert "/tox/fresh/bin" not in found["PATH"].split(os.pathsep)
