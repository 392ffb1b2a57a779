"""The plan: what may be asked for, and that engine arguments survive the way from text to command line."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import AXES, Axes, grid, is_selected
from pytest_llmperf.plan.checks import PlanError, degree, parse_fraction
from pytest_llmperf.plan.engine import (
    EngineArgs,
    EngineSpec,
    check_url,
    command_line,
    engine_spec,
    merge_engine_args,
    parse_engine_args,
)
from pytest_llmperf.plan.files import File
from pytest_llmperf.plan.lengths import Pairs
from pytest_llmperf.plan.marker import parse_marker
from pytest_llmperf.plan.traffic import WarmUp
from pytest_llmperf.plan.workload import RequestClass, Workload

# ------------------------------------------------------------------------------------------------ degrees


@pytest.mark.parametrize("value", [1, 2, 8, "4", " 4 ", "+3"])
def test_a_degree_is_a_whole_number_from_one(value: object) -> None:
    assert degree("--llmperf-tp", value) == int(str(value))


@pytest.mark.parametrize("value", [0, -1, "0", "-1"])
def test_a_degree_below_one_is_refused_with_the_smallest_value(value: object) -> None:
    with pytest.raises(PlanError, match=r"^--llmperf-tp=-?\d+: the smallest value is 1; 1 means no parallelism$"):
        degree("--llmperf-tp", value)


@pytest.mark.parametrize("value", ["two", "", True, False, None, 1.5, "1.0", [1], "1,2", "0x2", "1e3"])
def test_a_degree_that_is_no_whole_number_is_refused(value: object) -> None:
    with pytest.raises(PlanError) as refused:
        degree("--llmperf-tp", value)
    assert str(refused.value) == f"--llmperf-tp={value!r}: must be a whole number such as 1, 2 or 4"


def test_no_parallelism_is_mentioned_for_degrees_only() -> None:
    with pytest.raises(PlanError, match=r"^concurrency=0: the smallest value is 1$"):
        degree("concurrency", 0)


# ------------------------------------------------------------------------------------------------ engine arguments

names = st.sampled_from(["max-num-seqs", "seed", "x1", "hf-overrides", "hf-overrides.a", "compilation-config.level"])
words = st.one_of(
    st.text("aZ09_./:%+=-'\" \\", max_size=8).filter(lambda word: not re.match("--?[A-Za-z]", word)),
    st.integers(-1000, 1000).map(str),
    st.floats(-1, 1).map(str),
    st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2).map(json.dumps),
)
arguments: st.SearchStrategy[EngineArgs] = st.dictionaries(names, st.lists(words, max_size=3).map(tuple), max_size=5).map(
    lambda found: tuple(sorted(found.items()))
)


@settings(deadline=None)
@given(arguments)
def test_the_words_of_a_command_line_are_parsed_back_into_the_arguments(args: EngineArgs) -> None:
    assert parse_engine_args(command_line(args), origin="x") == args


@settings(deadline=None)
@given(arguments)
def test_a_quoted_command_line_is_parsed_back_into_the_arguments(args: EngineArgs) -> None:
    assert parse_engine_args(shlex.join(command_line(args)), origin="x") == args


@settings(deadline=None)
@given(arguments)
def test_a_mapping_means_the_same_as_the_command_line(args: EngineArgs) -> None:
    mapping: dict[str, Any] = {name: list(values) or True for name, values in args}
    assert parse_engine_args(mapping, origin="x") == args


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--max-num-seqs 64", (("max-num-seqs", ("64",)),)),
        ("--max-num-seqs=64", (("max-num-seqs", ("64",)),)),
        ("--max_num_seqs 64", (("max-num-seqs", ("64",)),)),
        ("--enforce-eager", (("enforce-eager", ()),)),
        ("--no-enable-prefix-caching --seed 1", (("no-enable-prefix-caching", ()), ("seed", ("1",)))),
        ("--seed -1", (("seed", ("-1",)),)),
        ("--rope-scale -0.5 -.5 -1e-3", (("rope-scale", ("-0.5", "-.5", "-1e-3")),)),
        ("--hf-overrides '{\"a\": -1}'", (("hf-overrides", ('{"a": -1}',)),)),
        ('--hf-overrides=\'{"a": "b=c"}\'', (("hf-overrides", ('{"a": "b=c"}',)),)),
        ("--limit 1 --limit 2", (("limit", ("2",)),)),
        ("-q fp8", (("q", ("fp8",)),)),
        ("", ()),
    ],
)
def test_a_command_line_is_read_as_vllm_reads_it(text: str, expected: EngineArgs) -> None:
    assert parse_engine_args(text, origin="x") == expected


def test_only_the_name_before_the_first_dot_has_its_underscores_replaced() -> None:
    # vLLM's FlexibleArgumentParser: what follows the dot is a field's name.
    args = parse_engine_args("--compilation_config.cudagraph_mode FULL", origin="x")
    assert command_line(args) == ["--compilation-config.cudagraph_mode", "FULL"]


@pytest.mark.parametrize("words", [["-q", "fp8"], ["-ep"], ["-O3"], ["-sc", "{}"]])
def test_a_short_option_keeps_its_one_dash(words: list[str]) -> None:
    assert command_line(parse_engine_args(words, origin="x")) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, ["--thing"]),
        (False, ["--no-thing"]),
        (None, []),
        (3, ["--thing", "3"]),
        (-1, ["--thing", "-1"]),
        (0.5, ["--thing", "0.5"]),
        ("", ["--thing", ""]),
        (["a", 2], ["--thing", "a", "2"]),
        ({"b": {"c": True}, "a": None}, ["--thing", '{"a": null, "b": {"c": true}}']),
    ],
)
def test_a_mapping_has_flags_negated_flags_lists_and_json(value: object, words: list[str]) -> None:
    assert command_line(parse_engine_args({"thing": value}, origin="x")) == words


@pytest.mark.parametrize("key", ["max_num_seqs", "max-num-seqs", "--max-num-seqs"])
def test_a_mapping_takes_every_spelling_of_a_name(key: str) -> None:
    assert parse_engine_args({key: 4}, origin="x") == (("max-num-seqs", ("4",)),)


@pytest.mark.parametrize(
    ("argument", "option"),
    [
        ("--model x", "--llmperf-model"),
        ("--tensor-parallel-size 2", "--llmperf-tp"),
        ("--tensor_parallel_size=2", "--llmperf-tp"),
        ("-tp 2", "--llmperf-tp"),
        ("-pp=2", "--llmperf-pp"),
        ("--pipeline-parallel-size 2", "--llmperf-pp"),
        ("--data-parallel-size 2", "--llmperf-dp"),
        ("--host ::", "--llmperf-url"),
        ("--port 1", "--llmperf-url"),
        ("--served-model-name x", "--llmperf-model"),
    ],
)
def test_an_argument_that_the_plugin_sets_names_the_option(argument: str, option: str) -> None:
    with pytest.raises(PlanError, match=f"^llm_engine_args: --[a-z-]+ is set by the plugin; use {option} instead$"):
        parse_engine_args(argument, origin="llm_engine_args")


def test_a_reserved_name_is_refused_in_a_mapping_too() -> None:
    with pytest.raises(PlanError, match="--llmperf-tp"):
        parse_engine_args({"tensor_parallel_size": 2}, origin="x")


def test_a_word_before_the_first_argument_is_refused() -> None:
    with pytest.raises(PlanError, match=r"^x: '64' is not an engine argument"):
        parse_engine_args("64 --max-num-seqs", origin="x")


def test_an_open_quote_is_refused_with_the_text() -> None:
    with pytest.raises(PlanError, match="No closing quotation; quote it as on a shell command line"):
        parse_engine_args("--x 'y", origin="x")


@pytest.mark.parametrize(
    ("earlier", "later", "expected"),
    [
        ("--seed 1 --top 2", "--top 3", "--seed 1 --top 3"),
        ("--eager", "--no-eager", "--no-eager"),
        ("--no-eager", "--eager", "--eager"),
        ("--seed 1", "", "--seed 1"),
        ("", "--seed 1", "--seed 1"),
    ],
)
def test_a_later_layer_wins(earlier: str, later: str, expected: str) -> None:
    merged = merge_engine_args(parse_engine_args(earlier, origin="x"), parse_engine_args(later, origin="x"))
    assert " ".join(command_line(merged)) == expected


@pytest.mark.parametrize(("text", "expected"), [("--no-eager --eager", "--eager"), ("--eager --no-eager", "--no-eager")])
def test_the_later_of_a_flag_and_its_negation_wins_within_one_text(text: str, expected: str) -> None:
    assert command_line(merge_engine_args(parse_engine_args(text, origin="x"))) == [expected]


@settings(deadline=None)
@given(arguments, arguments, arguments)
def test_merging_is_associative_and_idempotent(a: EngineArgs, b: EngineArgs, c: EngineArgs) -> None:
    assert merge_engine_args(a, a) == merge_engine_args(a) == a
    assert merge_engine_args(merge_engine_args(a, b), c) == merge_engine_args(a, merge_engine_args(b, c))


# ------------------------------------------------------------------------------------------------ engine and workload


@pytest.mark.parametrize("name", ["tp", "pp", "dp"])
@pytest.mark.parametrize("value", [0, -1, "two", True, 1.5])
def test_an_engine_has_no_unusable_degree(name: str, value: Any) -> None:
    with pytest.raises(PlanError, match=f"^{name}="):
        EngineSpec(**{name: value})


def test_an_engine_occupies_tp_times_pp_times_dp_devices() -> None:
    assert EngineSpec(tp=2, pp=3, dp=4).ranks == 24


def test_an_engine_is_of_a_known_kind() -> None:
    with pytest.raises(PlanError, match=r"^engine='sever': must be one of server, offline, url, command, simulated$"):
        EngineSpec(kind="sever")


def test_a_url_engine_needs_a_url() -> None:
    with pytest.raises(PlanError, match=r"^url='': not a URL"):
        EngineSpec(kind="url")


@pytest.mark.parametrize(
    ("model", "short"),
    [("tiny", "tiny"), ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5_7B_Instruct"), ("/models/llama/", "llama"), ("/", "model")],
)
def test_the_short_name_of_a_model_fits_a_test_id(model: str, short: str) -> None:
    assert EngineSpec(model=model).short_model == short


@pytest.mark.parametrize("name", ["prompt_tokens", "output_tokens", "requests", "concurrency"])
@pytest.mark.parametrize("value", [0, -1, "many", True, 1.5, None])
def test_a_workload_has_no_unusable_count(name: str, value: Any) -> None:
    with pytest.raises(PlanError, match=f"^{name}="):
        Workload(**{name: value})


def test_more_concurrency_than_requests_is_refused_because_it_is_never_reached() -> None:
    with pytest.raises(PlanError, match=r"^requests=4: fewer than concurrency=8, which could never be reached"):
        Workload(requests=4, concurrency=8)


@pytest.mark.parametrize(("kind", "name"), [(EngineSpec, "tp"), (Workload, "prompt_tokens"), (Workload, "requests")])
def test_a_number_given_as_text_is_kept_as_a_number_or_refused(kind: type, name: str) -> None:
    try:
        made = kind(**{name: "64"})
    except PlanError:
        return
    assert type(getattr(made, name)) is int


counts = st.integers(1, 64)
workloads = st.builds(
    Workload,
    prompt_tokens=counts,
    output_tokens=counts,
    requests=st.integers(64, 128),
    concurrency=counts,
    seed=st.integers(0, 5),
)


@settings(deadline=None)
@given(workloads, workloads)
def test_fingerprints_are_equal_exactly_where_the_workloads_are(one: Workload, other: Workload) -> None:
    assert (one.fingerprint == other.fingerprint) == (one == other)


FILE = File("a.jsonl", "0" * 64)
OTHER: dict[str, Any] = {
    "rate": (2.0,), "arrivals": "constant", "trace": FILE, "speed": 2.0, "classes": (RequestClass("a", 1.0, 1, 1),),
    "pairs": Pairs(((1, 2),)), "max_prompt_tokens": 9, "block_tokens": 64, "trace_unit": "us", "max_concurrency": 3,
    "duration_s": 9.0, "think_s": 2.5, "warm_up": WarmUp(9), "dataset": FILE,
    "api": "chat", "stream": False, "extra_body": '{"top_p": 1}', "lora": ("a",), "slo": (("e2e_s", 1.0),),
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(Workload) if field.name != "tolerated_failures"])
def test_every_field_of_what_is_sent_is_in_the_fingerprint(name: str) -> None:
    needed: dict[str, dict[str, Any]] = {
        **{part: {"rate": (2.0,)} for part in ("arrivals", "max_concurrency")},
        **{part: {"trace": FILE} for part in ("speed", "block_tokens", "trace_unit")},
        "dataset": {"api": "chat"},
        "max_prompt_tokens": {"dataset": FILE},
        "turns": {"concurrency": 2},
        "think_s": {"turns": 2, "concurrency": 2},
    }
    workload = Workload(**needed.get(name, {}))
    changed = replace(workload, **{name: OTHER[name] if name in OTHER else getattr(workload, name) + 1})
    assert changed.fingerprint != workload.fingerprint


def test_how_many_failures_are_tolerated_changes_nothing_of_what_is_sent() -> None:
    tolerant = Workload(tolerated_failures=0.01)
    assert tolerant.fingerprint == Workload().fingerprint
    assert tolerant.description["tolerated_failures"] == 0.01


def test_a_fingerprint_is_sixteen_hex_digits() -> None:
    assert re.fullmatch("[0-9a-f]{16}", Workload().fingerprint)


def test_a_call_wins_over_the_fixture_and_the_fixture_over_the_axes() -> None:
    workload = workload_from(Axes(concurrency=4), {"prompt_tokens": 10, "seed": 1}, {"seed": 2})
    assert workload == Workload(prompt_tokens=10, concurrency=4, seed=2)


def test_by_default_as_many_requests_are_sent_as_run_at_once() -> None:
    assert workload_from(Axes(concurrency=100)).requests == 100


def test_an_unknown_workload_argument_is_named_with_those_that_exist() -> None:
    with pytest.raises(PlanError, match=r"^llmperf\(output=\.\.\.\): unknown workload argument; known are prompt_tokens, "):
        workload_from(Axes(), {"output": 1})


# ------------------------------------------------------------------------------------------------ marker and grid


def test_a_grid_is_the_product_of_what_the_marker_allows() -> None:
    points = grid({"tp": (1, 2), "concurrency": (4, 8)}, {})
    assert [(one.tp, one.concurrency) for one in points] == [(1, 4), (1, 8), (2, 4), (2, 8)]


def test_an_axis_that_the_marker_leaves_open_has_the_selected_values() -> None:
    assert [one.tp for one in grid({}, {"tp": (2, 4)})] == [2, 4]


def test_a_selection_does_not_add_to_what_the_marker_allows() -> None:
    points = grid({"tp": (1, 2)}, {"tp": (2, 4)})
    assert [(one.tp, is_selected(one, {"tp": (2, 4)})) for one in points] == [(1, False), (2, True)]


def test_without_a_marker_or_a_selection_there_is_one_default_point() -> None:
    assert grid({}, {}) == [Axes()]


axis_values = st.dictionaries(
    st.sampled_from(AXES[1:5]), st.lists(st.integers(1, 8), min_size=1, max_size=3, unique=True).map(tuple), max_size=3
)


@settings(deadline=None)
@given(axis_values, axis_values)
def test_every_selected_point_is_allowed_and_selected(
    allowed: dict[str, tuple[int, ...]], selected: dict[str, tuple[int, ...]]
) -> None:
    points = grid(dict(allowed), selected)
    chosen = {one for one in points if is_selected(one, selected)}
    expected = 1
    for name in allowed.keys() | selected.keys():
        both = set(allowed.get(name) or selected[name]) & set(selected.get(name) or allowed[name])
        expected *= len(both)
    assert len(points) == len(set(points))
    assert len(chosen) == expected


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (Axes(), "tiny-tp1-c8"),
        (Axes(tp=2, pp=2), "tiny-tp2-pp2-c8"),
        (Axes(model="Qwen/Qwen2.5-7B", dp=2, concurrency=64), "Qwen2.5_7B-tp1-dp2-c64"),
        (Axes(endpoint="prod", concurrency=16), "prod-c16"),
    ],
)
def test_a_points_id_never_changes_because_it_names_baseline_files(axes: Axes, expected: str) -> None:
    assert axes.id == expected


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_different_points_have_different_ids(tp: int, pp: int, dp: int, concurrency: int) -> None:
    axes = Axes(tp=tp, pp=pp, dp=dp, concurrency=concurrency)
    for name in ("tp", "pp", "dp", "concurrency"):
        assert replace(axes, **{name: getattr(axes, name) + 1}).id != axes.id


def test_a_spec_has_the_points_degrees_and_the_merged_arguments() -> None:
    base = EngineSpec(kind="simulated", args=(("a", ("1",)),), env=(("X", "1"),))
    spec = engine_spec(base, Axes(model="m", tp=2), (("a", ("2",)),), (("b", ()),))
    assert spec == EngineSpec(model="m", tp=2, kind="simulated", args=(("a", ("2",)), ("b", ())), env=(("X", "1"),))


def test_a_marker_takes_single_values_and_lists() -> None:
    marker = parse_marker({"tp": [1, "2"], "concurrency": 4, "model": "m", "engine_args": {"a": 1}, "tolerance": "8 %"})
    assert marker.axes == {"tp": (1, 2), "concurrency": (4,), "model": ("m",)}
    assert marker.engine_args == (("a", ("1",)),)
    assert marker.tolerance == pytest.approx(0.08)


@pytest.mark.parametrize("kind", ["server", "offline"])
def test_a_marker_may_say_what_kind_of_engine(kind: str) -> None:
    assert parse_marker({"engine": kind}).kind == kind


@pytest.mark.parametrize("kind", ["url", "simulated", "of", "", 1])
def test_a_marker_refuses_kinds_that_no_test_may_choose(kind: object) -> None:
    with pytest.raises(PlanError, match=rf"^llmperf\(engine={kind!r}\): must be one of server, offline$"):
        parse_marker({"engine": kind})


def test_a_marker_refuses_an_unknown_argument_by_name() -> None:
    with pytest.raises(PlanError, match=r"^llmperf\(tpp=\.\.\.\): unknown marker argument; known are model, tp"):
        parse_marker({"tpp": 1})


def test_a_test_can_not_choose_the_gpus_of_its_engine() -> None:
    with pytest.raises(PlanError, match=r"CUDA_VISIBLE_DEVICES is not the test's to set, .*; set it for the whole run"):
        parse_marker({"env": {"CUDA_VISIBLE_DEVICES": 3}})


def test_a_marker_refuses_an_empty_list() -> None:
    with pytest.raises(PlanError, match=r"^llmperf\(tp=\.\.\.\): an empty list allows nothing"):
        parse_marker({"tp": []})


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", 5), ("model", [None]), ("engine_args", 5), ("engine_args", {1: 2}), ("engine_args", [1])],
)
def test_a_marker_argument_of_a_wrong_type_is_a_plan_error(name: str, value: object) -> None:
    with pytest.raises(PlanError, match=name):
        parse_marker({name: value})


# ------------------------------------------------------------------------------------------------ fractions and URLs


@pytest.mark.parametrize(
    ("value", "share"), [(0.05, 0.05), ("0.05", 0.05), ("5%", 0.05), ("5 %", 0.05), (" 12.5 % ", 0.125), ("0.5%", 0.005)]
)
def test_a_share_is_a_fraction_or_a_percentage(value: object, share: float) -> None:
    assert parse_fraction("tolerance", value) == pytest.approx(share)


@pytest.mark.parametrize("value", [0, 1, 5, -0.1, "0%", "100%", "five", "", "%", "nan", "inf", True, None, [0.1]])
def test_a_share_outside_nought_and_one_is_refused_by_name(value: object) -> None:
    with pytest.raises(PlanError) as refused:
        parse_fraction("--llmperf-tolerance", value)
    assert str(refused.value) == f"--llmperf-tolerance={value!r}: must be a share between 0 and 1, e.g. 0.05 or '5 %'"


@settings(deadline=None)
@given(st.floats(1e-6, 0.999999))
def test_every_share_means_itself(share: float) -> None:
    assert parse_fraction("x", share) == parse_fraction("x", repr(share)) == share


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://h:8000", "http://h:8000"),
        ("http://h:8000/", "http://h:8000"),
        ("http://h:8000/v1", "http://h:8000"),
        ("http://h:8000/v1/", "http://h:8000"),
        ("https://h/proxy/v1", "https://h/proxy"),
        ("http://[::1]:80", "http://[::1]:80"),
    ],
)
def test_an_endpoint_is_known_by_its_root(url: str, root: str) -> None:
    assert check_url(url, origin="--llmperf-url") == root


@pytest.mark.parametrize(
    "url",
    ["", "h:8000", "ftp://h", "http://", "http://:80", "http://h:x", "http://h:0", "http://h:99999", "http://[::1", "http://h h"],
)
def test_what_is_no_endpoint_is_refused_by_name_and_value(url: str) -> None:
    with pytest.raises(PlanError) as refused:
        check_url(url, origin="--llmperf-url")
    assert str(refused.value).startswith(f"--llmperf-url={url!r}: not a URL of an OpenAI-compatible server")


@settings(deadline=None)
@given(st.text(max_size=20))
def test_a_url_is_taken_or_refused_but_never_breaks(text: str) -> None:
    try:
        root = check_url(text, origin="url")
    except PlanError:
        return
    assert root.startswith(("http://", "https://"))


@pytest.mark.parametrize(
    ("allowed", "selected", "ids"),
    [
        ({}, {}, ["tiny-tp1-c8"]),
        ({"rate": (2.5,)}, {}, ["tiny-tp1-r2.5"]),
        ({}, {"rate": (2.0, 4.0)}, ["tiny-tp1-r2", "tiny-tp1-r4"]),
        ({}, {"rate": (2.0,), "concurrency": (3,)}, ["tiny-tp1-c3", "tiny-tp1-r2"]),
        ({"concurrency": (1, 2), "rate": (2.0,)}, {}, ["tiny-tp1-c1", "tiny-tp1-c2", "tiny-tp1-r2"]),
        ({"concurrency": (1, 2), "rate": (2.0,)}, {"concurrency": (2,)}, ["tiny-tp1-c2"]),
        ({"concurrency": (1, 2), "rate": (2.0, 4.0)}, {"rate": (4.0,)}, ["tiny-tp1-r4"]),
        ({"concurrency": (1,)}, {"rate": (4.0,)}, []),
        ({"rate": (4.0,)}, {"concurrency": (1,)}, []),
    ],
)
def test_a_rate_and_a_concurrency_are_two_forms_of_one_axis(
    allowed: dict[str, tuple[Any, ...]], selected: dict[str, tuple[Any, ...]], ids: list[str]
) -> None:
    assert [one.id for one in grid(allowed, selected) if is_selected(one, selected)] == ids


# ------------------------------------------------------------------------------------------------ environments


@pytest.mark.parametrize(
    "value", [r"[^\x00-\x7f]", "C:\\x00", "<int", "", 4, 0.5, True, np.int64(4), np.float32(0.5), Decimal("0.1"), Path("x")]
)
def test_an_environment_holds_texts_numbers_and_paths(value: object) -> None:
    assert parse_marker({"env": {"A": value}}).env == (("A", str(value)),)


@pytest.mark.parametrize(
    "value", ["a\0b", "\ud800", Path("\0"), 10**5_000, None, b"x", ["x"]], ids=lambda value: type(value).__name__
)
def test_what_no_environment_can_hold_is_refused(value: object) -> None:
    with pytest.raises(PlanError, match=r"llmperf\(env=\{'A': \.\.\.\}\): must be a name and a text or a number"):
        parse_marker({"env": {"A": value}})
