"""How long does collecting take with baselines, against none? Both in one run, one after the other, the least of some repeats.

`python benchmarks/collection.py [cases] [repeats]`: a project of so many cases (5000) is collected by `pytest --co -q` in a
process of its own. The ratio is what counts: the seconds are the machine's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pytest_llmperf.judge import baseline as store
from pytest_llmperf.judge.provenance import Provenance
from pytest_llmperf.measure.host.machine import describe_host
from pytest_llmperf.measure.measurement import Launch, Round
from pytest_llmperf.measure.metrics import METRICS
from pytest_llmperf.plan.workload import Workload

_TEST = """\
import pytest

@pytest.mark.parametrize("n", range({cases}))
def test_x(n, llmperf, baseline):
    assert llmperf(prompt_tokens=16, output_tokens=8, requests=8) == baseline
"""


def case_ids(cases: int) -> list[str]:
    """Return the ids of the project's cases."""
    return [f"test_it.py::test_x[tiny-tp1-c8-{n}]" for n in range(cases)]


def write_project(folder: Path, cases: int) -> None:
    """Write a test of so many cases."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_it.py").write_text(_TEST.format(cases=cases))


def write_baselines(folder: Path, cases: int) -> None:
    """Write a baseline of five launches with five rounds for each case, as large as real ones are."""
    of_round = {metric.name: 0.05 for metric in METRICS if metric.of_round}
    of_launch = {metric.name: 4096.0 for metric in METRICS if metric.of_launch and metric.start != "cold"}
    launches = tuple(
        Launch(
            f"{n}",
            "2026-01-01T00:00:00+00:00",
            tuple(Round({name: value * (1 + 0.001 * (n + k)) for name, value in of_round.items()}) for k in range(5)),
            of_launch,
            job=f"{n}",
        )
        for n in range(5)
    )
    host, workload = describe_host(simulated=True).key, Workload(16, 8, requests=8, concurrency=8)
    for case_id in case_ids(cases):
        provenance = Provenance({"kind": "simulated", "model": "tiny", "tp": 1, "pp": 1, "dp": 1, "args": "", "env": {}})
        stored = store.Baseline(case_id, host, workload.description, workload.fingerprint, provenance, launches)
        path = store.path_for(folder / "baselines", host, case_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(store.dump(stored))


def seconds(folder: Path, baselines: str) -> float:
    """Return how long collecting the project takes, the start of the interpreter included."""
    command = [sys.executable, "-m", "pytest", "--co", "-q", "-p", "no:cacheprovider", "--llmperf-engine=simulated"]
    begin_s = time.perf_counter()
    subprocess.run([*command, f"--llmperf-baselines={baselines}"], cwd=folder, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin_s


def main(cases: int = 5000, repeats: int = 3) -> None:
    """Print the seconds with and without baselines, and their ratio, as JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_project(folder, cases)
        write_baselines(folder, cases)
        times: dict[str, list[float]] = {"without": [], "with": []}
        for _ in range(repeats):
            times["without"].append(seconds(folder, "nothing"))
            times["with"].append(seconds(folder, "baselines"))
    least = {name: round(min(of), 2) for name, of in times.items()}
    print(json.dumps({"cases": cases, **least, "ratio": round(least["with"] / least["without"], 2)}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
