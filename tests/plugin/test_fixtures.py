"""The fixtures and seams that a project can override."""

from __future__ import annotations

from pytest_llmperf.testing import Clock, Options, SimulatedEngine
from tests.conftest import SERVING


def test_llm_engine_is_the_running_engine(run):
    source = """
def test_x(llm_engine):
    assert llm_engine.url.startswith("http://127.0.0.1:")
    assert llm_engine.spec.tp == 1
    assert llm_engine.gpus == (0,)
    assert llm_engine.startup_s > 0
    assert "Application startup complete" in llm_engine.log_path.read_text()
    done = llm_engine.generate("hello there", max_tokens=3)
    assert done.output_tokens == 3
"""
    assert run(source).outcomes == {"passed": 1}


def test_llm_engine_args_are_merged_and_the_command_line_wins(run):
    conftest = """
import pytest

@pytest.fixture(scope="session")
def llm_engine_args():
    return {"max_num_seqs": 4, "block_size": 32}
"""
    source = """
def test_x(llm_engine):
    assert dict(llm_engine.spec.args) == {"max-num-seqs": ("2",), "block-size": ("32",)}
"""
    files = {"conftest.py": conftest, "test_it.py": source}
    assert run(files, "--llmperf-engine-args=--max-num-seqs 2").outcomes == {"passed": 1}


def test_the_marker_sets_environment_variables_of_its_engine(run):
    source = """
import pytest

@pytest.mark.llmperf(env={"VLLM_SERVER_DEV_MODE": 0})
def test_x(llm_engine):
    import urllib.error, urllib.request
    assert llm_engine.spec.env == (("VLLM_SERVER_DEV_MODE", "0"),)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(urllib.request.Request(llm_engine.url + "/reset_prefix_cache", method="POST"))
"""
    assert run(source).outcomes == {"passed": 1}


def test_a_measurement_of_a_test_that_is_over_cannot_be_compared(run):
    source = """
KEPT = []

def test_a(llmperf):
    KEPT.append(llmperf(requests=8, output_tokens=2))

def test_b(llmperf, baseline):
    assert KEPT[0] == baseline
"""
    result = run(source, "--llmperf-missing-baseline=record")
    assert result.outcomes == {"passed": 1, "failed": 1}
    assert "was measured by a test that is over" in result.stdout


def test_llm_workload_sets_the_defaults_of_a_call(run):
    source = """
import pytest

@pytest.fixture(scope="session")
def llm_workload():
    return {"prompt_tokens": 7, "output_tokens": 2, "requests": 9}

def test_x(llmperf):
    workload = llmperf(output_tokens=3).case.workload
    assert (workload.prompt_tokens, workload.output_tokens, workload.requests) == (7, 3, 9)
"""
    assert run(source).outcomes == {"passed": 1}


def test_llm_engine_url_uses_an_endpoint_instead_of_starting_one(run):
    with SimulatedEngine() as engine:
        source = f"""
import pytest

@pytest.fixture(scope="session")
def llm_engine_url():
    return {engine.url!r}

def test_x(llm_engine, llmperf):
    assert llm_engine.url == {engine.url!r}
    assert llmperf(requests=8, output_tokens=2)["output_tokens_per_s"] > 0
"""
        result = run(source)
        assert result.outcomes == {"passed": 1}, result.stdout
        assert engine.counters.requests_finished > 16


def test_named_endpoints_are_engines_that_are_measured_and_never_stopped(run):
    with SimulatedEngine() as one, SimulatedEngine(Options(clock=Clock(tp=2))) as two:
        option = f"--llmperf-url=tp1={one.url},tp2={two.url}/v1"
        quick = ("--llmperf-rounds=2", "--llmperf-tolerance=60%")
        recorded = run(SERVING, option, *quick, "--update-baselines", "--llmperf-launches=2", quick=False)
        assert recorded.outcomes == {"passed": 2}, recorded.stdout
        assert set(recorded.statuses) == {"test_it.py::test_serving[tp1-c8]", "test_it.py::test_serving[tp2-c8]"}
        assert run(SERVING, option, *quick, quick=False).outcomes == {"passed": 2}
        assert one.counters.requests_finished > 0
        with SimulatedEngine():
            pass


def test_an_endpoint_that_cannot_be_reached_is_an_error_that_names_it(run):
    result = run(SERVING, "--llmperf-url=http://127.0.0.1:9", "--update-baselines", quick=False)
    assert result.outcomes == {"error": 1}
    assert "http://127.0.0.1:9 cannot be reached" in result.stdout


def test_an_endpoint_takes_its_key_from_the_environment(run):
    with SimulatedEngine(Options(api_key="secret")) as engine:
        source = "def test_x(llmperf):\n    llmperf(requests=8, output_tokens=2)\n"
        refused = run(source, f"--llmperf-url={engine.url}", quick=False)
        assert "wants an API key (HTTP 401); set LLMPERF_API_KEY" in refused.stdout
        accepted = run(source, f"--llmperf-url={engine.url}", quick=False, LLMPERF_API_KEY="secret")
        assert accepted.outcomes == {"passed": 1}, accepted.stdout


def test_an_engine_takes_each_of_several_keys(run):
    source = """
import urllib.request

def test_x(llm_engine, llmperf):
    assert llm_engine.api_key == "first"
    for key in ("first", "second"):
        request = urllib.request.Request(f"{llm_engine.url}/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert urllib.request.urlopen(request, timeout=20).status == 200
    llmperf(requests=8, output_tokens=2)
"""
    result = run(source, "--llmperf-engine=simulated", "--llmperf-engine-args=--api-key first second")
    assert result.outcomes == {"passed": 1}, result.stdout


def test_an_endpoint_that_saw_the_prompts_before_does_not_use_its_cache(run):
    with SimulatedEngine(Options(clock=Clock(prefix_cache=True))) as engine:
        source = """
def test_x(llmperf):
    assert llmperf(prompt_tokens=64, requests=8, output_tokens=2).prefix_cache_hit_tokens == 0
"""
        for _ in range(2):
            assert run(source, f"--llmperf-url={engine.url}", quick=False).outcomes == {"passed": 1}


def test_simulated_engine_is_a_fixture(run):
    assert run("def test_x(simulated_engine):\n    assert simulated_engine.url\n").outcomes == {"passed": 1}


def test_a_measurement_knows_its_metrics_and_nothing_else(run):
    source = """
import pytest

def test_x(llmperf):
    measured = llmperf(requests=8, output_tokens=2)
    assert measured["ttft_p50_s"] == measured.ttft_p50_s > 0
    with pytest.raises(KeyError, match="is not a metric; known are output_tokens_per_s"):
        measured["ttft"]
    with pytest.raises(AttributeError, match="a measurement has no 'ttft'"):
        measured.ttft
    with pytest.raises(KeyError, match="was not measured by this engine"):
        measured["client_cpu_cores"]  # on a virtual clock no load process takes part
"""
    assert run(source).outcomes == {"passed": 1}


def test_an_own_llm_engine_need_not_ask_for_the_axes(run):
    own = """
import pytest
from pytest_llmperf.testing import SimulatedEngine

@pytest.fixture
def llm_engine(request):
    from pytest_llmperf import EngineSpec, open_engine

    with SimulatedEngine() as served, open_engine(EngineSpec(kind="url", url=served.url)) as engine:
        yield engine
"""
    result = run(
        {"test_it.py": "def test_x(llmperf):\n    assert llmperf(requests=8)['output_tokens_per_s'] > 0\n", "conftest.py": own}
    )
    assert result.outcomes == {"passed": 1}, result.stdout


def test_another_workload_on_the_next_launch_fails_and_shows_its_line(run):
    source = """
import itertools

tokens = itertools.count(4)

def test_x(llmperf, baseline):
    assert llmperf(requests=8, output_tokens=next(tokens)) == baseline
"""
    result = run(source, "--update-baselines", "--llmperf-launches=2")
    assert result.outcomes == {"failed": 1}
    assert "another workload or engine than in its first launch" in result.stdout
    assert ">       assert llmperf(requests=8, output_tokens=next(tokens)) == baseline" in result.stdout
