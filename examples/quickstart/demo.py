"""The main job in three steps on real vLLM engines: record a baseline, pass against it, fail when the engine is slower.

    python examples/quickstart/demo.py
    python examples/quickstart/demo.py examples/test_concurrent_requests.py examples/test_mixed_workload.py

Of tests that are named, the first two steps. Exit code 0 when all came out as they should. Everything it writes goes into a
temporary folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUICKSTART = Path(__file__).parent
ROOT = QUICKSTART.parents[1]
# Two shared cores are a noisy place: one start differs from the next by 10 % and more. On a GPU leave the default of 5 %.
COMMON = ("--llmperf-tolerance=80%", "--llmperf-rounds=3", "-p", "no:cacheprovider")
STEPS = (
    ("record a baseline", ("--update-baselines", "--llmperf-launches=3"), 0, {"RECORDED"}),
    # A baseline of one run on shared cores can also say too little to tell (INCONCLUSIVE), which does not fail.
    ("run again: nothing has changed, so it does not fail", (), 0, {"PASS", "IMPROVED", "INCONCLUSIVE"}),
    (
        "run with an engine that serves one request at a time: it fails",
        ("--llmperf-engine-args=--max-num-seqs 1",),
        1,
        {"REGRESSED"},
    ),
)


def main() -> int:
    """Run the steps; return the exit code."""
    degrees = "1,2" if len(os.sched_getaffinity(0)) > 1 else "1"
    named = sys.argv[1:]
    tests, steps = (named, STEPS[:2]) if named else (["examples/quickstart", f"--llmperf-tp={degrees}"], STEPS)
    failures = 0
    with tempfile.TemporaryDirectory(prefix="llmperf-demo-") as folder:
        for number, (what, options, code, statuses) in enumerate(steps, 1):
            command = ["pytest", *tests, *options]
            print(f"\n##### Step {number}: {what}\n##### {' '.join(command)}\n", flush=True)
            report = Path(folder) / "report.json"
            extra = (*COMMON, f"--llmperf-baselines={folder}/baselines", f"--llmperf-json={report}")
            began = time.monotonic()
            done = subprocess.run([sys.executable, "-m", *command, *extra], cwd=ROOT, check=False)
            cases = json.loads(report.read_text())["cases"] if report.exists() else []
            found = [case["status"] for case in cases]
            # Tests that compare nothing are MEASURED.
            complete = len(found) >= len(tests) if named else len(found) == len(degrees.split(","))
            right = done.returncode == code and complete and set(found) - {"MEASURED"} <= statuses
            failures += not right
            seconds = time.monotonic() - began
            verdict = "as it should be" if right else f"NOT as it should be (expected {' or '.join(sorted(statuses))})"
            print(f"\n##### Step {number}: {', '.join(found) or 'nothing measured'} in {seconds:.0f} s: {verdict}", flush=True)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
