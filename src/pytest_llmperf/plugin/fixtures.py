"""The fixtures: the running engine, the measuring calls, the baseline, and the seams that a project can override.

pytest imports this file in every run, so what measures is imported inside them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.plugin.state import ITEM, run_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_llmperf.measure.engines.engine import Engine
    from pytest_llmperf.plan.axes import Axes
    from pytest_llmperf.plugin.measuring import BaselineView, LLMPerf, Sweep
    from pytest_llmperf.run.launches import Bench
    from pytest_llmperf.testing import SimulatedEngine


@pytest.fixture
def llmperf_axes(request: pytest.FixtureRequest) -> Axes:
    """Return the point of the grid that this test runs on; parametrized by marker and options."""
    axes: Axes = request.param
    return axes


@pytest.fixture(scope="session")
def llm_engine_args() -> dict[str, Any]:
    """Return engine arguments to merge into the spec, e.g. `{"max_num_seqs": 64}`; override it in your conftest.py."""
    return {}


@pytest.fixture(scope="session")
def llm_engine_url() -> str | None:
    """Return an endpoint to use instead of starting an engine; override it in your conftest.py."""
    return None


@pytest.fixture(scope="session")
def llm_workload() -> dict[str, Any]:
    """Return defaults for the workload of `llmperf(...)`; override it in your conftest.py."""
    return {}


@pytest.fixture(scope="session")
def llmperf_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the engines' logs; pytest keeps those of the last three runs."""
    return tmp_path_factory.mktemp("llmperf")


def _bench(request: pytest.FixtureRequest, log_folder: Path) -> Bench:
    from pytest_llmperf.run.launches import Bench

    kept = request.node.stash[ITEM]
    return Bench(run_of(request.config), kept.planned, kept.states, log_folder)


@pytest.fixture
def llm_engine(
    request: pytest.FixtureRequest,
    llmperf_axes: Axes,
    llmperf_logs: Path,
    llm_engine_args: dict[str, Any],
    llm_engine_url: str | None,
) -> Engine:
    """Return the running engine of this test: `.spec`, `.url`, `.headers`, `.gpus`, `.startup_s`, `.log_path`, `.generate()`."""
    from pytest_llmperf.plan.kinds import kind_of
    from pytest_llmperf.plugin.measuring import failing
    from pytest_llmperf.plugin.session import skip_or_fail
    from pytest_llmperf.run.launches import own_spec

    bench = _bench(request, llmperf_logs)
    wanted = bench.plan.marker.kind
    with failing():
        spec = own_spec(bench.plan.spec, llm_engine_args, llm_engine_url)
        kind = kind_of(spec.kind)
        if wanted and not kind_of(wanted).serves and (kind.commanded or not kind.starts):
            pytest.skip(
                f"its marker says engine={wanted!r}, an engine without a server, and"
                f" {spec.url.partition('?')[0] or 'this one'} is a server"
            )
        skip_or_fail(request.node, spec)
        return bench.acquire(spec)


@pytest.fixture
def llmperf(
    request: pytest.FixtureRequest,
    llm_engine: Engine,
    llmperf_axes: object,  # parametrizes the test, also where a project's own llm_engine does not ask for it
    llmperf_logs: Path,
    llm_workload: dict[str, Any],
) -> LLMPerf:
    """Return a callable that measures a workload on this test's engine."""
    from pytest_llmperf.plugin.measuring import LLMPerf

    return LLMPerf(_bench(request, llmperf_logs), llm_engine, llm_workload, request.path.parent)


@pytest.fixture
def llmperf_sweep(
    request: pytest.FixtureRequest,
    llmperf_axes: object,  # parametrizes the test
    llmperf_logs: Path,
    llm_engine_args: dict[str, Any],
    llm_engine_url: str | None,
    llm_workload: dict[str, Any],
) -> Sweep:
    """Return a callable that measures a workload at every TP degree of the test; see docs/scaling.md."""
    from pytest_llmperf.plugin.measuring import Sweep, failing
    from pytest_llmperf.plugin.session import sweep_degrees
    from pytest_llmperf.run.launches import own_spec

    if other := {"llmperf", "llm_engine"}.intersection(request.fixturenames):
        pytest.fail(f"llmperf_sweep and {other.pop()} each start engines of their own: use one of them in a test", pytrace=False)
    bench = _bench(request, llmperf_logs)
    with failing():
        spec = own_spec(bench.plan.spec, llm_engine_args, llm_engine_url)
    return Sweep(bench, spec, sweep_degrees(request.node, spec), llm_workload, request.path.parent)


@pytest.fixture
def simulated_engine() -> Iterator[SimulatedEngine]:
    """Yield a running simulated engine with default options; its `.url` is an OpenAI-compatible endpoint."""
    from pytest_llmperf.testing import SimulatedEngine

    with SimulatedEngine() as engine:
        yield engine


@pytest.fixture
def baseline(request: pytest.FixtureRequest) -> BaselineView:
    """Return the stored baselines of this host, to be compared with `==`."""
    from pytest_llmperf.plugin.measuring import BaselineView

    kept = request.node.stash.get(ITEM, None)
    if kept is None:
        pytest.fail("the baseline fixture belongs to a test that measures: ask for the llmperf fixture too", pytrace=False)
    return BaselineView(run_of(request.config), kept.planned.marker)
