"""What a marker demands of the host, and what the model's shape rules out: a skip with the numbers, or a failure on request."""

from __future__ import annotations

import pytest

BODY = """
def test_it(llmperf):
    llmperf(prompt_tokens=8, output_tokens=2, requests=8)
"""


def marked(arguments, before=""):
    return f"import pytest\n{before}\n@pytest.mark.llmperf({arguments}){BODY}"


DEMANDS = [
    ("min_gpus=4", "needs 4 GPUs (the marker's min_gpus), this host has 2 (2x Simulated"),
    ("gpu='H200'", "needs 1 GPU with 'H200' in the name (the marker's gpu), this host has 2 (2x Simulated"),
    ("min_gpu_memory='4 TB'", "needs 1 GPU of 3725.3 GiB or more (the marker's min_gpu_memory), this host has 2 (Simulated: "),
]


@pytest.mark.parametrize(("arguments", "reason"), DEMANDS)
def test_a_demand_that_the_host_does_not_meet_skips_with_the_numbers(run, arguments, reason):
    result = run(marked(arguments), "-rs", LLMPERF_SIMULATED_GPUS="2")
    assert result.outcomes == {"skipped": 1}
    assert reason in result.stdout
    assert result.engine_starts == 0
    assert "0 compared, 1 not compared (1 SKIPPED)" in result.stdout


def test_a_demand_that_is_not_met_fails_under_require_gpus(run):
    result = run(marked("min_gpus=4"), "--llmperf-require-gpus", LLMPERF_SIMULATED_GPUS="2")
    assert (result.returncode, result.outcomes) == (1, {"error": 1})
    assert "needs 4 GPUs (the marker's min_gpus), this host has 2 (2x Simulated" in result.stdout
    assert "--llmperf-require-gpus turns this skip into a failure" in result.stdout


def test_a_host_that_meets_all_demands_runs_the_test(run):
    result = run(marked("tp=2, min_gpus=2, min_gpu_memory=1, gpu='simul', nvlink=False"), LLMPERF_SIMULATED_GPUS="2")
    assert result.outcomes == {"passed": 1}
    assert result.engine_starts == 1


def test_the_engine_gets_a_gpu_that_meets_the_demand(run, tmp_path):
    (tmp_path / "conditions.json").write_text('{"0": {"total_bytes": 8589934592}}')
    source = marked("min_gpu_memory=100").replace("llmperf):", "llmperf, llm_engine):") + "    assert llm_engine.gpus == (1,)\n"
    result = run(source, LLMPERF_SIMULATED_GPUS="2", LLMPERF_SIMULATED_STATE=str(tmp_path))
    assert result.outcomes == {"passed": 1}, result.stdout


def test_a_classes_demand_holds_until_a_test_says_otherwise(run):
    source = """
import pytest

@pytest.mark.llmperf(gpu="H200")
class TestServing:
    def test_one(self, llmperf):
        llmperf(prompt_tokens=8, output_tokens=2, requests=8)

    @pytest.mark.llmperf(gpu="Simulated")
    def test_two(self, llmperf):
        llmperf(prompt_tokens=8, output_tokens=2, requests=8)
"""
    assert run(source).outcomes == {"passed": 1, "skipped": 1}


def test_a_bad_demand_is_a_usage_error(run):
    result = run(marked("min_gpu_memory='lots'"))
    assert result.returncode == 4
    assert "llmperf(min_gpu_memory='lots'): must be a size above 0, e.g. 80 (GiB), '80 GiB' or '80 GB'" in result.stderr


def test_a_degree_that_does_not_divide_the_heads_names_others(run):
    result = run(marked("tp=[2, 3]"), "-rs")
    assert result.outcomes == {"passed": 1, "skipped": 1}
    assert "4 attention heads are not divisible by TP 3; TP 1, 2 or 4 would do, or --llmperf-pp" in result.stdout


def test_weights_that_do_not_fit_skip_with_the_arithmetic(run):
    result = run(
        marked("model='qwen2.5-7b-shape'"),
        "-rs",
        "--llmperf-engine-args=--gpu-memory-utilization 0.05",
        LLMPERF_SIMULATED_GPUS="4",
    )
    assert result.outcomes == {"skipped": 1}
    assert "the weights of qwen2.5-7b-shape take 14.2 GiB / (TP 1 x PP 1) = 14.2 GiB on each GPU, more than the 0.05 x" in (
        result.stdout
    )
    assert "a TP degree of 4 or more would fit" in result.stdout


SHARE = """
@pytest.fixture
def llm_engine_args():
    return {"gpu_memory_utilization": %s}
"""


def test_what_a_projects_own_engine_arguments_say_is_waited_for(run):
    small, large = SHARE % 0.05, SHARE % 0.5
    assert run(marked("model='qwen2.5-7b-shape'", small)).outcomes == {"skipped": 1}
    assert run(marked("model='qwen2.5-7b-shape'", large)).outcomes == {"passed": 1}


def test_a_model_that_is_not_on_this_machine_is_not_checked(run):
    result = run(marked("model='Qwen/Qwen2.5-72B-Instruct', tp=3"))
    assert result.outcomes == {"passed": 1}


def test_the_markers_help_lists_what_may_be_demanded(run):
    result = run(marked(""), "--markers")
    assert "min_gpus=..., min_gpu_memory=..., gpu=..., nvlink=...)" in result.stdout
