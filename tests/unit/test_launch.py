"""One launch on a running engine: when another load process is started, and what travels with the launch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from odd_servers import TGI, VLLM, odd_server
from pytest_llmperf.measure import audit
from pytest_llmperf.measure.client.processes import LoadClient
from pytest_llmperf.measure.engines.opening import open_engine
from pytest_llmperf.measure.launch import RoundSettings, measure_launch
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.plan.engine import EngineSpec
from pytest_llmperf.testing import Clock, Options, SimulatedEngine

if TYPE_CHECKING:
    from pytest_llmperf.measure.client.messages import RoundLog, RoundPlan

CLOCK = Clock(step_s=2e-3, sequence_s=0.0, prefill_token_s=0.0)
SETTINGS = RoundSettings(nonce="case", rounds=2)


@pytest.mark.parametrize(("busy", "processes"), [(-1.0, 3), (2.0, 1)])
def test_another_process_helps_where_the_warm_up_kept_one_busy(
    busy: float, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "BUSY", busy)
    monkeypatch.setattr(audit, "MOST_PROCESSES", 3)
    workload = workload_from(Axes(), {"prompt_tokens": 8, "output_tokens": 5, "requests": 12, "concurrency": 4})
    with SimulatedEngine(Options(clock=CLOCK)) as served, LoadClient() as client:
        with open_engine(EngineSpec(kind="url", url=served.url)) as engine:
            launch = measure_launch(engine, client, workload, SETTINGS)
        assert client.processes == processes
    assert launch.invalid == ()
    assert len(launch.rounds) == 2


def test_a_launch_carries_its_classes_and_what_its_reader_should_know() -> None:
    classes = {"short": {"share": 1, "prompt_tokens": 8}, "long": {"share": 1, "prompt_tokens": 64}}
    workload = workload_from(Axes(concurrency=4), {"classes": classes, "output_tokens": 5, "requests": 8})
    with (
        SimulatedEngine(Options(clock=CLOCK)) as served,
        LoadClient() as client,
        open_engine(EngineSpec(kind="url", url=served.url)) as engine,
    ):
        launch = measure_launch(engine, client, workload, SETTINGS)
    assert launch.rounds[0].metrics["short/requests_per_s"]
    assert launch.metrics["long/e2e_p99_s"]
    assert "12 requests or more have one" in launch.warnings[0]


class _UnstampedClient(LoadClient):
    """Load processes on a kernel that stamps no arrival."""

    def play(self, plan: RoundPlan) -> RoundLog:
        log = super().play(plan)
        return replace(log, kernel_stamps=0, clock_stamps=log.kernel_stamps)


def test_arrivals_without_the_kernels_stamps_are_told() -> None:
    workload = workload_from(Axes(concurrency=2), {"prompt_tokens": 8, "output_tokens": 5, "requests": 8})
    warnings = {}
    for client_class in (LoadClient, _UnstampedClient):
        with odd_server(VLLM) as server, client_class() as client, open_engine(EngineSpec(kind="url", url=server.url)) as engine:
            warnings[client_class] = measure_launch(engine, client, workload, SETTINGS).warnings
    assert audit.UNSTAMPED in warnings[_UnstampedClient]
    assert audit.UNSTAMPED not in warnings[LoadClient]


def test_words_in_the_place_of_token_ids_are_told() -> None:
    workload = workload_from(Axes(concurrency=2), {"prompt_tokens": 8, "output_tokens": 5, "requests": 8})
    for habits, told in ((TGI, True), (VLLM, False)):
        with odd_server(habits) as server, LoadClient() as client, open_engine(EngineSpec(kind="url", url=server.url)) as engine:
            launch = measure_launch(engine, client, workload, SETTINGS)
        assert any("takes no token ids" in warning for warning in launch.warnings) == told
