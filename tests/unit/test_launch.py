"""One launch on a running engine: when another load process is started, and what travels with the launch."""

from __future__ import annotations

import pytest

from pytest_llmperf.measure import audit
from pytest_llmperf.measure.client.processes import LoadClient
from pytest_llmperf.measure.engines.opening import open_engine
from pytest_llmperf.measure.launch import RoundSettings, measure_launch
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.plan.engine import EngineSpec
from pytest_llmperf.testing import Clock, Options, SimulatedEngine

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
