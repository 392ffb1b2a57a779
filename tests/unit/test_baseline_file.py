"""Baseline files: what is written is read back, nothing else is taken for a baseline, and no write leaves half a file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_llmperf.judge import baseline as store
from pytest_llmperf.judge.baseline import Baseline, BaselineError
from pytest_llmperf.judge.provenance import Provenance, engine_facts
from pytest_llmperf.measure.measurement import Launch, Round
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.engine import EngineSpec, parse_engine_args
from pytest_llmperf.plan.workload import Workload

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

WORKLOAD = {"prompt_tokens": 100, "output_tokens": 50, "requests": 32, "concurrency": 8, "seed": 0}

STORED = Baseline(
    case_id="tests/test_chat.py::test_chat[tiny-tp1-c8]",
    host="nvidia-h200",
    workload=WORKLOAD,
    workload_fingerprint="0123456789abcdef",
    provenance=Provenance({"kind": "server", "tp": 1, "env": {}}, {"vllm": "0.32.0"}, {"cores": 2, "gpus": ["H200"]}, "abc123+"),
    launches=(
        Launch(
            id="1f",
            started="2026-11-21T08:00:00+00:00",
            rounds=(Round({"ttft_p50_s": 0.05, "preemptions": None}), Round({"ttft_p50_s": 0.06, "preemptions": 29.0})),
            metrics={"kv_cache_tokens": 4096.0, "startup_s": None},
            dropped_rounds=1,
            versions={"vllm": "0.32.0"},
            job="20261121-1",
        ),
    ),
    noise={"ttft_p50_s": {"round_sd": 0.5, "job_sd": None}},
)

numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
metric_values = st.dictionaries(st.text(max_size=6), numbers, max_size=4)
facts = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)
texts = st.text(max_size=8)
versions = st.dictionaries(texts, texts, max_size=3)
launches = st.builds(
    Launch,
    id=texts,
    started=texts,
    rounds=st.lists(st.builds(Round, metric_values), min_size=1, max_size=3).map(tuple),
    metrics=metric_values,
    dropped_rounds=st.integers(0, 3),
    invalid=st.just(()),
    versions=versions,
    job=texts,
)
baselines = st.builds(
    Baseline,
    case_id=texts,
    host=texts,
    workload=facts,
    workload_fingerprint=texts,
    provenance=st.builds(Provenance, facts, versions, facts, st.none() | texts),
    launches=st.lists(launches, min_size=1, max_size=3).map(tuple),
    formulas=st.integers(1, 9),
    noise=st.dictionaries(texts, metric_values, max_size=3),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nvidia-h200" / "case.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one folder for all examples of a property."""
    return tmp_path_factory.mktemp("baselines")


def written(path: Path, change: dict[str, Any]) -> Path:
    """Write a sound baseline in which some fields are other ones, or are left out where the value is `...`."""
    data = {**json.loads(store.dump(STORED)), **change}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}))
    return path


# ------------------------------------------------------------------------------------------------ round trip


@settings(PATIENT, max_examples=60)
@given(baselines)
def test_what_is_saved_is_loaded(folder: Path, stored: Baseline) -> None:
    store.save(folder / "one.json", stored)
    assert store.load(folder / "one.json") == stored


@settings(PATIENT, max_examples=40)
@given(baselines)
def test_the_text_is_json_and_the_same_again(folder: Path, stored: Baseline) -> None:
    text = store.dump(stored)
    (folder / "two.json").write_text(text)
    loaded = store.load(folder / "two.json")
    assert loaded is not None
    assert json.loads(text)["version"] == store.VERSION
    assert store.dump(loaded) == text


def test_a_file_has_a_line_for_each_field_and_each_round() -> None:
    expected = """\
{
  "case": "tests/test_chat.py::test_chat[tiny-tp1-c8]",
  "checksum": "CHECKSUM",
  "formulas": 2,
  "host": "nvidia-h200",
  "lacking": {"preemptions": "not measured in 1 of 1 launches"},
  "noise": {"ttft_p50_s": {"job_sd": null, "round_sd": 0.5}},
  "provenance": {"commit": "abc123+", "engine": {"env": {}, "kind": "server", "tp": 1}, \
"host": {"cores": 2, "gpus": ["H200"]}, "versions": {"vllm": "0.32.0"}},
  "version": 3,
  "workload": {"concurrency": 8, "output_tokens": 50, "prompt_tokens": 100, "requests": 32, "seed": 0},
  "workload_fingerprint": "0123456789abcdef",
  "launches": [
    {"dropped_rounds": 1, "id": "1f", "job": "20261121-1", "metrics": {"kv_cache_tokens": 4096.0, "startup_s": null}, \
"started": "2026-11-21T08:00:00+00:00", "versions": {"vllm": "0.32.0"}, "rounds": [
      {"metrics": {"preemptions": null, "ttft_p50_s": 0.05}},
      {"metrics": {"preemptions": 29.0, "ttft_p50_s": 0.06}}
    ]}
  ]
}
"""
    lacking = {"preemptions": "not measured in 1 of 1 launches"}
    assert re.sub(r'"[0-9a-f]{16}",\n  "form', '"CHECKSUM",\n  "form', store.dump(replace(STORED, lacking=lacking))) == expected


VERSION_1 = """\
{
  "case": "tests/test_chat.py::test_chat[tiny-tp1-c8]",
  "formulas": 1,
  "host": "nvidia-h200",
  "provenance": {"commit": null, "engine": {"kind": "server"}, "host": {}, "versions": {}},
  "version": 1,
  "workload": {"concurrency": 8, "output_tokens": 50, "prompt_tokens": 100, "requests": 32, "seed": 0},
  "workload_fingerprint": "0123456789abcdef",
  "launches": [
    {"dropped_rounds": 0, "id": "1f", "metrics": {"kv_cache_tokens": 4096.0}, \
"started": "2026-11-21T08:00:00+00:00", "versions": {"vllm": "0.32.0"}, "rounds": [
      {"metrics": {"ttft_p50_s": 0.05}}
    ]}
  ]
}
"""


def test_version_1_is_read_as_one_job_and_written_as_version_3(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(VERSION_1)
    stored = store.load(path)
    assert stored is not None
    assert (stored.launches[0].job, stored.jobs, stored.noise, stored.formulas) == ("", 1, {}, 1)
    assert stored.launches[0].values("ttft_p50_s") == [0.05]
    store.save(path, stored)
    assert json.loads(path.read_text())["version"] == 3
    assert store.load(path) == stored


@settings(PATIENT, max_examples=40)
@given(baselines)
def test_what_later_versions_added_may_be_missing(folder: Path, stored: Baseline) -> None:
    data = json.loads(store.dump(stored)) | {"version": 1}
    del data["noise"], data["checksum"], data["lacking"]
    for launch in data["launches"]:
        del launch["job"]
    (folder / "four.json").write_text(json.dumps(data))
    launches = tuple(replace(launch, job="") for launch in stored.launches)
    assert store.load(folder / "four.json") == replace(stored, noise={}, launches=launches)


def test_a_case_without_a_file_has_no_baseline(path: Path) -> None:
    assert store.load(path) is None


def test_the_arguments_of_an_engine_are_stored_as_its_command_line() -> None:
    spec = EngineSpec(tp=2, args=parse_engine_args("--max-num-seqs 64 --enforce-eager", origin="x"), env=(("A", "1"),))
    assert engine_facts(Case("x", spec, Workload())) == {
        "kind": "server", "model": "tiny", "tp": 2, "pp": 1, "dp": 1,
        "args": "--enforce-eager --max-num-seqs 64", "env": {"A": "1"},
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ more launches


def of_jobs(*jobs: str) -> Baseline:
    return replace(STORED, launches=tuple(replace(STORED.launches[0], id=str(n), job=job) for n, job in enumerate(jobs)))


@settings(PATIENT)
@given(st.integers(1, 100), st.integers(1, 100))
def test_new_launches_come_behind_the_stored_ones_and_the_oldest_go(old: int, new: int) -> None:
    found = [
        launch.job for launch in store.extended(of_jobs(*map(str, range(old))), of_jobs(*(f"n{n}" for n in range(new)))).launches
    ]
    everything = [*map(str, range(old)), *(f"n{n}" for n in range(new))]
    assert found == everything[-len(found) :]
    assert len(found) == min(store.MOST_LAUNCHES, old + new)


def test_everything_but_the_launches_and_a_calibrations_noise_is_the_new_ones() -> None:
    new = replace(STORED, provenance=Provenance({}, commit="new"), noise={}, workload_fingerprint="f", formulas=9)
    found = store.extended(STORED, new)
    assert found == replace(new, launches=STORED.launches + new.launches, noise=STORED.noise)


def test_a_baselines_jobs_are_the_runs_that_measured_it() -> None:
    assert [of_jobs(*jobs).jobs for jobs in ("", "a", "aa", "aba", "abc")] == [0, 1, 1, 2, 3]


# ------------------------------------------------------------------------------------------------ unusable files


def refusal(path: Path) -> str:
    with pytest.raises(BaselineError) as refused:
        store.load(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert message.endswith("restore it from version control, or delete it and record anew with --update-baselines")
    return message


@pytest.mark.parametrize("version", [0, 4, "1", "2", None, [2], True, 2.5])
def test_another_format_version_is_refused_with_both_versions(path: Path, version: object) -> None:
    assert f"format version {version!r}, this plugin reads up to 3" in refusal(written(path, {"version": version}))


@pytest.mark.parametrize(
    "content",
    [b"", b"not json", b"<<<<<<< HEAD\n{}", b"[]", b"null", b"5", b'"text"', b"{}", b"\xff\xfe{}", b"[" * 100_000],
    ids=lambda content: repr(content[:12]),
)
def test_a_file_that_is_no_baseline_is_refused(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    refusal(path)


def test_a_file_that_was_cut_is_refused_at_every_length(path: Path) -> None:
    text = store.dump(STORED).rstrip()
    path.parent.mkdir()
    for length in range(0, len(text), 7):
        path.write_text(text[:length])
        refusal(path)


@pytest.mark.parametrize(
    "name", ["version", "case", "host", "workload", "workload_fingerprint", "provenance", "launches", "formulas"]
)
def test_a_missing_field_is_refused_by_its_name(path: Path, name: str) -> None:
    assert name in refusal(written(path, {name: ...}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("case", None), ("case", 5), ("host", []), ("workload_fingerprint", 5),
        ("workload", 5), ("workload", "text"), ("workload", []), ("workload", None),
        ("formulas", "one"), ("formulas", None), ("formulas", 1.5), ("formulas", True),
        ("provenance", 5), ("provenance", None), ("provenance", {}), ("provenance", {"engine": {}, "unknown": 1}),
        ("provenance", {"engine": 5}), ("provenance", {"engine": {}, "versions": None}),
        ("provenance", {"engine": {}, "host": 5}),
        ("noise", None), ("noise", 5), ("noise", {"ttft_p50_s": 5}), ("noise", {"ttft_p50_s": {"round_sd": "low"}}),
        ("launches", None), ("launches", 5), ("launches", {}), ("launches", "text"), ("launches", [5]), ("launches", [{}]),
    ],
)  # fmt: skip
def test_a_field_of_a_wrong_type_is_refused(path: Path, name: str, value: object) -> None:
    refusal(written(path, {name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rounds", None), ("rounds", []), ("rounds", [5]), ("rounds", [{}]), ("rounds", [{"metrics": [1]}]),
        ("rounds", [{"metrics": {"ttft_p50_s": "0.05"}}]), ("rounds", [{"metrics": {"ttft_p50_s": True}}]),
        ("rounds", [{"metrics": {"ttft_p50_s": [0.05]}}]), ("rounds", [{"metrics": {"ttft_p50_s": 10**400}}]),
        ("metrics", None), ("metrics", 5), ("metrics", {"kv_cache_tokens": "many"}),
        ("dropped_rounds", None), ("dropped_rounds", "none"), ("versions", 5), ("versions", []),
        ("id", 5), ("started", None), ("job", 5), ("job", None),
    ],
)  # fmt: skip
def test_a_launch_with_a_field_of_a_wrong_type_is_refused(path: Path, name: str, value: object) -> None:
    launch = json.loads(store.dump(STORED))["launches"][0]
    refusal(written(path, {"launches": [{**launch, name: value}]}))


def test_a_baseline_without_launches_is_refused(path: Path) -> None:
    refusal(written(path, {"launches": []}))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_refused(path: Path, number: str) -> None:
    written(path, {})
    path.write_text(path.read_text().replace("0.05", number))
    refusal(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*WORKLOAD, "rounds", "metrics"]), inner),
    max_leaves=6,
)


@settings(PATIENT, max_examples=100)
@given(st.dictionaries(st.sampled_from([*json.loads(store.dump(STORED))]), json_values, max_size=3))
def test_a_file_is_loaded_or_refused_and_nothing_else_is_raised(folder: Path, change: dict[str, Any]) -> None:
    path = written(folder / "three.json", change)
    try:
        store.load(path)
    except BaselineError:
        return


# ------------------------------------------------------------------------------------------------ atomic


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saved(path: Path) -> tuple[Path, str]:
    store.save(path, STORED)
    return path, path.read_text()


NEW = replace(STORED, host="other")


def test_a_new_baseline_replaces_the_old_and_leaves_nothing_else(saved: tuple[Path, str]) -> None:
    path, _ = saved
    store.save(path, NEW)
    assert store.load(path) == NEW
    assert files(path.parent) == ["case.json"]


def test_a_failed_write_leaves_the_old_file_and_no_temporary(saved: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no space left on device")

    path, text = saved
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="no space left"):
        store.save(path, NEW)
    assert (path.read_text(), files(path.parent)) == (text, ["case.json"])


def test_a_write_that_is_interrupted_leaves_the_old_file_and_no_temporary(
    saved: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: Baseline) -> str:
        raise KeyboardInterrupt

    path, text = saved
    monkeypatch.setattr(store, "dump", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.save(path, NEW)
    assert (path.read_text(), files(path.parent)) == (text, ["case.json"])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["rounds", "metrics"])
def test_a_number_that_is_not_finite_is_never_written(saved: tuple[Path, str], number: float, where: str) -> None:
    path, text = saved
    change: dict[str, Any] = {"rounds": (Round({"ttft_p50_s": number}),), "metrics": {"kv_cache_tokens": number}}
    launch = replace(STORED.launches[0], **{where: change[where]})
    with pytest.raises(ValueError, match="JSON compliant"):
        store.save(path, replace(STORED, launches=(launch,)))
    assert (path.read_text(), files(path.parent)) == (text, ["case.json"])


def test_a_baseline_is_readable_by_everybody_as_version_control_wants_it(saved: tuple[Path, str]) -> None:
    assert saved[0].stat().st_mode & 0o777 == 0o644


def test_another_cases_file_is_not_touched(saved: tuple[Path, str]) -> None:
    path, text = saved
    store.save(path.with_name("other.json"), NEW)
    assert path.read_text() == text


# ------------------------------------------------------------------------------------------------ paths


@pytest.mark.parametrize(
    ("case_id", "expected"),
    [
        ("test_a.py::test_x", "test_a/test_x.json"),
        ("tests/perf/test_a.py::test_x[tiny-tp2-c8]", "tests/perf/test_a/test_x-tiny-tp2-c8.json"),
        ("test_a.py::TestChat::test_x", "test_a/TestChat.test_x.json"),
    ],
)
def test_a_cases_path_is_its_test_and_its_parameters(case_id: str, expected: str) -> None:
    assert store.path_for(Path("b"), "cpu-2c", case_id) == Path("b/cpu-2c") / expected


names = st.from_regex(r"[a-z][a-z_0-9]{0,4}", fullmatch=True)
folders = st.text("ab- ._", min_size=1, max_size=4).filter(lambda part: part not in (".", "..") and part.strip() == part)
parameters = st.text("ab[]:./\\ -#*?_=+\u00e9\u4e2d", max_size=6)
case_ids = st.builds(
    lambda parts, file, cls, test, parameter, number: (
        "/".join([*parts, f"test_{file}.py"])
        + (f"::Test{cls}" if cls else "")
        + f"::test_{test}"
        + (f"[{parameter}]" if parameter is not None else "")
        + (f"#{number}" if number else "")
    ),
    st.lists(folders, max_size=2),
    names,
    st.none() | names,
    names,
    st.none() | parameters,
    st.none() | st.integers(2, 3),
)


@settings(PATIENT, max_examples=300)
@given(case_ids)
def test_a_path_never_leaves_the_hosts_folder(case_id: str) -> None:
    folder = Path("/somewhere/baselines")
    path = store.path_for(folder, "cpu-2c", case_id)
    assert path.resolve().is_relative_to(folder / "cpu-2c")
    assert path.suffix == ".json"


@pytest.mark.parametrize("case_id", ["../test_a.py::test_x", "/etc/test_a.py::test_x", "a/../../../test_a.py::test_x[../../y]"])
def test_an_id_that_points_outside_stays_inside(case_id: str) -> None:
    folder = Path("/somewhere/baselines")
    assert store.path_for(folder, "cpu-2c", case_id).resolve().is_relative_to(folder / "cpu-2c")


def path_of(case_id: str) -> str:
    return str(store.path_for(Path("b"), "cpu-2c", case_id))


@settings(PATIENT, max_examples=100)
@given(st.lists(case_ids, unique=True, max_size=30))
def test_different_cases_have_different_paths(cases: list[str]) -> None:
    assert len({path_of(case_id) for case_id in cases}) == len(cases)


@settings(PATIENT, max_examples=100)
@given(st.lists(st.text("a:.-[]/#", max_size=4), unique=True, max_size=60))
def test_different_parameters_have_different_paths(found: list[str]) -> None:
    assert len({path_of(f"test_a.py::test_x[{one}]") for one in found}) == len(found)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("test_a.py::test_x[a]", "test_a.py::test_x[b]"),
        ("test_a.py::test_x[a/b]", "test_a.py::test_x[a-b]"),
        ("test_a.py::test_x[a::b]", "test_a.py::test_x[a.b]"),
        ("test_a.py::test_x[a[b]", "test_a.py::test_x[a-b]"),
        ("test_a.py::test_x", "test_a.py::test_x#2"),
        ("test_a.py::test_x[a]", "test_a.py::test_x[a]#2"),
        ("test_a.py::test_x[]", "test_a.py::test_x"),
        ("test_a.py::TestA::test_x", "test_a.py::test_x"),
        ("a b/test_a.py::test_x", "a-b/test_a.py::test_x"),
        ("a/test_a.py::test_x", "b/test_a.py::test_x"),
        ("../test_a.py::test_x", "test_a.py::test_x"),
        ("test_a.py::test_x[" + "y" * 200 + "1]", "test_a.py::test_x[" + "y" * 200 + "2]"),
    ],
)
def test_two_cases_never_share_a_file(one: str, other: str) -> None:
    assert path_of(one) != path_of(other)


@pytest.mark.parametrize("letter", ["y", "\u00e9", "\u4e2d"])
def test_a_long_name_fits_into_a_file_system(tmp_path: Path, letter: str) -> None:
    path = store.path_for(tmp_path, "cpu-2c", f"test_a.py::test_x[{letter * 300}]")
    store.save(path, STORED)
    assert store.load(path) == STORED


def test_a_baseline_with_doubts_is_not_stored_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a baseline with doubts is not stored again: it was edited by hand"):
        store.save(tmp_path / "a.json", replace(STORED, doubts=("it was edited by hand",)))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ unused


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a project with a test file, and the baselines of two of its tests and of a file that is gone."""
    (tmp_path / "test_a.py").touch()
    for case_id in ("test_a.py::test_x[c8]", "test_a.py::test_y", "test_gone.py::test_x"):
        store.save(store.path_for(tmp_path / "b", "cpu-2c", case_id), replace(STORED, case_id=case_id))
    return tmp_path


@pytest.mark.parametrize(
    ("collected", "gone"),
    [
        ([], ["test_gone/test_x"]),
        (["test_a.py::test_x[c8]", "test_a.py::test_y"], ["test_gone/test_x"]),
        (["test_a.py::test_x[c16]", "test_a.py::test_y"], ["test_gone/test_x"]),
        (["test_a.py::test_y"], ["test_a/test_x-c8", "test_gone/test_x"]),
    ],
    ids=["nothing collected", "all collected", "another parameter", "a test is gone"],
)
def test_a_baseline_is_unused_only_when_its_test_is_gone(project: Path, collected: list[str], gone: list[str]) -> None:
    found = store.unused(project / "b", "cpu-2c", project, collected)
    assert found == [project / "b" / "cpu-2c" / f"{name}.json" for name in gone]


def test_another_hosts_baselines_are_not_called_unused(project: Path) -> None:
    assert store.unused(project / "b", "nvidia-h200", project, []) == []


def test_the_heads_of_files_tell_whether_they_are_unused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formatted = store.path_for(project / "b", "cpu-2c", "test_gone.py::test_x")
    store.save(formatted.with_name("test_z.json"), replace(STORED, case_id="test_gone.py::test_z"))
    formatted.write_text(json.dumps(json.loads(formatted.read_text())))
    read: list[Path] = []
    load = store.load
    monkeypatch.setattr(store, "load", lambda path: read.append(path) or load(path))  # type: ignore[func-returns-value]
    found = store.unused(project / "b", "cpu-2c", project, ["test_a.py::test_y"])
    assert [path.name for path in found] == ["test_x-c8.json", "test_x.json", "test_z.json"]
    assert read == [formatted]


@pytest.mark.parametrize(("name", "used"), [("test_y-c8", True), ("test_y", True), ("test_yy-c8", False), ("test-y", False)])
def test_a_file_that_was_moved_is_used_where_a_test_begins_so(project: Path, name: str, used: bool) -> None:
    moved = project / "b" / "cpu-2c" / "test_a" / f"{name}.json"
    store.save(moved, replace(STORED, case_id="test_gone.py::test_x"))
    found = store.unused(project / "b", "cpu-2c", project, ["test_a.py::test_y", "test_a.py::test_x[c8]"])
    assert (moved not in found) is used
