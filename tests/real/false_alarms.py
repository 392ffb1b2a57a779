"""How often is a real engine called slower? A suite on vLLM's CPU build is run again and again, unchanged and slowed down.

    python -m tests.real.false_alarms --runs 10 --slowed 1.1 [--step-ms 25]

It records a baseline over several runs of pytest, then in turn adds a run to it (unless --frozen), and runs the suite
unchanged and slowed. It prints a line for each run and the parts of the noise. On two cores, which nothing else may use
meanwhile, it takes the better part of an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest_llmperf

SLOWED = Path(__file__).parent / "slowed"
SUITE = """
import pytest

@pytest.mark.llmperf(model={model!r}, tp=1, concurrency=[8, 16], engine_args="--load-format dummy --max-model-len 1024")
def test_serving(llmperf, baseline):
    assert llmperf(prompt_tokens=16, output_tokens=32, requests=32) == baseline
"""
# Four layers of a 1B model. The bundled model's steps are mostly Python, which follows every neighbour in the host's caches:
# its throughput was 8 % apart between starts, and 17 % between minutes; that of these matrix products 1 to 2 %.
SIZE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 4}


def run(folder: Path, *options: str, slowed: float = 1.0, step_ms: float = 0.0) -> tuple[int, list[dict], float]:
    """Return exit code, cases and seconds of one run of the suite; slowed and step_ms: see slowed/sitecustomize.py."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    environment = dict(os.environ)
    if slowed != 1.0 or step_ms:
        path = os.pathsep.join(filter(None, (str(SLOWED), environment.get("PYTHONPATH"))))
        environment |= {"LLMPERF_SLOWED": str(slowed), "LLMPERF_STEP_MS": str(step_ms), "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--llmperf-json={report}", *options]
    began = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    (folder / "last.log").write_text(done.stdout + done.stderr)
    cases = json.loads(report.read_text())["cases"] if report.exists() else []
    if cases:
        report.rename(folder / f"report-{time.strftime('%H%M%S')}.json")
    if not cases:
        print(done.stdout[-3000:], done.stderr[-3000:])
    return done.returncode, cases, time.monotonic() - began


def _model(folder: Path) -> Path:
    """Write the model that engines are started with: the bundled one, made larger."""
    model = folder / "small"
    shutil.copytree(Path(pytest_llmperf.__file__).parent / "models" / "tiny", model, dirs_exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | SIZE))
    return model


def _line(what: str, code: int, cases: list[dict], seconds: float) -> str:
    launches = max((len(case["launches"]) for case in cases), default=0)
    found = []
    for case in cases:
        decisive = {row["metric"]: row for row in case["verdict"]["metrics"]}
        change = decisive.get("output_tokens_per_s", {}).get("worse")
        throughput = "-" if change is None else f"{-change:+.1%} tok/s"
        red = [row["metric"] for row in case["verdict"]["metrics"] if row["status"] == case["status"]]
        found.append(f"{case['status']} ({throughput}{', ' + ' '.join(red) if case['status'] == 'REGRESSED' else ''})")
    return f"{what}: exit {code}, {launches} launches, {seconds:.0f} s: {'; '.join(found)}"


def main() -> None:
    """Record, run in turn, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="runs of each kind")
    parser.add_argument("--slowed", type=float, default=1.1, help="factor on the time of engine steps")
    parser.add_argument("--step-ms", type=float, default=0.0, help="make each step last that long at least, as an accelerator's")
    parser.add_argument("--jobs", type=int, default=4, help="runs of pytest that the baseline is first recorded in")
    parser.add_argument("--launches", type=int, default=5, help="launches that each run of pytest records")
    parser.add_argument("--suite", type=Path, help="a test file to run in place of the suite for CPUs")
    parser.add_argument("--frozen", action="store_true", help="leave the baseline as it is once it has been recorded")
    parser.add_argument("--options", default="", help="further options of pytest, as on its command line")
    parser.add_argument("--max-launches", type=int, default=8)
    parser.add_argument("--tolerance", default="10%")
    parser.add_argument("--folder", help="where baselines and logs go; an existing baseline there is used")
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="llmperf-"))
    folder.mkdir(parents=True, exist_ok=True)
    model = "tiny" if args.step_ms else str(_model(folder))  # the steps of the small one are over before they are padded
    (folder / "test_suite.py").write_text(args.suite.read_text() if args.suite else SUITE.format(model=model))
    (folder / "pytest.ini").write_text("[pytest]\n")
    compare = (f"--llmperf-tolerance={args.tolerance}", f"--llmperf-max-launches={args.max_launches}", *shlex.split(args.options))

    def record(number: int) -> None:
        first = not list(folder.glob("baselines/**/*.json"))
        options = (
            ["--update-baselines", f"--llmperf-launches={args.launches}"] if first else [f"--llmperf-calibrate={args.launches}"]
        )
        print(_line(f"record {number}", *run(folder, *options, *compare, step_ms=args.step_ms)), flush=True)

    if not list(folder.glob("baselines/**/*.json")):
        for job in range(args.jobs):
            record(job + 1)
    tally: dict[str, Counter[str]] = {"unchanged": Counter(), "slowed": Counter()}
    for number in range(args.runs):
        if not args.frozen:
            record(args.jobs + number + 1)
        for what, factor in (("unchanged", 1.0), ("slowed", args.slowed)):
            code, cases, seconds = run(folder, *compare, slowed=factor, step_ms=args.step_ms)
            tally[what]["red" if code else "green"] += 1
            tally[what]["launches"] += max((len(case["launches"]) for case in cases), default=0)
            print(_line(f"{what} {number + 1}", code, cases, seconds), flush=True)
    for path in sorted(folder.glob("baselines/**/*.json")):
        for metric, noise in json.loads(path.read_text())["noise"].items():
            print(path.stem, metric, json.dumps(noise), flush=True)
    for what, found in tally.items():
        print(f"{what}: {found['red']} of {args.runs} runs red, {found['launches'] / max(args.runs, 1):.1f} engine starts a run")


if __name__ == "__main__":
    main()
