"""What is seen of an engine's GPUs, over accelerators that tell what a script says."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.measure.gpus.device import AcceleratorError, Gpu, Reading, Totals
from pytest_llmperf.measure.gpus.memory import GpuMemory, RankMemory, rank_memory
from pytest_llmperf.measure.gpus.sampling import RoundWatch
from pytest_llmperf.measure.gpus.summary import GpuRound, RoundReadings, summarize
from pytest_llmperf.measure.gpus.watch import GpuWatch, in_words, process_tree

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

GIB = 1 << 30
ENGINE = 4_190_001
"""Process ids that no process has: Linux gives none above 4,194,304 and these only after millions."""
STRANGER = 4_190_002

NOT_TOLD = AcceleratorError("NVML: GPU 0 (GPU-0) is no longer there")


class Script:
    """Accelerators that tell prepared readings and counters; the last of each for ever.

    A reading that has processes loses them where they are not asked for, as a driver's would.
    """

    vendor = "nvidia"
    visible_variable = "CUDA_VISIBLE_DEVICES"

    def __init__(self, *readings: Sequence[Reading] | AcceleratorError) -> None:
        self.versions: dict[str, str] = {}
        self.readings = list(readings)
        self.counters: list[Sequence[Totals] | AcceleratorError] = []
        self.asked: list[bool] = []
        """Whether processes were asked for, read by read."""
        self.told = threading.Condition()

    def devices(self) -> tuple[Gpu, ...]:
        return ()

    def close(self) -> None:
        pass

    def read(self, gpus: Sequence[Gpu], *, processes: bool) -> list[Reading]:
        with self.told:
            self.asked.append(processes)
            now = self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]
            self.told.notify_all()
        if isinstance(now, AcceleratorError):
            raise now
        return [reading if processes else replace(reading, processes=None) for reading in now]

    def totals(self, gpus: Sequence[Gpu]) -> list[Totals]:
        if not self.counters:
            return [Totals() for _ in gpus]
        now = self.counters.pop(0) if len(self.counters) > 1 else self.counters[0]
        if isinstance(now, AcceleratorError):
            raise now
        return list(now)

    def wait_for(self, reads: int) -> None:
        """Wait until so many reads were made."""
        with self.told:
            assert self.told.wait_for(lambda: len(self.asked) >= reads, 10), f"{len(self.asked)} of {reads} reads came"


def busy(used: float = 0, processes: dict[int, float | None] | None = None, **more: Any) -> Reading:
    """A reading of a GPU under full load, GiB in, bytes out."""
    users = None if processes is None else {pid: None if n is None else int(n * GIB) for pid, n in processes.items()}
    return Reading(int(used * GIB), users, **{"utilization": 1.0, "sm_clock_mhz": 1980.0, **more})


IDLE = Reading(GIB // 2, {}, 345.0, 0.0, 32.0)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples and polls follow each other without a pause; the scripts say how many matter."""
    monkeypatch.setattr("pytest_llmperf.measure.gpus.sampling.INTERVAL_S", 0.0)
    monkeypatch.setattr("pytest_llmperf.measure.gpus.watch.POLL_S", 0.0)


def gpus(number: int) -> list[Gpu]:
    return [Gpu(i, f"GPU-{i}", "H200", 140 * GIB, sm_clock_mhz=1980.0) for i in range(number)]


def watching(*before: Reading, engine: int = ENGINE) -> tuple[Script, GpuWatch]:
    """A watch of GPUs that were like this before the engine; ENGINE, which no process is, has no descendants."""
    script = Script(before)
    watch = GpuWatch(script, gpus(len(before)), lambda pid: {pid} if pid == ENGINE else process_tree(pid))
    watch.follow(engine)
    return script, watch


def played(script: Script, watch: GpuWatch, *samples: Sequence[Reading] | AcceleratorError) -> GpuRound:
    """A round in which these were sampled: the last one is that of its end, and may be sampled more often."""
    script.readings, script.asked = list(samples), []
    with (watched := RoundWatch(watch)):
        script.wait_for(len(samples) - 1)
    return watched.result()


# ------------------------------------------------------------------------------------------------------ GpuMemory


def ranks(*peaks: float | None) -> GpuMemory:
    return GpuMemory(
        tuple(
            RankMemory(rank, rank, None, None, None if peak is None else int(peak * GIB), None) for rank, peak in enumerate(peaks)
        )
    )


def test_the_memory_per_rank_is_the_peak_of_each():
    assert ranks(16, 20).per_rank == (16 * GIB, 20 * GIB)


@pytest.mark.parametrize("peaks", [(), (16, None)])
def test_memory_that_was_not_measured_is_a_key_error_that_says_why(peaks):
    for ask in (lambda memory: memory.per_rank, lambda memory: memory.imbalance, lambda memory: memory.is_equal(), str):
        with pytest.raises(KeyError, match="the GPU memory of the engine was not measured: it has no GPU, or its driver"):
            ask(ranks(*peaks))


@pytest.mark.parametrize(("peaks", "imbalance"), [((16,), 0.0), ((16, 16), 0.0), ((16, 20), 0.2), ((0, 5), 1.0), ((0, 0), 0.0)])
def test_the_imbalance_is_what_the_emptiest_rank_lacks_of_the_fullest(peaks, imbalance):
    assert ranks(*peaks).imbalance == pytest.approx(imbalance)


def test_equal_ranks_are_equal():
    equal = ranks(16, 16).is_equal(rel=0.0)
    assert equal
    assert repr(equal) == "<equal: rank 0 on GPU 0: 16.00 GiB, rank 1 on GPU 1: 16.00 GiB>"


@pytest.mark.parametrize(
    ("peaks", "straggler"),
    [
        ((16, 20), "rank 1 holds 4.00 GiB (25.0%) more than the other"),
        ((20, 16), "rank 0 holds 4.00 GiB (25.0%) more than the other"),
        ((16, 16, 20, 16), "rank 2 holds 4.00 GiB (25.0%) more than the others"),
        ((16, 12, 16, 16), "rank 1 holds 4.00 GiB (25.0%) less than the others"),
        ((0, 5), "rank 1 holds 5.00 GiB more than the other"),
    ],
)
def test_unequal_ranks_are_told_with_who_stands_out_and_by_how_much(peaks, straggler):
    unequal = ranks(*peaks).is_equal(rel=0.02)
    each = ", ".join(f"rank {rank} on GPU {rank}: {peak:.2f} GiB" for rank, peak in enumerate(peaks))
    assert not unequal
    why = "either TP does not split the model, or code on one rank, or another process, takes memory for itself"
    assert repr(unequal) == f"<not equal: {each}; {straggler}; {why}>"


peaks = st.lists(st.integers(1, 200 * GIB), min_size=1, max_size=8)


@given(peaks)
def test_the_imbalance_is_a_share_whatever_the_order_of_ranks(values):
    memory = GpuMemory(tuple(RankMemory(rank, rank, None, None, value, None) for rank, value in enumerate(values)))
    turned = GpuMemory(tuple(RankMemory(rank, rank, None, None, value, None) for rank, value in enumerate(reversed(values))))
    assert 0 <= memory.imbalance < 1
    assert memory.imbalance == turned.imbalance


@given(peaks, st.floats(0, 1), st.floats(0, 1))
def test_what_is_equal_stays_equal_when_more_is_allowed(values, share, other_share):
    memory = GpuMemory(tuple(RankMemory(rank, rank, None, None, value, None) for rank, value in enumerate(values)))
    less, more = sorted((share, other_share))
    assert not memory.is_equal(rel=less) or memory.is_equal(rel=more)
    assert memory.is_equal(rel=1.0)


# ----------------------------------------------------------------------------------------------------------- memory


def test_memory_is_that_of_the_engines_own_processes():
    script, watch = watching(IDLE)
    script.readings = [[busy(17, {ENGINE: 16})]]
    watch.mark_started()
    assert watch.started == (16 * GIB,)


def test_between_two_looks_at_processes_the_peak_is_the_devices():
    script, watch = watching(IDLE)
    steady = [busy(17, {ENGINE: 16})]
    played_round = played(script, watch, steady, [busy(19)], steady)
    assert script.asked[:3] == [True, False, False]
    assert (played_round.peak_bytes, played_round.end_bytes) == ((18 * GIB,), (16 * GIB,))


def test_processes_are_looked_at_in_every_tenth_sample_and_at_the_end():
    script, watch = watching(IDLE)
    played(script, watch, *[[busy(17, {ENGINE: 16})]] * 12)
    assert [number for number, asked in enumerate(script.asked[:-1]) if asked][:2] == [0, 10]
    assert script.asked[-1]


def test_hidden_process_ids_leave_the_devices_growth_since_before_the_start():
    script, watch = watching(IDLE)
    played_round = played(script, watch, [busy(16.5, {STRANGER: 16})], [busy(20.5, {STRANGER: 20})])
    assert (played_round.peak_bytes, played_round.end_bytes, played_round.trouble) == ((20 * GIB,), (20 * GIB,), ())


def test_process_ids_without_sizes_leave_the_devices_growth_since_the_start():
    script, watch = watching(IDLE)
    played_round = played(script, watch, [busy(16.5, {ENGINE: None})])
    assert (played_round.peak_bytes, played_round.trouble) == ((16 * GIB,), ())


def test_memory_that_is_not_told_is_none():
    script, watch = watching(Reading())
    played_round = played(script, watch, [Reading()])
    assert (played_round.peak_bytes, played_round.end_bytes, played_round.trouble) == ((None,), (None,), ())


def test_the_memory_of_a_rank_is_idle_started_peak_and_growth():
    script, watch = watching(IDLE, IDLE)
    script.readings = [[busy(16.5, {ENGINE: 16}), busy(16.5, {ENGINE: 16})]]
    watch.mark_started()
    rounds = [
        GpuRound(peak_bytes=(20 * GIB, 17 * GIB), end_bytes=(17 * GIB, 17 * GIB)),
        GpuRound(peak_bytes=(19 * GIB, 18 * GIB), end_bytes=(19 * GIB, 16 * GIB)),
    ]
    assert rank_memory(watch, rounds) == (
        RankMemory(0, 0, GIB // 2, 16 * GIB, 20 * GIB, 2 * GIB),
        RankMemory(1, 1, GIB // 2, 16 * GIB, 18 * GIB, -1 * GIB),
    )


def test_the_memory_of_a_rank_without_rounds_is_what_is_known():
    _, watch = watching(IDLE)
    assert rank_memory(watch, []) == (RankMemory(0, 0, GIB // 2, None, None, None),)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours that has a child, whose id it has told."""
    code = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=0)
print(child.pid, flush=True)
child.wait()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.stdin.close()


def test_the_engines_processes_are_all_descendants_even_those_that_ended(child):
    grandchild = int(child.stdout.readline())
    _, watch = watching(IDLE, engine=child.pid)
    assert watch.tree() == {child.pid, grandchild}
    child.stdin.close()
    child.wait(10)
    assert watch.tree() == {child.pid, grandchild}


def test_an_engine_process_that_ends_within_the_round_is_no_stranger(child):
    grandchild = int(child.stdout.readline())
    script, watch = watching(IDLE, engine=child.pid)
    script.readings, script.asked = [[busy(17, {grandchild: 16})]], []
    with (watched := RoundWatch(watch)):
        script.wait_for(2)
        child.stdin.close()
        child.wait(10)
        script.readings = [[IDLE]]
    assert watched.result().trouble == ()


# ---------------------------------------------------------------------------------------------------------- trouble


def test_a_foreign_process_is_trouble_with_its_id_name_and_most_memory():
    script, watch = watching(IDLE)
    name = in_words(os.getpid(), None)
    samples = [[busy(17, {ENGINE: 16, os.getpid(): more})] for more in (2, 3)]
    samples = [samples[0], *[[busy(17)]] * 9, samples[1], [busy(17, {ENGINE: 16})]]
    assert played(script, watch, *samples).trouble == (f"GPU 0 is used by another process: {name}, 3.0 GiB",)


def test_a_foreign_process_is_told_of_each_gpu_that_it_uses():
    script, watch = watching(IDLE, IDLE)
    played_round = played(script, watch, [busy(17, {ENGINE: 16, STRANGER: 1}), busy(17, {ENGINE: 16, STRANGER: 1})])
    who = f"pid {STRANGER} (not in this container, or ended), 1.0 GiB"
    assert played_round.trouble == (f"GPU 0 is used by another process: {who}", f"GPU 1 is used by another process: {who}")


def test_a_foreign_process_is_told_where_another_gpu_tells_no_processes():
    script, watch = watching(IDLE, IDLE)
    played_round = played(script, watch, [busy(17, {ENGINE: 16, STRANGER: 1}), busy(17)])
    assert [text.partition(":")[0] for text in played_round.trouble] == ["GPU 0 is used by another process"]


def test_a_foreign_process_that_ends_within_the_round_keeps_its_name(child):
    child.stdout.readline()
    script, watch = watching(IDLE)
    script.readings, script.asked = [[busy(17, {ENGINE: 16, child.pid: 1})]], []
    name = in_words(child.pid, GIB)
    with (watched := RoundWatch(watch)):
        script.wait_for(2)
        child.stdin.close()
        child.wait(10)
        script.readings = [[busy(17, {ENGINE: 16})]]
    assert watched.result().trouble == (f"GPU 0 is used by another process: {name}",)


@pytest.mark.parametrize("limit", ["thermal slow-down", "hardware slow-down", "power brake"])
def test_a_limit_other_than_the_power_cap_is_trouble(limit):
    script, watch = watching(IDLE)
    hot = [busy(17, {ENGINE: 16}, limits=(limit,), temperature_c=91.0)]
    script.readings, script.asked = [hot], []
    with (watched := RoundWatch(watch)):
        script.wait_for(3)
    assert watched.result().trouble == (f"GPU 0: {limit} in 100% of the samples, 91 degrees at most",)


def test_a_limit_in_a_single_sample_is_none():
    script, watch = watching(IDLE)
    cool = [busy(17, {ENGINE: 16})]
    assert played(script, watch, cool, [busy(17, limits=("thermal slow-down",))], cool).trouble == ()


@pytest.mark.parametrize("limit", ["power cap", "clocks set lower"])
def test_the_power_cap_and_chosen_clocks_are_no_trouble(limit):
    script, watch = watching(IDLE)
    played_round = played(script, watch, *[[busy(17, {ENGINE: 16}, limits=(limit,), sm_clock_mhz=1200.0)]] * 6)
    assert (played_round.trouble, played_round.power_capped) == ((), float(limit == "power cap"))


@pytest.mark.parametrize(
    ("clock", "trouble", "warnings"), [(900.0, 1, 0), (1200.0, 0, 1), (1800.0, 0, 0)], ids=["half", "below 90 %", "near"]
)
def test_low_clocks_without_a_limit_warn_and_very_low_ones_are_trouble(clock, trouble, warnings):
    script, watch = watching(IDLE)
    played_round = played(script, watch, *[[busy(17, {ENGINE: 16}, sm_clock_mhz=clock)]] * 6)
    text = f"GPU 0: ran at {clock:,.0f} of 1,980 MHz while busy, and the driver names no limit"
    assert (played_round.trouble, played_round.warnings) == ((text,) * trouble, (text,) * warnings)


def test_where_no_processes_are_told_the_devices_use_counts():
    script, watch = watching(IDLE)
    played_round = played(script, watch, [busy(17)], [busy(19)], [busy(18)])
    assert (played_round.peak_bytes, played_round.end_bytes) == ((int(18.5 * GIB),), (int(17.5 * GIB),))


def test_where_only_processes_are_told_theirs_counts():
    script, watch = watching(replace(IDLE, used_bytes=None))
    played_round = played(script, watch, *[[replace(busy(0, {ENGINE: 16}), used_bytes=None)]] * 3)
    assert (played_round.peak_bytes, played_round.trouble) == ((16 * GIB,), ())


def test_two_samples_of_many_are_no_slow_down():
    script, watch = watching(IDLE)
    cool, slow = [busy(17, {ENGINE: 16})], [busy(17, limits=("hardware slow-down",))]
    assert played(script, watch, *[cool] * 250, slow, slow, cool).trouble == ()


def test_low_clocks_of_an_idle_gpu_are_none():
    script, watch = watching(IDLE)
    played_round = played(script, watch, *[[busy(17, {ENGINE: 16}, sm_clock_mhz=345.0, utilization=0.1)]] * 6)
    assert (played_round.trouble, played_round.sm_clock_mhz, played_round.power_capped) == ((), None, None)


@pytest.mark.parametrize(("errors", "words"), [(1, "1 memory error"), (2, "2 memory errors")])
def test_memory_errors_that_could_not_be_corrected_are_trouble(errors, words):
    script, watch = watching(IDLE)
    watch.noted = [Totals(uncorrected_errors=3)]
    script.counters = [[Totals(uncorrected_errors=3)], [Totals(uncorrected_errors=3 + errors)]]
    played_round = played(script, watch, [busy(17, {ENGINE: 16})])
    assert played_round.trouble == (f"GPU 0: {words} that ECC could not correct",)


def test_memory_errors_between_two_rounds_count_against_the_second_and_only_once():
    script, watch = watching(IDLE)
    script.counters = [[Totals(uncorrected_errors=n)] for n in (0, 0, 2, 2, 2)]
    watch.noted = [Totals(uncorrected_errors=0)]
    rounds = [played(script, watch, [busy(17, {ENGINE: 16})]).trouble for _ in range(3)]
    assert rounds == [(), ("GPU 0: 2 memory errors that ECC could not correct",), ()]


def test_a_critical_event_before_the_round_or_within_is_trouble():
    script, watch = watching(IDLE, IDLE)
    script.counters = [[Totals(), Totals(events=("XID 63",))], [Totals(events=("XID 79",)), Totals()]]
    played_round = played(script, watch, [busy(17, {ENGINE: 16}), busy(17, {ENGINE: 16})])
    assert played_round.trouble == ("GPU 0: XID 79", "GPU 1: XID 63")


def test_events_before_the_engine_are_not_its_own():
    script = Script([IDLE])
    script.counters = [[Totals(events=("XID 79",))], [Totals()]]
    watch = GpuWatch(script, [Gpu(0, "GPU-0", "H200", 140 * GIB)])
    assert played(script, watch, [IDLE]).trouble == ()


def test_a_gpu_that_stops_to_tell_its_memory_is_trouble():
    script, watch = watching(IDLE)
    played_round = played(script, watch, [busy(17, {ENGINE: 16})], [Reading()])
    assert played_round.trouble == ("GPU 0 no longer tells how much of its memory is in use",)


def test_gpus_that_cannot_be_read_are_trouble_and_not_a_crash():
    script, watch = watching(IDLE)
    script.counters = [NOT_TOLD]
    played_round = played(script, watch, NOT_TOLD)
    why = "the GPUs could not be watched: NVML: GPU 0 (GPU-0) is no longer there"
    assert replace(played_round, cpu_share=None) == GpuRound((None,), (None,), trouble=(why,))
    script.readings = [NOT_TOLD]
    watch.mark_started()
    assert (watch.started, watch.wait_until_undisturbed(0.0)) == ((None,), False)


# ---------------------------------------------------------------------------------------------------------- figures


def read(*samples: Sequence[Reading], first: Sequence[Totals], last: Sequence[Totals], duration_s: float = 1.0) -> RoundReadings:
    """What was read in a round of as many GPUs as there are counters."""
    count = len(first)
    return RoundReadings(gpus(count), [IDLE] * count, samples, first, first, last, duration_s, {ENGINE})


def test_energy_is_the_difference_of_the_counters_summed_over_the_gpus():
    first, last = [Totals(100.0), Totals(200.0)], [Totals(700.0), Totals(1000.0)]
    played_round = summarize(read([busy(17, {ENGINE: 16})] * 2, first=first, last=last, duration_s=2.0))
    assert (played_round.energy_j, played_round.power_w) == (1400.0, 700.0)


def test_energy_is_that_of_the_round_alone():
    script, watch = watching(IDLE, IDLE)
    script.counters = [[Totals(100.0), Totals(200.0)], [Totals(700.0), Totals(1000.0)]]
    began_s = time.perf_counter()
    played_round = played(script, watch, [busy(17, {ENGINE: 16})] * 2)
    assert played_round.energy_j == 1400.0
    assert played_round.power_w > 1400.0 / (time.perf_counter() - began_s)


@pytest.mark.parametrize("counters", [[(100.0, None), (200.0, None)], [(100.0, 900.0), (200.0, 3.0)]], ids=["missing", "reset"])
def test_energy_that_is_not_told_of_every_gpu_is_none(counters):
    script, watch = watching(IDLE, IDLE)
    script.counters = [[Totals(first), Totals(second)] for first, second in counters]
    played_round = played(script, watch, [busy(17, {ENGINE: 16}), busy(17, {ENGINE: 16})])
    assert (played_round.energy_j, played_round.power_w) == (None, None)


def test_utilization_is_a_mean_the_clock_a_median_and_heat_the_most():
    samples = [
        [busy(17, {ENGINE: 16}, utilization=share, sm_clock_mhz=clock, temperature_c=heat)]
        for share, clock, heat in ((0.0, 345.0, 40.0), (1.0, 1900.0, 51.0), (0.6, 1700.0, 50.0))
    ]
    played_round = summarize(read(*samples, first=[Totals()], last=[Totals()]))
    assert played_round.utilization == pytest.approx(1.6 / 3)
    assert (played_round.sm_clock_mhz, played_round.temperature_c) == (1800.0, 51.0)


@pytest.mark.parametrize("seen", [[Totals(700.0), Totals(200.0)], [Totals(100.0), Totals(200.0)]], ids=["one", "both"])
def test_an_energy_counter_that_stands_still_tells_nothing(seen):
    counters = [Totals(100.0), Totals(200.0)]
    assert summarize(read([busy(17, {ENGINE: 16})] * 2, first=counters, last=seen)).energy_j is None


def test_a_clock_and_a_heat_of_zero_are_not_known():
    samples = [[busy(17, {ENGINE: 16}, sm_clock_mhz=0.0, temperature_c=0.0)]] * 9
    played_round = summarize(read(*samples, first=[Totals()], last=[Totals()]))
    assert (played_round.sm_clock_mhz, played_round.temperature_c) == (None, None)
    assert not played_round.trouble


def test_utilization_without_a_sample_is_not_known():
    played_round = summarize(read(first=[Totals()], last=[Totals()]))
    assert (played_round.utilization, played_round.power_capped, played_round.peak_bytes) == (None, None, (None,))


def test_memory_does_not_grow_within_a_single_round():
    _, watch = watching(IDLE)
    used = summarize(read(*[[busy(17, {ENGINE: 16})]] * 3, first=[Totals()], last=[Totals()]))
    assert rank_memory(watch, [used])[0].grown_bytes is None
    assert rank_memory(watch, [used, used])[0].grown_bytes == 0


# ------------------------------------------------------------------------------------------------------- the thread


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "llmperf-gpus"]


def test_nothing_is_sampled_outside_of_rounds():
    script, watch = watching(IDLE)
    assert script.asked == [True]
    with RoundWatch(watch):
        script.wait_for(3)
        assert threads() == ["llmperf-gpus"]
    assert threads() == []


def test_the_sampling_ends_also_when_the_round_fails():
    _, watch = watching(IDLE)
    with pytest.raises(pytest.fail.Exception), RoundWatch(watch):
        pytest.fail("of the client")
    assert threads() == []


def test_the_share_of_a_core_that_the_sampling_took_is_told():
    script, watch = watching(IDLE)
    assert 0 < (played(script, watch, *[[IDLE]] * 20).cpu_share or 0) <= 1


# ------------------------------------------------------------------------------------------------------ held and calm


def test_memory_that_comes_back_is_waited_for():
    script, watch = watching(IDLE)
    script.readings = [[busy(17, {ENGINE: 16})], [busy(17, {})], [IDLE]]
    assert watch.wait_until_released(60.0) == {}


def test_memory_that_does_not_come_back_is_named_with_its_user():
    script, watch = watching(IDLE, IDLE, IDLE)
    script.readings = [[IDLE, busy(16.5, {os.getpid(): 16}), busy(4.5, {})]]
    assert watch.wait_until_released(0.0) == {
        "GPU-1": f"GPU 1 still has 16.0 GiB more in use than before its engine: {in_words(os.getpid(), 16 * GIB)}",
        "GPU-2": "GPU 2 still has 4.0 GiB more in use than before its engine, and the driver names no process that has it",
    }


def test_some_memory_more_than_before_is_the_drivers():
    script, watch = watching(IDLE)
    script.readings = [[busy(0.7, {})]]
    assert watch.wait_until_released(0.0) == {}


def test_a_gpu_that_stops_telling_its_memory_has_not_given_it_back():
    script, watch = watching(IDLE)
    script.readings = [[Reading()]]
    assert watch.wait_until_released(0.0) == {"GPU-0": "GPU 0 no longer tells how much of its memory is in use"}


def test_a_gpu_that_never_told_its_memory_holds_none():
    _, watch = watching(Reading())
    assert watch.wait_until_released(0.0) == {}


@pytest.mark.parametrize("wrong", [busy(17, limits=("thermal slow-down",)), busy(17, {ENGINE: 16, STRANGER: 1})])
def test_calm_is_waited_for(wrong):
    script, watch = watching(IDLE)
    script.readings = [[wrong], [wrong], [busy(17, {ENGINE: 16}, limits=("power cap",))]]
    assert watch.wait_until_undisturbed(60.0)
    assert len(script.readings) == 1


def test_calm_that_does_not_come_is_not_waited_for_longer():
    script, watch = watching(IDLE)
    script.readings = [[busy(17, limits=("power brake",))]]
    assert not watch.wait_until_undisturbed(0.0)
