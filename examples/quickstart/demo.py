"""The main job in three steps on real vLLM engines: record a baseline, pass against it, fail when the engine is slower.

    python examples/quickstart/demo.py
    python examples/quickstart/demo.py --llmperf-python=.venv-engine/bin/python
    python examples/quickstart/demo.py examples/test_concurrent_requests.py examples/test_mixed_workload.py

A first warm-up says how fast it is here, and from that follow the sizes of all that comes. Of tests that are named, the first two
steps. Exit code 0 when all came out as they should. What it writes goes into `.llmperf-demo`, a small project to play with.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TEST = Path(__file__).with_name("test_quickstart.py")
FOLDER = ROOT / ".llmperf-demo"
BUDGET_S = 600.0
"""What the demo may take; where even the least takes longer, it says so."""
ROUND_S = 0.8
"""A round that takes about so long is long enough to be steady, and short against an engine's start."""
CONCURRENCY = 8
WAVES = 3
"""The fewest waves that have a steady window."""
PLAYED_ROUNDS = 2.5
"""Rounds of a launch besides those that count: the warm-up, and those before two agree."""
SECOND_DEGREE = 1.5
"""How much longer a launch takes with two ranks on two cores."""
MOST_SLOWER = 4
"""Engine starts until the slower engine must be proven slower; two are nearly always enough."""
ONE_AT_A_TIME = 6.0
"""How much longer a round of eight at a time takes where the engine serves one at a time."""
WARM_UP = """def test_warm_up(llmperf):
    llmperf(prompt_tokens=100, output_tokens=32, requests=16)
"""
CONFTEST = '''"""Sized by the demo's first warm-up here: {speed:,.0f} tokens/s, {startup:.0f} s for an engine's start."""

import pytest


@pytest.fixture(scope="session")
def llm_workload():
    return {{"requests": {requests}, "output_tokens": {output_tokens}}}
'''


@dataclass(frozen=True)
class Engine:
    """Which engine the demo runs on."""

    options: tuple[str, ...]
    why: str = ""
    """Why it is not a real one; empty for a real one."""


@dataclass(frozen=True)
class Sizes:
    """What can be measured in the time."""

    degrees: tuple[int, ...]
    slower: tuple[int, ...]
    """The degrees at which the slower engine is run."""
    requests: int
    output_tokens: int
    rounds: int
    launches: int
    """Engine starts that the baseline is recorded from."""
    most: int
    """Engine starts that a comparison may take."""
    launch_s: float
    """Of one launch at TP 1, from the engine's start to its stop, besides its rounds."""
    round_s: float

    def seconds(self, starts: float, *, slower: bool = False) -> float:
        """Return how long so many engine starts at each degree take."""
        rounds_s = (PLAYED_ROUNDS + self.rounds) * self.round_s * (ONE_AT_A_TIME if slower else 1.0)
        degrees = self.slower if slower else self.degrees
        return sum(starts * (self.launch_s + rounds_s) * (SECOND_DEGREE if degree > 1 else 1.0) for degree in degrees)

    @property
    def total_s(self) -> float:
        """Return how long the three steps take at most, but that the slower engine is seldom started more than twice."""
        return self.seconds(self.launches + self.most) + self.seconds(2, slower=True)


@dataclass(frozen=True)
class Step:
    """One run of pytest, and how it should come out."""

    name: str
    what: str
    options: tuple[str, ...]
    starts: tuple[int, int]
    """Engine starts at each degree, at least and at most."""
    code: int
    statuses: frozenset[str]
    look: str
    """What a reader should look at."""
    degrees: tuple[int, ...]
    slower: bool = False


def find_engine(python: str) -> Engine:
    """Return vLLM of an interpreter, or the simulated engine where it has none."""
    from pytest_llmperf.measure.engines.engine import EngineError
    from pytest_llmperf.measure.engines.vllm import find_vllm

    try:
        find_vllm(python)
    except EngineError as error:
        return Engine(("--llmperf-engine=simulated",), str(error))
    return Engine((f"--llmperf-python={Path(shutil.which(python) or python).absolute()}",))


def choose_sizes(speed: float, launch_s: float, cores: int, budget_s: float = BUDGET_S) -> Sizes:
    """Return what fits the time, from tokens/s and from the seconds of a launch besides its rounds.

    What makes the verdicts surer goes last: first shorter answers, then fewer rounds and launches, at last the second degree.
    """
    tokens = speed * ROUND_S
    requests = max(CONCURRENCY * WAVES, min(2 * CONCURRENCY * WAVES, int(tokens / 50) // CONCURRENCY * CONCURRENCY))
    output_tokens = max(8, min(50, int(tokens / requests)))
    round_s = requests * output_tokens / speed
    both, one = (1, 2)[:cores], (1,)
    choices = [(both, both, 3, 3, 3), (both, both, 2, 3, 3), (both, both, 2, 2, 2), (both, one, 2, 2, 2),
               (one, one, 2, 2, 2), (one, one, 2, 1, 2)]  # fmt: skip
    for degrees, slower, rounds, launches, most in choices:
        sizes = Sizes(degrees, slower, requests, output_tokens, rounds, launches, most, launch_s, round_s)
        if sizes.total_s <= budget_s:
            break
    return sizes


def shorten(sizes: Sizes, pace: float, left_s: float, *, compared: bool) -> Sizes:
    """Return what of it still fits where steps take `pace` times as long as was expected; `compared` says that step 2 is over."""
    choices = (sizes, replace(sizes, most=2), replace(sizes, most=2, slower=(1,)))
    for shorter in choices:
        needed_s = shorter.seconds(2, slower=True) + (0.0 if compared else shorter.seconds(shorter.most))
        if pace * needed_s <= left_s:
            break
    return shorter


def steps(sizes: Sizes) -> list[Step]:
    """Return the three steps."""
    most = f"--llmperf-max-launches={sizes.most}"
    only = () if sizes.slower == sizes.degrees else (f"--llmperf-tp={','.join(map(str, sizes.slower))}",)
    return [
        Step(
            "record",
            "record a baseline",
            ("--update-baselines", f"--llmperf-launches={sizes.launches}"),
            (sizes.launches, sizes.launches),
            0,
            frozenset({"RECORDED"}),
            "the table of each case: what was measured, and how far apart the launches were; this is what goes into git",
            sizes.degrees,
        ),
        # A baseline of one run on shared cores can also say too little to tell (INCONCLUSIVE), which does not fail.
        Step(
            "unchanged",
            "run again; nothing has changed, so it does not fail",
            (most,),
            (1, sizes.most),
            0,
            frozenset({"PASS", "IMPROVED", "INCONCLUSIVE"}),
            "the column `verdict`, and the last line, which says how many cases were compared and how many were not",
            sizes.degrees,
        ),
        Step(
            "slower",
            "run with an engine that serves one request at a time: it fails",
            (f"--llmperf-max-launches={MOST_SLOWER}", "--llmperf-engine-args=--max-num-seqs 1", *only),
            (2, MOST_SLOWER),
            1,
            frozenset({"REGRESSED"}),
            "the row ttft_p50_s: baseline, now, change with its bounds; and above the table what changed since the baseline",
            sizes.slower,
            slower=True,
        ),
    ]


def run_pytest(folder: Path, report: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    """Run pytest in a folder; return its exit code and the cases of its JSON file."""
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--llmperf-json={report}", *options]
    done = subprocess.run(command, cwd=folder, check=False)
    cases: list[dict[str, Any]] = json.loads(report.read_text())["cases"] if report.exists() else []
    return done.returncode, cases


def tell(text: str) -> None:
    """Print what the demo itself says, apart from pytest."""
    print("\n".join(f"##### {line}" for line in text.splitlines()), flush=True)


def minutes(seconds: float) -> str:
    """Return a duration in words."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def warm_up(engine: Engine) -> tuple[float, float, float]:
    """Return tokens/s, seconds of a launch besides its rounds, and of the engine's start, from one launch at TP 1."""
    (FOLDER / "warm_up.py").write_text(WARM_UP)
    began_s = time.monotonic()
    code, cases = run_pytest(FOLDER, FOLDER / "warm_up.json", "-q", "warm_up.py", "--llmperf-rounds=1", *engine.options)
    wall_s = time.monotonic() - began_s
    launches = [launch for case in cases for launch in case["launches"] if launch["rounds"]]
    if code or not launches:
        sys.exit(f"the first warm-up failed (exit code {code}); what is printed above says why")
    [launch] = launches
    speed = float(launch["rounds"][0]["metrics"]["output_tokens_per_s"])
    return speed, wall_s - launch["played_s"], float(launch["metrics"]["startup_s"])


def write_project(engine: Engine, sizes: Sizes, speed: float, startup_s: float) -> None:
    """Write the demo's project: one test, its sizes, and the options as an ini file."""
    options = dict(option.removeprefix("--").split("=", 1) for option in engine.options)
    settings = {
        **{name.replace("-", "_"): value for name, value in options.items()},
        "llmperf_tp": ",".join(map(str, sizes.degrees)),
        "llmperf_rounds": str(sizes.rounds),
        # Two shared cores are a noisy place: one start differs from the next by 10 % and more. On a GPU leave the default of 5 %.
        "llmperf_tolerance": "80%",
    }
    (FOLDER / "pytest.ini").write_text("\n".join(["[pytest]", *(f"{key} = {value}" for key, value in settings.items())]) + "\n")
    text = CONFTEST.format(speed=speed, startup=startup_s, requests=sizes.requests, output_tokens=sizes.output_tokens)
    (FOLDER / "conftest.py").write_text(text)
    shutil.copy(TEST, FOLDER)
    tell(
        f"So: TP {' and '.join(map(str, sizes.degrees))}, {sizes.requests} requests of {sizes.output_tokens} tokens,"
        f" {sizes.rounds} rounds a launch; at most about {minutes(sizes.total_s)}."
    )


def duration(step: Step, sizes: Sizes) -> str:
    """Return how long a step of the demo's own test takes."""
    low, high = (sizes.seconds(starts, slower=step.slower) for starts in step.starts)
    return f" (about {minutes(low)})" if low == high else f" ({minutes(low)} to {minutes(high)})"


def run_step(
    number: int, step: Step, how_long: str, cases_wanted: int, folder: Path, options: tuple[str, ...]
) -> tuple[str, bool]:
    """Run a step; return a line on what came of it, and whether that was right."""
    print()
    tell(f"Step {number}: {step.what}{how_long}\npytest {' '.join(step.options)}")
    began_s = time.monotonic()
    code, cases = run_pytest(folder, FOLDER / f"{number}-{step.name}.json", *step.options, *options)
    found = [case["status"] for case in cases]
    # Tests that compare nothing are MEASURED.
    right = code == step.code and len(found) >= cases_wanted and set(found) - {"MEASURED"} <= step.statuses
    verdict = "as it should be" if right else f"NOT as it should be (expected {' or '.join(sorted(step.statuses))})"
    line = f"{step.name:10} {', '.join(found) or 'nothing measured':24} {minutes(time.monotonic() - began_s):>12}   {verdict}"
    tell(f"{line}\nLook at {step.look}.")
    return line, right


def last_words(lines: list[str], seconds: float, *, own: bool) -> str:
    """Return the demo's last lines: the verdicts, where the baseline lies, and of the demo's own test what to try next."""
    stored = sorted(str(path.relative_to(ROOT)) for path in (FOLDER / "baselines").rglob("*.json"))
    python = os.path.relpath(Path(sys.executable), FOLDER)
    pytest = f"{sys.executable if python.startswith('../../..') else python} -m pytest"
    text = [f"Done in {minutes(seconds)}.", *lines, "The baseline lies in", *(f"  {path}" for path in stored)]
    if own:
        text += [
            f"Try next, in {FOLDER.name}:",
            f"  {pytest} --co -v                                     # starts nothing: how small a change can be found",
            f'  {pytest} --llmperf-engine-args="--max-num-seqs 4"    # a change of your own, against the baseline',
            f"  {pytest} --llmperf-selftest                          # do the gates fire? starts nothing",
        ]
    return "\n".join(text)


def prepare(python: str) -> tuple[Engine, Sizes]:
    """Make the demo's folder anew, warm up, and return the engine and what can be measured in the time."""
    began_s = time.monotonic()
    engine = find_engine(python)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    (FOLDER / "pytest.ini").write_text("[pytest]\n")
    if engine.why:
        tell(
            f"{engine.why} So this runs on the simulated engine, whose verdicts are real and whose speed is made up;"
            " `python -m pytest_llmperf engine install --into .venv-engine` installs a real one."
        )
    tell(f"First warm-up: one engine start, to see how fast it is here (up to 2 minutes); {FOLDER.name} is made anew")
    speed, launch_s, startup_s = warm_up(engine)
    left_s = BUDGET_S - (time.monotonic() - began_s)
    sizes = choose_sizes(speed, launch_s, len(os.sched_getaffinity(0)), left_s)
    tell(f"{speed:,.0f} tokens/s, {startup_s:.0f} s for an engine's start.")
    write_project(engine, sizes, speed, startup_s)
    if sizes.total_s > left_s:
        tell("That is too slow for 10 minutes even at the least, so this takes longer.")
    return engine, sizes


def main() -> int:
    """Run the steps; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmperf-python", default=sys.executable, help="interpreter that has vLLM (default: this one)")
    parser.add_argument("tests", nargs="*", help="test files of this repository, instead of the demo's own")
    args = parser.parse_args()
    began_s = time.monotonic()
    engine, sizes = prepare(args.llmperf_python)
    results, pace = [], 1.0
    for number in range(1, 3 if args.tests else 4):
        step_began_s = time.monotonic()
        if number > 1:
            sizes = shorten(sizes, pace, BUDGET_S - (step_began_s - began_s), compared=number > 2)
        step = steps(sizes)[number - 1]
        if args.tests:
            tests = [str(Path(test).absolute()) for test in args.tests]
            options = (*tests, *engine.options, "--llmperf-tolerance=80%", f"--llmperf-rounds={sizes.rounds}",
                       f"--llmperf-baselines={FOLDER / 'baselines'}")  # fmt: skip
            results.append(run_step(number, step, "", len(tests), ROOT, options))
        else:
            results.append(run_step(number, step, duration(step, sizes), len(step.degrees), FOLDER, ()))
        if number == 1:  # neighbours come and go, and the warm-up was short
            pace = max(1.0, (time.monotonic() - step_began_s) / sizes.seconds(sizes.launches))
    print()
    tell(last_words([line for line, _ in results], time.monotonic() - began_s, own=not args.tests))
    return int(not all(right for _, right in results))


if __name__ == "__main__":
    sys.exit(main())
