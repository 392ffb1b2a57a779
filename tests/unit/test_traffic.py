"""Workloads from what a test writes: what is understood, what is refused, and that a fingerprint is of what is sent."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.fingerprint import fingerprint_of, is_of
from pytest_llmperf.plan.lengths import Lengths, parse_lengths

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_llmperf.plan.workload import Workload


def workload(folder: Path | None = None, **arguments: Any) -> Workload:
    return workload_from(Axes(), arguments, folder=folder)


def test_workloads_of_older_baselines_are_what_the_same_calls_make_now() -> None:
    assert workload().description == {
        "prompt_tokens": 100, "output_tokens": 50, "requests": 32, "concurrency": 8, "seed": 0,
    }  # fmt: skip
    assert workload().fingerprint == "e38f917fc8130d31"


@pytest.mark.parametrize(
    ("text", "shown", "mean"),
    [
        ("uniform(10, 30)", "uniform(10, 30)", 20),
        (" lognormal( 512,0.5 ) ", "lognormal(512, 0.5)", 512),
        ("lognormal(512, 0.5, 900)", "lognormal(512, 0.5, 900)", 512),
        ("normal(512,64)", "normal(512, 64)", 512),
        ("normal(512, 64, 900)", "normal(512, 64, 900)", 512),
    ],
)
def test_lengths_are_a_number_or_a_distribution(text: str, shown: str, mean: float, tmp_path: Path) -> None:
    found = parse_lengths("prompt_tokens", text, tmp_path)
    assert isinstance(found, Lengths)
    assert (str(found), found.mean) == (shown, mean)


def test_lengths_from_a_file_are_fingerprinted_by_what_stands_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("10\n20\n30\n")
    (tmp_path / "b.txt").write_text("10\n20\n31\n")
    first, again, other = (workload(tmp_path, prompt_tokens=f"file({name})") for name in ("a.txt", "./a.txt", "b.txt"))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert str(tmp_path) not in json.dumps(first.description)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_tokens": "pareto(5, 1)"}, "prompt_tokens='pareto(5, 1)': must be a number of tokens, or uniform"),
        ({"prompt_tokens": "normal(5, 0)"}, "prompt_tokens='normal(5, 0)': must be a number of tokens"),
        ({"prompt_tokens": "normal(0.5, 1)"}, "must be a number of tokens"),
        ({"prompt_tokens": "normal(5, 1, 0)"}, "must be a number of tokens"),
        ({"prompt_tokens": 10**9}, "prompt_tokens=1000000000: more than 10,000,000 tokens"),
        ({"prompt_tokens": "uniform(9, 3)"}, "prompt_tokens='uniform(9, 3)': must be"),
        ({"prompt_tokens": "lognormal(100, nan)"}, "must be a number of tokens"),
        ({"output_tokens": 0}, "output_tokens=0: the smallest value is 1"),
        ({"output_tokens": "file(gone.txt)"}, "cannot be read"),
        ({"rate": 0}, "rate=0: must be requests per second above 0"),
        ({"rate": "fast"}, "rate='fast': must be requests per second above 0"),
        ({"rate": 2, "arrivals": "gamma(0)"}, "arrivals='gamma(0)': must be poisson, constant or gamma(BURSTINESS)"),
        ({"rate": 2, "concurrency": 4}, "leave one out"),
        ({"speed": 2}, "speed=2: only a trace can be replayed faster"),
        ({"turns": 3}, None),
        ({"turns": 3, "requests": 31}, "requests=31: must be a multiple of turns=3"),
        ({"turns": 4, "requests": 28}, "only 7 conversations, fewer than concurrency=8"),
        ({"classes": {"a": {"share": 0}}}, "classes: a: share=0: must be a number above 0"),
        ({"classes": {"a/b": {}}}, "'a/b' is not a name"),
        ({"classes": {"a": {"tokens": 3}}}, "unknown argument 'tokens'"),
        ({"classes": [1]}, "must be a dict of dicts"),
        ({"slo": {"ttft_ms": 3}}, "known are ttft_s, itl_s, tpot_s, e2e_s"),
        ({"slo": {"ttft_s": 0.2}, "stream": False}, "slo='ttft_s': without a stream only the end"),
        ({"extra_body": {"n": 2}}, "extra_body: 'n' is set by the plugin"),
        ({"extra_body": [1]}, "extra_body=[1]: must be a dict"),
        ({"extra_body": {"x": float("inf")}}, "cannot be written as JSON"),
        ({"api": "embeddings"}, "api='embeddings': must be one of completions, chat"),
        ({"lora": []}, "lora=[]: must be the name of an adapter"),
        ({"classes": {"a": {}, "b": {}, "c": {}}, "turns": 2, "requests": 4, "concurrency": 2}, "too few for 3 classes"),
        ({"arrivals": "constant"}, "arrivals='constant': only requests that are sent at a rate arrive so"),
        ({"rate": 2, "arrivals": 0.5}, "arrivals=0.5: must be poisson"),
        ({"prefix_tokens": -5}, "prefix_tokens=-5: the smallest value is 1"),
        ({"stream": "no"}, "stream='no': must be True or False"),
        ({"prompt_tokens": "uniform(1.5, 1.9)"}, "must be a number of tokens"),
        ({"classes": {}}, "classes={}: must be a dict of dicts"),
        ({"classes": {"a": {"lora": None}}}, "classes: a: lora=None: must be the name of an adapter"),
        ({"extra_body": {1: 2}}, "extra_body={1: 2}: must be a dict of what goes into the request's body"),
        ({"extra_body": {"ignore_eos": "no"}}, "extra_body: ignore_eos='no': must be True or False"),
        ({"arrivals": None}, "arrivals=None: must be poisson"),
        ({"stream": 1}, "stream=1: must be True or False"),
        ({"api": None}, "api=None: must be one of completions, chat"),
        ({"seed": "x"}, "seed='x': must be a whole number, 0 or more"),
        ({"seed": True}, "seed=True: must be a whole number"),
        ({"seed": 1.5}, "seed=1.5: must be a whole number"),
        ({"seed": None}, "seed=None: must be a whole number"),
        ({"seed": -1}, "seed=-1: must be a whole number, 0 or more"),
        ({"speed": "2"}, "speed='2': must be a number above 0"),
        ({"prefixes": 3}, "prefixes=3: texts that prompts share have a length; add prefix_tokens"),
        ({"prefix_tokens": None}, "prefix_tokens=None: must be a whole number"),
        ({"slo": {"ttft_s": float("nan")}}, "slo: ttft_s=nan: must be a number above 0"),
        ({"slo": {}}, "slo={}: must be a dict of limits in seconds"),
        ({"pairs": []}, "pairs=[]: must be (prompt, output) tokens"),
        ({"pairs": [(5, 0)]}, "pairs: output_tokens of (5, 0)=0: the smallest value is 1"),
        ({"pairs": [(5, 6, 7)]}, "must be (prompt, output) tokens"),
        ({"pairs": [(5, 6)], "prompt_tokens": 5}, "prompt_tokens and pairs: lengths come from the one or the other"),
        ({"pairs": [(5, 6)], "classes": {"a": {}}}, "pairs and classes: prompts come from the one or the other"),
        ({"rate": "inf..3"}, "rate='inf..3': must be requests per second above 0"),
        ({"rate": "-inf"}, "rate='-inf': must be requests per second above 0"),
        ({"rate": "inf", "duration_s": 3}, "duration_s and rate='inf': all requests are due at the beginning"),
        ({"rate": 5, "duration_s": 3, "requests": 9}, "requests=9 and duration_s=3: at a rate the one follows from the other"),
        ({"duration_s": 0}, "duration_s=0: must be a number above 0"),
        ({"duration_s": True}, "duration_s=True: must be a number above 0"),
        ({"max_concurrency": 4}, "max_concurrency=4: without a rate or a trace so many are in flight as concurrency says"),
        ({"rate": 5, "max_concurrency": 0}, "max_concurrency=0: the smallest value is 1"),
        ({"think_s": 1}, "think_s=1.0: a pause is between the turns of a conversation; add turns=2 or more"),
        ({"think_s": -1, "turns": 2}, "think_s=-1: must be a number of seconds, 0 or more"),
        ({"think_s": "soon", "turns": 2}, "think_s='soon': must be a number of seconds"),
        ({"think_s": float("nan"), "turns": 2}, "think_s=nan: must be a number of seconds"),
        ({"warm_up": {}}, "warm_up={}: must be a dict of what warms up; known are requests, prompt_tokens"),
        ({"warm_up": {"turns": 2}}, "known are requests, prompt_tokens, output_tokens, dataset"),
        ({"warm_up": {"requests": 0}}, "warm_up: requests=0: the smallest value is 1"),
        ({"warm_up": {"prompt_tokens": 5, "dataset": "d"}}, "warm_up: prompt_tokens and dataset"),
        ({"trace_unit": "s"}, "trace_unit='s': only a trace has times of its own; add trace"),
        ({"block_tokens": 16}, "block_tokens=16: only a trace has blocks; add trace"),
        ({"tokens": 5}, "llmperf(tokens=...): unknown workload argument"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(arguments: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert workload(**arguments).requests == 33  # 32, and whole conversations
        return
    with pytest.raises(PlanError) as caught:
        workload(**arguments)
    assert message in str(caught.value)


def test_a_rate_of_the_axes_makes_an_open_loop() -> None:
    found = workload_from(Axes(rate=2.5), {"requests": 10})
    assert (found.is_open, found.rate) == (True, (2.5,))
    assert workload_from(Axes(), {"rate": "1..10"}).rate == (1.0, 10.0)
    assert not workload().is_open


def test_a_trace_has_as_many_requests_as_lines_by_default(tmp_path: Path) -> None:
    line = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}
    (tmp_path / "trace.jsonl").write_text("\n".join(json.dumps(line | {"timestamp": 1000 * n}) for n in range(7)))
    assert workload(tmp_path, trace="trace.jsonl").requests == 7
    assert workload(tmp_path, trace="trace.jsonl", requests=3).requests == 3
    with pytest.raises(PlanError, match="the trace has only 7 arrivals"):
        workload(tmp_path, trace="trace.jsonl", requests=8)
    with pytest.raises(PlanError, match="prompt_tokens and trace: lengths come from the one or the other"):
        workload(tmp_path, trace="trace.jsonl", prompt_tokens=5)


def test_the_callers_form_of_load_wins_over_the_fixtures() -> None:
    assert workload_from(Axes(), {"rate": 5}, {"concurrency": 4}).is_open is False
    assert workload_from(Axes(rate=3.0), {"concurrency": 4}).is_open is False
    assert workload_from(Axes(), {"concurrency": 4}, {"rate": 5}).is_open


def test_a_class_has_its_share_of_requests_and_lengths() -> None:
    found = workload(classes={"short": {"share": 3, "output_tokens": 10}, "long": {"share": 1, "output_tokens": 50}})
    assert found.mean_output_tokens == 20
    assert [found.class_share(name) for name in ("short", "long", "none")] == [0.75, 0.25, 0]
    assert workload().class_share("none") == 0


def test_a_rate_and_a_duration_come_to_a_number_of_requests() -> None:
    assert workload(rate=4, duration_s=2.5).requests == 10
    assert workload(rate="2..6", duration_s=2.5).requests == 10
    assert workload(rate=4, duration_s=2.5, turns=4).requests == 12
    assert workload(rate=0.01, duration_s=1).requests == 1


def test_of_requests_and_a_duration_the_callers_counts() -> None:
    assert workload_from(Axes(rate=4.0), {"requests": 500}, {"duration_s": 2}).requests == 8
    found = workload_from(Axes(rate=4.0), {"duration_s": 2}, {"requests": 500})
    assert (found.requests, found.duration_s) == (500, None)
    closed = workload_from(Axes(), {"requests": 500}, {"duration_s": 2})
    assert (closed.requests, closed.duration_s, closed.stops_s) == (500, 2.0, 2.0)


def test_a_closed_loop_bound_by_time_has_requests_ready() -> None:
    assert workload(duration_s=10).requests == 8 * 10 * 4
    assert workload(duration_s=10, prompt_tokens=100_000).requests == 40, "four million tokens are made ready at most"
    assert workload(duration_s=0.1, turns=3).requests % 3 == 0


def test_all_at_once_is_a_rate() -> None:
    found = workload_from(Axes(rate=float("inf")), {})
    assert (found.is_open, found.description["rate"]) == (True, ["inf"])
    assert json.loads(json.dumps(found.description, allow_nan=False)) == found.description
    assert workload(rate="inf").fingerprint == found.fingerprint != workload(rate=1000).fingerprint


@pytest.mark.parametrize(("given", "mean"), [({"pairs": [(5, 10), (5, 30)]}, 20), ({"output_tokens": "normal(40, 5)"}, 40)])
def test_the_mean_length_of_answers_is_that_of_what_is_sent(given: dict[str, Any], mean: float) -> None:
    assert workload(**given).mean_output_tokens == mean


def test_older_fingerprints_hold_the_names_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("10\n20\n")
    made = workload(tmp_path, prompt_tokens="file(a.txt)")
    older = hashlib.sha256(json.dumps(made.description, sort_keys=True).encode()).hexdigest()[:16]
    assert older != made.fingerprint
    assert is_of(older, made.description)
    assert is_of(made.fingerprint, made.description)
    assert not is_of(older, made.description | {"seed": 1})


def test_only_fields_that_name_files_lose_names() -> None:
    one, other = ({"extra_body": f'{{"stop": "{name} (0123456789ab)"}}', "lora": [f"{name} (0123456789ab)"]} for name in "xy")
    assert fingerprint_of(one) != fingerprint_of(other)
    named, moved = ({"warm_up": {"dataset": f"{name} (0123456789ab)"}} for name in ("x", "a (b)"))
    assert fingerprint_of(named) == fingerprint_of(moved)
