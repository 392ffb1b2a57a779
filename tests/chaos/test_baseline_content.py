"""No false green: whatever is done to what a baseline holds, an engine that is 1.5 times slower does not pass by it."""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from pytest_llmperf.judge import baseline as store
from pytest_llmperf.judge.verdict import Status
from pytest_llmperf.measure.host.machine import describe_host
from pytest_llmperf.measure.metrics import GATING
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.engine import parse_engine_args
from pytest_llmperf.run.cases import Answer, CaseState
from pytest_llmperf.run.judging import compare, known_failure
from pytest_llmperf.run.rules import Rules, prospects_of, stored_and_new
from pytest_llmperf.run.selftest import self_tested
from tests.baselines import as_version_2, rewrite
from tests.whole_run import WORKLOAD, plan, settings_from, whole_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_llmperf.measure.measurement import Launch
    from pytest_llmperf.run.settings import Settings
    from tests.faults import Attempts

Change = dict[str, Any]
FALSE_GREEN, BAD_INPUT = "no false green", "bad input is told"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, tuple[Launch, ...]]:
    """Return the text of a recorded baseline, and the launches of the same engine when it is 1.5 times slower."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "usual").mkdir()
    (folder / "slow").mkdir()
    slow = {"engine_args": parse_engine_args("--sim-slow-down 1.5", origin="test")}
    with mock.patch.dict(os.environ, LLMPERF_SIMULATED_CLOCK="virtual"):
        whole_run(folder / "usual", update="all", launches=5, rounds=5)
        whole_run(folder / "slow", update="all", launches=4, rounds=5, **slow)
    usual, slowed = (next((folder / name / "baselines").rglob("*.json")) for name in ("usual", "slow"))
    baseline = store.load(slowed)
    assert baseline is not None
    return usual.read_text(), baseline.launches


class Judge:
    """Judges the slow engine by a baseline file, as a run does from its start to the verdict."""

    def __init__(self, folder: Path, slow: tuple[Launch, ...]) -> None:
        self.folder = folder
        self.slow = slow
        self.host = describe_host(simulated=True)
        self.test = plan(self.settings())
        self.path = store.path_for(folder / "baselines", self.host.key, self.test.case_id)
        self.path.parent.mkdir(parents=True)

    def settings(self, **given: Any) -> Settings:
        return settings_from(self.folder, **given)

    def rules(self, **given: Any) -> Rules:
        compared = {self.test.case_id: self.test}
        rules = Rules(self.settings(**given), self.host, self.folder, compared, tuple(compared), "job")
        rules.__dict__["_commit"] = None  # git need not be asked thousands of times
        return rules

    def __call__(self, measured: tuple[Launch, ...] | None = None, /, **given: Any) -> Answer:
        """Return the answer of a run; raises nothing but what a run itself raises."""
        rules = self.rules(**given)
        state = CaseState(Case(self.test.case_id, self.test.spec, WORKLOAD), measured or self.slow)
        stored_and_new(rules)
        list(prospects_of(rules))
        if answer := known_failure(rules, self.test):
            return answer
        return compare(rules, state, self.test.marker)


@pytest.fixture
def judge(tmp_path: Path, recorded: tuple[str, tuple[Launch, ...]]) -> Judge:
    judge = Judge(tmp_path, recorded[1])
    judge.path.write_text(recorded[0])
    return judge


def of_rounds(data: Change, change: Callable[[dict[str, Any]], Any]) -> None:
    for launch in data["launches"]:
        for figures in (launch["metrics"], *(each["metrics"] for each in launch["rounds"])):
            change(figures)


def nulled(figures: dict[str, Any], names: tuple[str, ...] = GATING) -> None:
    figures.update({name: None for name in names if name in figures})


def removed(figures: dict[str, Any], names: tuple[str, ...] = GATING) -> None:
    for name in names:
        figures.pop(name, None)


def slowed(figures: dict[str, Any]) -> None:
    """Make figures those of an engine that is 1.6 times slower."""
    for name, value in figures.items():
        if value is not None and name.endswith("_s"):
            figures[name] = value / 1.6 if "_per_" in name else value * 1.6


def thinned(data: Change) -> None:
    del data["launches"][1:]
    for launch in data["launches"]:
        del launch["rounds"][1:]


def red(answer: Answer) -> bool:
    status = answer.verdict and answer.verdict.status
    return not answer.accepted and status in (Status.NOT_COMPARABLE, Status.REGRESSED)


def test_a_sound_baseline_tells_the_slow_engine(judge: Judge) -> None:
    answer = judge()
    assert answer.verdict is not None
    assert answer.verdict.status is Status.REGRESSED


CONTENT: dict[str, Callable[[Change], Any]] = {
    "emptied": lambda data: of_rounds(data, dict.clear),
    "nulled": lambda data: of_rounds(data, nulled),
    "gates removed": lambda data: of_rounds(data, removed),
    "one gate removed": lambda data: of_rounds(data, partial(removed, names=("tpot_p50_s",))),
    "launches and rounds removed": thinned,
    "another host's": lambda data: data.update(host="nvidia-h200"),
    "made slower": lambda data: of_rounds(data, slowed),
    "its tolerance of formulas": lambda data: data.update(formulas=1),
}


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.fault(FALSE_GREEN, "baseline emptied, nulled, thinned, made slower by hand")
def test_an_edited_baseline_is_no_evidence(judge: Judge, name: str) -> None:
    data = json.loads(judge.path.read_text())
    CONTENT[name](data)
    judge.path.write_text(json.dumps(data))
    answer = judge()
    assert answer.verdict is not None
    assert answer.verdict.status is Status.NOT_COMPARABLE
    assert "edited by hand" in answer.verdict.reasons[0]
    assert not answer.accepted


@pytest.mark.parametrize("name", [name for name in CONTENT if name != "made slower"])
@pytest.mark.fault(FALSE_GREEN, "baseline of an older format emptied, nulled, thinned")
def test_an_older_file_without_a_checksum_is_no_way_around(judge: Judge, name: str) -> None:
    as_version_2(judge.path, CONTENT[name])
    assert red(judge())


@pytest.mark.parametrize("name", ["emptied", "nulled", "gates removed", "one gate removed", "another host's"])
@pytest.mark.fault(FALSE_GREEN, "baseline that has lost a gate, or is another host's, with a checksum that fits")
def test_what_a_baseline_must_have_is_missed_whatever_its_checksum_says(judge: Judge, name: str) -> None:
    rewrite(judge.path, CONTENT[name])
    answer = judge()
    assert answer.verdict is not None
    assert answer.verdict.status in (Status.NOT_COMPARABLE, Status.REGRESSED)
    if name == "another host's":
        assert answer.verdict.reasons[0].endswith("recorded on 'nvidia-h200', and not on 'simulated'")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.fault(FALSE_GREEN, "baseline called older than it is")
def test_a_baseline_that_is_called_older_keeps_its_checksum(judge: Judge, version: int) -> None:
    data = json.loads(judge.path.read_text())
    of_rounds(data, slowed)
    judge.path.write_text(json.dumps(data | {"version": version}))
    assert red(judge())


def formatted(text: str) -> Iterator[str]:
    """Yield a file as formatters write it: indented, in one line, keys sorted, whole numbers without a point."""
    data = json.loads(text)

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: whole(item) for name, item in value.items()}
        if isinstance(value, list):
            return [whole(item) for item in value]
        return int(value) if isinstance(value, float) and value == int(value) else value

    yield json.dumps(data, indent=4, sort_keys=True)
    yield json.dumps(dict(reversed(data.items())), separators=(",", ":"), ensure_ascii=False)
    yield json.dumps(whole(data), indent="\t")
    yield text.replace("\n", "\r\n")


def test_a_formatter_breaks_no_checksum(judge: Judge) -> None:
    text = judge.path.read_text()
    for other in formatted(text):
        judge.path.write_text(other)
        stored = store.load(judge.path)
        assert stored is not None
        assert stored.doubts == ()


def test_what_is_for_people_may_be_edited(judge: Judge) -> None:
    data = json.loads(judge.path.read_text())
    data["provenance"]["engine"]["env"] = {"KEY": "taken out"}
    data["provenance"]["host"] = {}
    data["case"] = "test_it.py::test_renamed"
    judge.path.write_text(json.dumps(data))
    stored = store.load(judge.path)
    assert stored is not None
    assert stored.doubts == ()


@pytest.mark.fault(FALSE_GREEN, "baseline that loses a gate when it is recorded anew")
def test_a_gate_that_is_lost_in_recording_is_told(judge: Judge) -> None:
    launches = tuple(
        replace(launch, rounds=tuple(replace(each, metrics=each.metrics | {"tpot_p50_s": None}) for each in launch.rounds))
        for launch in judge.slow
    )
    answer = judge(launches, update="all", launches=len(launches))
    assert "the stored baseline was compared by tpot_p50_s; this one is no more" in answer.notes
    assert answer.record is not None


@pytest.mark.fault(FALSE_GREEN, "baseline too noisy to find anything")
def test_noise_that_hides_everything_passes_nothing(judge: Judge, attempts: Attempts) -> None:
    for chance in attempts(quick=20, full=400):
        spread = math.exp(chance.uniform(math.log(0.02), math.log(3)))

        factors = [math.exp(chance.gauss(0, spread)) for _ in range(5)]

        def noisy(data: Change, factors: list[float] = factors) -> None:
            for launch, factor in zip(data["launches"], factors, strict=True):
                for each in launch["rounds"]:
                    for name in ("ttft_p50_s", "tpot_p50_s", "e2e_p50_s", "output_tokens_per_s"):
                        each["metrics"][name] *= factor if name.endswith("0_s") else 1 / factor

        rewrite(judge.path, noisy)
        answer = judge(fail_inconclusive=True, max_launches=4)
        assert answer.verdict is not None
        assert not answer.verdict.status.green
        assert not answer.accepted
        if answer.verdict.status is Status.INCONCLUSIVE:
            assert answer.verdict.reasons[0].startswith("this baseline cannot find 5 %")


# ------------------------------------------------------------------------------------------------ every path of the file

REPLACEMENTS: tuple[Any, ...] = (
    ..., None, True, 0, -1, 1e-300, 1e300, 10**400, "", "odd/ttft_p50_s", [], {}, math.nan,
)  # fmt: skip
"""What stands in the place of a value; `...` takes its key away, too."""


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value in a JSON document, the document's own first."""
    if place:
        yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*place, key))


def mutated(document: Change, place: tuple[Any, ...], new: Any) -> str:
    changed = copy.deepcopy(document)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    if new is ...:
        del parent[place[-1]]
    else:
        parent[place[-1]] = new
    return json.dumps(changed)


def survive(judge: Judge, text: str) -> None:
    """Assert that a file makes nobody raise anything, and no slow engine pass."""
    judge.path.write_text(text)
    answer = judge()
    assert answer.verdict is not None
    assert not answer.verdict.status.green, f"{answer.verdict.status}: {text}"


def documents(text: str, *, older: bool) -> Change:
    document: Change = json.loads(text)
    if older:
        document["version"] = 2
        del document["checksum"], document["lacking"]
    return document


@pytest.mark.parametrize("older", [False, True], ids=["format 3", "format 2"])
@pytest.mark.fault(BAD_INPUT, "baseline with one value of it replaced or removed")
def test_no_value_of_a_file_can_be_replaced_for_a_pass(judge: Judge, attempts: Attempts, older: bool) -> None:
    document = documents(judge.path.read_text(), older=older)
    middle = range(1, len(document["launches"]) - 1)  # launches are alike: the first and the last stand for the others
    wanted = (place for place in places(document) if place[0] != "launches" or len(place) == 1 or place[1] not in middle)
    changes = [(place, new) for place in wanted for new in REPLACEMENTS]
    for chance in attempts(quick=750, full=len(changes)):
        number = attempts.tried - 1
        place, new = changes[number] if attempts.is_full else chance.choice(changes)
        survive(judge, mutated(document, place, new))


@pytest.mark.fault(BAD_INPUT, "baseline with several values of it replaced or removed")
def test_no_values_of_a_file_can_be_replaced_together_for_a_pass(judge: Judge, attempts: Attempts) -> None:
    whole = documents(judge.path.read_text(), older=True)
    for chance in attempts(quick=100, full=3000):
        document = whole
        for _ in range(chance.randint(2, 6)):
            document = json.loads(mutated(document, chance.choice(list(places(document))), chance.choice(REPLACEMENTS)))
        survive(judge, json.dumps(document))


@pytest.mark.fault(BAD_INPUT, "damaged baseline met by a recording, and by the self-test")
def test_a_damaged_file_can_be_recorded_over_and_tested(judge: Judge, attempts: Attempts) -> None:
    document = documents(judge.path.read_text(), older=True)
    changes = [(place, new) for place in places(document) for new in REPLACEMENTS if "rounds" not in place]
    for chance in attempts(quick=60, full=1000):
        place, new = chance.choice(changes)
        judge.path.write_text(mutated(document, place, new))
        assert judge(update="all", launches=len(judge.slow)).verdict is not None
        assert self_tested(judge.rules(), judge.test).outcome in ("passed", "failed")
