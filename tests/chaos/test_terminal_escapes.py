"""Orders to a terminal in what others write: a server's errors and names, an engine's log, a stored baseline."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from pytest_llmperf.testing import Example, Result
from pytest_llmperf.units import printable
from tests.baselines import rewrite
from tests.odd_servers import VLLM, odd_server

if TYPE_CHECKING:
    from pathlib import Path

ORDERS = (
    "\x1b]0;owned\x07 \x1b[2J\x1b[1;31m \x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\"
    " \x9b5n \u202etxt.exe\u2066 \x08 \x00 \x7f \ufffe"
)
TIMEOUT_S = 600.0
"""A run may have to wait until the engines of others have left this host."""
SHORT = ("--llmperf-rounds=1", "--llmperf-launches=2", "-p", "no:hypothesispytest", "-p", "no:benchmark", "-p", "no:anyio")
SHOWING = ("-l", "--tb=long", "-vv", "-rA", "--junitxml=junit.xml")
MEASURING = """
def test_x(llmperf):
    llmperf(requests=8, prompt_tokens=6, output_tokens=4)
"""
COMPARING = """
def test_x(llmperf, baseline):
    assert llmperf(requests=8, prompt_tokens=6, output_tokens=4) == baseline
"""


def _run(folder: Path, source: str, *args: str) -> Result:
    """Run a project, and fail where anything that it shows or writes gives an order."""
    result = Example({"test_it.py": source}, (*SHORT, *SHOWING)).run(folder, *args, timeout_s=TIMEOUT_S)
    for text in (result.stdout, result.stderr, (folder / "junit.xml").read_text(), (folder / "llmperf.json").read_text()):
        wrong = [line for line in text.splitlines() if printable(line) != line]
        assert wrong == []
        assert "\x1b" not in text
    ElementTree.parse(folder / "junit.xml")
    return result


@pytest.mark.fault("no stranger", "orders to a terminal in the errors of a server")
@pytest.mark.parametrize("status", [403, 500])
def test_errors_of_a_server_give_no_orders(tmp_path: Path, status: int) -> None:
    errors = (
        {"headers": {"x-never": "sent"}}
        if status == 403
        else {"events": (f"data: {json.dumps({'error': ORDERS})}\n\n".encode(),)}
    )
    with odd_server(VLLM, says=f"{ORDERS}\r", **errors) as server:
        result = _run(tmp_path, MEASURING, f"--llmperf-url=e={server.url}")
    assert result.outcomes == ({"error": 1} if status == 403 else {"failed": 1})
    assert "\\x1b]0;owned\\x07" in result.stdout
    assert "\\u202etxt.exe" in result.stdout


@pytest.mark.fault("no stranger", "orders to a terminal in the names of models and versions", full=True)
def test_names_of_a_server_give_no_orders(tmp_path: Path) -> None:
    several = {"data": [{"id": ORDERS + name, "owned_by": ORDERS} for name in "ab"]}
    with odd_server(VLLM, models=several) as server:
        result = _run(tmp_path, MEASURING, f"--llmperf-url=e={server.url}")
    assert "several models are served" in result.stdout
    assert "\\x1b]0;owned\\x07" in result.stdout
    one = {"data": [{"id": f"m{ORDERS}", "owned_by": "vllm"}]}
    with odd_server(VLLM, models=one, pages={"/health": "", "/version": {"version": ORDERS}}) as server:
        result = _run(tmp_path, COMPARING, f"--llmperf-url=e={server.url}", "--update-baselines")
    assert result.outcomes == {"passed": 1}, result.stdout
    with odd_server(VLLM, pages={"/health": "", "/version": {"version": "1"}}) as server:
        result = _run(tmp_path, COMPARING, f"--llmperf-url=e={server.url}", "--llmperf-model=m")
    assert "\\x1b]0;owned\\x07" in result.stdout, result.stdout


@pytest.mark.fault("no stranger", "orders to a terminal in the log of an engine that dies")
def test_the_last_lines_of_a_log_give_no_orders(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(
        f"import sys\nprint({ORDERS!r}, flush=True)\nsys.exit('RuntimeError: ' + {ORDERS!r})\n", "utf-8", "surrogatepass"
    )
    result = _run(tmp_path, MEASURING, f"--llmperf-command={sys.executable} dies.py {{port}}")
    assert result.outcomes == {"error": 1}
    assert "owned\\x07" in result.stdout


def _poisoned(value: object) -> object:
    """Return stored data with orders in each text that a reader may be shown."""
    if isinstance(value, dict):
        return {name: _poisoned(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_poisoned(item) for item in value]
    return value + ORDERS if isinstance(value, str) else value


@pytest.mark.fault("no stranger", "orders to a terminal in a stored baseline")
def test_a_baseline_gives_no_orders(tmp_path: Path) -> None:
    engine = ("--llmperf-engine=simulated", "--llmperf-tolerance=50%")
    assert _run(tmp_path, COMPARING, *engine, "--update-baselines").outcomes == {"passed": 1}
    [path] = tmp_path.rglob("baselines/**/*.json")
    stored = json.loads(path.read_text())
    provenance = stored["provenance"]
    kept = {
        name: provenance["engine"][name]
        for name in ("kind", "model", "tp", "pp", "dp", "model_config")
        if name in provenance["engine"]
    }
    stored["provenance"] = _poisoned(provenance | {"versions": provenance["versions"] | {f"x{ORDERS}": ORDERS}})
    stored["provenance"]["engine"] |= {"env": {f"N{ORDERS}": ORDERS}, "args": "--x y\x1b[2J", **kept}
    for launch in stored["launches"]:
        launch["started"] += ORDERS
        launch["metrics"][f"odd{ORDERS}"] = 1.0
    rewrite(path, lambda data: data.update(stored))
    result = _run(tmp_path, COMPARING, *engine, "--llmperf-engine-args=--sim-slow-down 4")
    assert result.outcomes == {"failed": 1}, result.stdout
    assert "changed since the baseline: environment N\\x1b]0;owned" in result.stdout, result.stdout
    path.write_text(json.dumps(stored | {"version": f"9{ORDERS}"}))
    result = _run(tmp_path, COMPARING, *engine)
    assert result.outcomes == {"failed": 1}
    assert "format version" in result.stdout
