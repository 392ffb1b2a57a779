"""Foreign bytes of every kind, mutated: each is read, or refused in the plugin's own words."""

from __future__ import annotations

import importlib.util
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_llmperf.judge import baseline as store
from pytest_llmperf.measure.client.response import parse_response
from pytest_llmperf.measure.telemetry import software_of
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.datasets import read_dataset
from pytest_llmperf.plan.files import parse_file
from pytest_llmperf.plan.lengths import read_lengths, read_pairs
from pytest_llmperf.plan.traces import read_trace
from tests.chaos.fuzz_targets import TARGETS
from tests.chaos.mutations import mutated
from tests.chaos.scratch import use_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis.strategies import SearchStrategy

    from pytest_llmperf.plan.files import File
    from tests.chaos.fuzz_targets import Target
    from tests.faults import Attempts

SCRIPT = Path(__file__).with_name("fuzz.py")
MOST_RUNS, MOST_S = 100_000, 30
"""Runs led by coverage, and seconds that they may take: whichever comes first."""
EXAMPLES = {"http": 10_000, "metrics": 10_000, "baselines": 10_000}
"""Examples of a full run for targets that take longer; of the others 20,000."""
TIMEOUT_S = 300


def inputs(target: Target) -> SearchStrategy[bytes]:
    """Return arbitrary bytes, and real inputs with a few changes."""
    seeds = st.sampled_from(list(target.seeds()))
    chance = st.integers(0, 1 << 32).map(random.Random)
    return st.one_of(st.builds(mutated, seeds, seeds, chance), st.builds(mutated, seeds, seeds, chance), st.binary(max_size=200))


def by_target(suffix: str = "", **more: bool) -> pytest.MarkDecorator:
    """Return the parameters of a test that is run for every target, each a fault of its own."""
    marks = {name: pytest.mark.fault("bad input is told", target.fault + suffix, **more) for name, target in TARGETS.items()}
    return pytest.mark.parametrize("target", [pytest.param(TARGETS[name], id=name, marks=mark) for name, mark in marks.items()])


@by_target()
def test_mutated_input_is_read_or_refused(target: Target, attempts: Attempts, tmp_path: Path) -> None:
    use_folder(tmp_path)
    for seed in (*target.seeds(), *target.past()):
        with attempts.attempt():
            target.check(seed)
    failed: list[bytes] = []

    # The quick half is the same in every run, so that a change is red by its own fault alone.
    @settings(
        max_examples=attempts.count(quick=300, full=EXAMPLES.get(target.name, 20_000)),
        derandomize=attempts.count(quick=1, full=2) == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs(target))
    def check_each(data: bytes) -> None:
        if failed:  # what hypothesis does now is to look for a smaller one
            target.check(data)
            return
        failed.append(data)
        with attempts.attempt():
            target.check(data)
        failed.clear()

    check_each()


@by_target(", led by coverage", full=True)
def test_input_led_by_coverage_is_read_or_refused(target: Target, attempts: Attempts, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed (it has no wheels for this Python); tox run -e chaos installs it on Python 3.11")
    # A unit that takes ten seconds is told as an input that failed: on a busy machine any one may.
    bounds = (f"-runs={MOST_RUNS}", f"-max_total_time={MOST_S}", "-report_slow_units=120", "-timeout=120")
    command = [sys.executable, str(SCRIPT), target.name, *bounds, "-artifact_prefix=./"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False)
    output = done.stdout + done.stderr
    inputs_that_failed = [path.read_bytes() for path in tmp_path.glob("*-*") if path.is_file()]
    assert (done.returncode, inputs_that_failed) == (0, []), output[-4_000:]
    runs = re.search(r"Done (\d+) runs", output)
    assert runs, output[-4_000:]
    attempts.add(int(runs[1]))


def test_real_inputs_are_read_and_not_refused(tmp_path: Path) -> None:
    # What is refused as it stands is refused in the same way when it is mutated, and nothing behind is tried.
    use_folder(tmp_path)
    stored = tmp_path / "stored.json"
    for seed in TARGETS["baselines"].seeds():
        stored.write_bytes(seed)
        assert store.load(stored) is not None
    for seed in TARGETS["http"].seeds()[:3]:
        assert parse_response([(2, seed[4:])], sent_ns=1, wanted=seed[0]).error is None
    pages = [software_of(seed.decode().partition("\n# ----")[0]) for seed in TARGETS["metrics"].seeds()]
    assert {*pages} == {"vllm", "sglang", "tgi", "llama.cpp", "tensorrt-llm"}
    for number, seed in enumerate(TARGETS["files"].seeds()):
        (tmp_path / f"{number}.txt").write_bytes(seed)
        file = parse_file("file", f"{number}.txt", tmp_path)
        assert any(map(partial(is_accepted, file=file), (read_trace, read_dataset, read_lengths, read_pairs))), seed


def is_accepted(read: Callable[[File], object], *, file: File) -> bool:
    try:
        return bool(read(file))
    except PlanError:
        return False


def test_mutations_change_what_json_says_and_are_the_same_again() -> None:
    seed = TARGETS["baselines"].seeds()[0]
    changed = [mutated(seed, seed, random.Random(number)) for number in range(200)]
    assert changed == [mutated(seed, seed, random.Random(number)) for number in range(200)]
    assert sum(each.startswith(b'{\n "case"') for each in changed) > 100
