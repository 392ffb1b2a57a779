"""Scaling over the TP degree: the figures, the advisor's choice, and the diagnosis, from known values and by properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.judge.diagnosis import scaling_advice
from pytest_llmperf.judge.scaling import points_of
from pytest_llmperf.measure.measurement import Launch, Measurement, Round
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.engine import EngineSpec
from pytest_llmperf.plan.workload import Workload
from pytest_llmperf.report.scaling import Scaling, advise, scaling_of

KNOWN = {1: 8242.0, 2: 13554.0, 4: 21100.0}
"""Output tokens per second at 1, 2 and 4 GPUs."""


def measured(
    tp: int, tokens_per_s: float, *, workload: Workload | None = None, pp: int = 1, **others: float | None
) -> Measurement:
    values: dict[str, float | None] = {"output_tokens_per_s": tokens_per_s, **others}
    case = Case(f"test_it.py::test_x[tiny-sweep-c8]#tp{tp}", EngineSpec(tp=tp, pp=pp), workload or Workload())
    return Measurement(case, (Launch("1", "now", (Round(values),) * 3, {"startup_s": 2.0}),))


def known(**latency: float) -> Scaling:
    return scaling_of(measured(tp, tokens_per_s, **latency) for tp, tokens_per_s in KNOWN.items())


def of(**tokens_per_s: float) -> Scaling:
    """Return a scaling of `tp1=..., tp2=...`."""
    return Scaling(points_of({int(name[2:]): {"output_tokens_per_s": value} for name, value in tokens_per_s.items()}))


# ------------------------------------------------------------------------------------------------ the figures


def test_known_throughputs_come_to_known_speed_ups_and_efficiencies() -> None:
    scaling = known()
    assert scaling.degrees == (1, 2, 4)
    assert [round(scaling.speed_up(tp), 2) for tp in (1, 2, 4)] == [1.00, 1.64, 2.56]
    assert [round(100 * scaling.efficiency(tp)) for tp in (1, 2, 4)] == [100, 82, 64]
    assert [round(scaling[tp].not_scaling, 2) for tp in (1, 2, 4)] == [0.0, 0.18, 0.36]
    assert scaling.throughput(4) == 21100.0
    assert scaling[4].output_tokens_per_s_per_gpu == 5275.0


def test_the_table_has_a_row_for_each_degree() -> None:
    assert str(known(ttft_p50_s=0.012, tpot_p50_s=1.5)).splitlines() == [
        "GPUs    output tok/s    speed-up    efficiency    tok/s per GPU    TTFT p50    TPOT p50",
        "------  --------------  ----------  ------------  ---------------  ----------  ----------",
        "1       8,242           1.00x       100%          8,242            12 ms       1.5 s",
        "2       13,554          1.64x       82%           6,777            12 ms       1.5 s",
        "4       21,100          2.56x       64%           5,275            12 ms       1.5 s",
    ]


def test_the_figures_fit_into_an_assertion() -> None:
    # pytest cuts a value at 240 characters, and shows a line break as `\n`
    assert repr(known()) == ("<scaling TP 1: 8,242 tok/s 1.00x 100%, TP 2: 13,554 tok/s 1.64x 82%, TP 4: 21,100 tok/s 2.56x 64%>")


def test_without_tp_1_the_smallest_degree_is_the_reference() -> None:
    scaling = of(tp2=1000.0, tp4=1800.0, tp8=2000.0)
    assert (scaling.speed_up(2), scaling.speed_up(4)) == (1.0, 1.8)
    assert (scaling.efficiency(2), scaling.efficiency(4), scaling.efficiency(8)) == (1.0, 0.9, 0.5)
    assert str(scaling).endswith("speed-up and efficiency are relative to TP 2, the smallest degree that was measured")


def test_with_pipeline_stages_a_degree_takes_more_gpus_than_its_number() -> None:
    scaling = scaling_of([measured(1, 1000.0, pp=2), measured(2, 1500.0, pp=2)])
    assert [point.gpus for point in scaling.points] == [2, 4]
    assert scaling.efficiency(2) == 0.75
    assert str(scaling).splitlines()[0].split()[:2] == ["TP", "GPUs"]


def test_what_was_not_measured_is_missing_and_not_0() -> None:
    scaling = scaling_of([measured(1, 100.0, tpot_p50_s=None), measured(2, 150.0, tpot_p50_s=0.01)])
    assert scaling[1].tpot_p50_s is None
    assert scaling[2].tpot_p50_s == 0.01
    assert scaling[1].ttft_p50_s is None
    assert scaling[1].medians["startup_s"] == 2.0
    assert str(scaling).splitlines()[2].split()[-2:] == ["-", "-"]


def test_a_degree_that_was_not_measured_is_a_named_error() -> None:
    scaling = scaling_of([measured(1, 1.0), measured(2, 2.0)], unfit={8: "needs 8 GPUs, this host has 4"})
    for ask in (scaling.efficiency, scaling.speed_up, scaling.throughput, scaling.__getitem__):
        with pytest.raises(KeyError, match=r"TP 3 was not measured; measured are 1, 2: .* --llmperf-tp"):
            ask(3)
    with pytest.raises(KeyError, match=r"TP 8 was not measured \(needs 8 GPUs, this host has 4\)"):
        scaling[8]
    assert "TP 8 was not measured: needs 8 GPUs, this host has 4" in str(scaling)


@pytest.mark.parametrize(
    ("measurements", "message"),
    [
        ([], "there is none"),
        ([measured(2, 1.0), measured(2, 1.0)], "of the same degree"),
        ([measured(1, 1.0), measured(2, 1.0, workload=Workload(requests=77))], "differ in more than TP"),
        ([measured(1, 1.0), measured(2, 1.0, pp=2)], "differ in more than TP"),
        ([measured(1, 1.0), measured(2, 0.0)], "TP 2 has no output_tokens_per_s"),
        ([measured(1, float("nan"))], "TP 1 has no output_tokens_per_s"),
    ],
)
def test_measurements_that_make_no_scaling_are_refused(measurements: list[Measurement], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaling_of(measurements)


FIGURES = st.dictionaries(st.integers(1, 64), st.floats(1e-3, 1e9), min_size=1, max_size=6)


@given(FIGURES, st.floats(1e-3, 1e3))
def test_efficiency_does_not_depend_on_the_unit_of_throughput(figures: dict[int, float], factor: float) -> None:
    one = of(**{f"tp{tp}": value for tp, value in figures.items()})
    other = of(**{f"tp{tp}": value * factor for tp, value in figures.items()})
    for tp in figures:
        assert other.efficiency(tp) == pytest.approx(one.efficiency(tp))
    assert one.efficiency(min(figures)) == pytest.approx(1)


@given(FIGURES.flatmap(lambda found: st.tuples(st.just(found), st.permutations(sorted(found)))))
def test_the_order_of_the_measurements_does_not_matter(case: tuple[dict[int, float], list[int]]) -> None:
    figures, order = case
    straight = scaling_of(measured(tp, figures[tp]) for tp in sorted(figures))
    shuffled = scaling_of(measured(tp, figures[tp]) for tp in order)
    assert shuffled.points == straight.points
    assert [one.case for one in shuffled.measurements] == [one.case for one in straight.measurements]
    assert advise(shuffled) == advise(straight)


@given(FIGURES)
def test_efficiency_is_throughput_per_gpu_against_that_of_the_reference(figures: dict[int, float]) -> None:
    scaling = of(**{f"tp{tp}": value for tp, value in figures.items()})
    for point in scaling.points:
        share = point.output_tokens_per_s_per_gpu / scaling.reference.output_tokens_per_s_per_gpu
        assert point.efficiency == pytest.approx(share)


# ------------------------------------------------------------------------------------------------ the advisor


def test_without_limits_the_degree_with_the_most_throughput_per_gpu_is_recommended() -> None:
    advice = advise(known())
    assert advice.degree == 1
    assert advice.summary == "recommended: TP 1, with 8,242 output tok/s per GPU; TP 2: 6,777, TP 4: 5,275"
    assert advice.reasons == (
        "TP 1 is recommended: 8,242 tok/s per GPU, the most",
        "TP 2 gives 18% less than the most: 6,777 tok/s per GPU",
        "TP 4 gives 36% less than the most: 5,275 tok/s per GPU",
    )


def with_latency() -> Scaling:
    ttft = {1: 0.6, 2: 0.4, 4: 0.2}
    return scaling_of(measured(tp, KNOWN[tp], ttft_p50_s=ttft[tp], tpot_p50_s=0.015) for tp in KNOWN)


def test_a_degree_that_misses_a_limit_is_not_recommended() -> None:
    advice = advise(with_latency(), {"ttft_p50_s": 0.5, "tpot_p50_s": 0.02})
    assert advice.degree == 2
    assert advice.reasons == (
        "TP 1 misses its limits, with 8,242 tok/s per GPU: ttft_p50_s is 600 ms, the limit 500 ms",
        "TP 2 is recommended: 6,777 tok/s per GPU, the most of the degrees that meet every limit",
        "TP 4 gives 22% less than the most of the degrees that meet every limit: 5,275 tok/s per GPU",
    )
    assert advice.summary == "recommended: TP 2, with 6,777 output tok/s per GPU; TP 4: 5,275; TP 1 misses the limits"


def test_a_limit_on_what_is_better_when_higher_is_a_lower_one() -> None:
    assert advise(with_latency(), {"output_tokens_per_s": 20_000}).degree == 4


def test_where_no_degree_meets_the_limits_none_is_recommended() -> None:
    advice = advise(with_latency(), {"ttft_p50_s": 0.1})
    assert advice.degree is None
    assert advice.summary == "no degree is recommended: TP 1, TP 2, TP 4 miss the limits"


def test_a_metric_that_was_not_measured_meets_no_limit() -> None:
    advice = advise(known(), {"ttft_p50_s": 0.5})
    assert advice.degree is None
    assert "TP 1 misses its limits, with 8,242 tok/s per GPU: ttft_p50_s was not measured" in str(advice)


def test_a_limit_on_no_metric_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"'ttft'.*not a metric; known are output_tokens_per_s"):
        advise(known(), {"ttft": 0.5})


def test_degrees_that_are_alike_within_2_percent_go_to_the_smaller() -> None:
    advice = advise(of(tp1=1000.0, tp2=2030.0, tp4=3900.0))
    assert advice.degree == 1
    assert advice.reasons == (
        "TP 1 is recommended: 1,000 tok/s per GPU, within 2% of the most, with the fewest GPUs",
        "TP 2 is as good within 2%, but takes more GPUs: 1,015 tok/s per GPU",
        "TP 4 gives 4% less than the most: 975 tok/s per GPU",
    )
    assert advise(of(tp1=1000.0, tp2=2100.0)).degree == 2


def test_degrees_that_do_not_fit_are_named_in_their_place() -> None:
    scaling = scaling_of([measured(2, 1000.0), measured(4, 1500.0)], unfit={1: "the weights take 15 GiB", 8: "needs 8 GPUs"})
    assert advise(scaling).reasons == (
        "TP 1 was not measured: the weights take 15 GiB",
        "TP 2 is recommended: 500 tok/s per GPU, the most",
        "TP 4 gives 25% less than the most: 375 tok/s per GPU",
        "TP 8 was not measured: needs 8 GPUs",
    )


def test_a_price_of_the_gpu_becomes_one_of_a_million_tokens() -> None:
    advice = advise(of(tp1=1000.0, tp2=1600.0), cost_per_gpu_hour=3.6)
    assert advice.cost_per_million_tokens == pytest.approx({1: 1.0, 2: 1.25})
    assert advice.reasons[1].endswith("; 1.25 per million output tokens")
    assert advise(of(tp1=1.0)).cost_per_million_tokens == {}


@given(FIGURES, st.floats(1e-3, 1e3))
def test_the_smallest_of_the_best_degrees_is_recommended(figures: dict[int, float], price: float) -> None:
    scaling = of(**{f"tp{tp}": value for tp, value in figures.items()})
    advice = advise(scaling, cost_per_gpu_hour=price)
    assert advice.degree is not None
    per_gpu = {point.degree: point.output_tokens_per_s_per_gpu for point in scaling.points}
    near = [tp for tp, value in per_gpu.items() if value >= 0.98 * max(per_gpu.values())]
    assert advice.degree == min(near)
    cheapest = min(advice.cost_per_million_tokens.values())
    assert advice.cost_per_million_tokens[advice.degree] <= cheapest / 0.98 * (1 + 1e-9)
    assert len(advice.reasons) == len(figures)


# ------------------------------------------------------------------------------------------------ the diagnosis


def test_a_degree_that_is_faster_needs_no_advice() -> None:
    assert scaling_advice(known(), direct_links=False) == []


def test_a_degree_that_is_slower_is_explained_with_the_settings_to_change() -> None:
    scaling = scaling_of([measured(1, 1000.0), measured(2, 900.0), measured(4, 1100.0)])
    lines = scaling_advice(scaling, direct_links=False)
    assert lines[:2] == ["TP 2 is slower than TP 1: 900 tok/s against 1,000 tok/s", "likely causes, the likeliest first:"]
    assert [line.partition(":")[0].strip() for line in lines[2:]] == [
        "1. the GPUs are linked by PCIe only, and every layer waits for it",
        "2. the model is too small for the degree",
        "3. the batch (concurrency 8) is too small to fill the GPUs",
    ]
    for setting in ("--llmperf-tp=1", "--llmperf-pp", "--llmperf-dp", "--llmperf-concurrency", "--max-num-seqs"):
        assert setting in "\n".join(lines)


@pytest.mark.parametrize(("direct_links", "causes"), [(True, 2), (None, 3)])
def test_links_are_a_cause_only_where_they_may_be_missing(direct_links: bool | None, causes: int) -> None:
    lines = scaling_advice(of(tp1=1000.0, tp2=900.0), direct_links=direct_links)
    assert len(lines) == 2 + causes
    assert ("nvidia-smi topo -m" in lines[-1]) is (direct_links is None)
    assert "concurrency 8" not in "\n".join(lines)  # figures alone don't tell the load
