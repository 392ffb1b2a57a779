"""Whether a host can run a case: the reasons in full, the arithmetic against published models, and no guesses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.measure.gpus.device import Gpu
from pytest_llmperf.measure.host.machine import Host
from pytest_llmperf.measure.host.model import bundled_model, model_config, weight_bytes
from pytest_llmperf.measure.host.preflight import (
    device_shortage,
    link_warning,
    model_shortage,
    power_warning,
    shortage,
    smallest_tp,
)
from pytest_llmperf.plan.engine import EngineSpec, parse_engine_args
from pytest_llmperf.plan.needs import Needs

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30
QWEN = "qwen2.5-7b-shape"
QWEN_BYTES = 7_615_616_512 * 2
CPU = Host("AMD EPYC 9554 64-Core Processor", 2, 8 * GIB)


def host(*sizes: float, name: str = "NVIDIA H200", islands: tuple[tuple[int, ...], ...] = ()) -> Host:
    """Return a host with a GPU of so many GiB for each size; `islands` says which are linked with each other."""
    peers = {gpu: tuple(other for other in island if other != gpu) for island in islands for gpu in island}
    devices = tuple(
        Gpu(index, f"GPU-{index}", name, round(size * GIB), peers.get(index, ()), 18 if index in peers else 0)
        for index, size in enumerate(sizes)
    )
    return Host("AMD EPYC 9554 64-Core Processor", 64, 512 * GIB, (name,) * len(sizes), "580.1", devices=devices)


TWO_GPUS = host(140.4, 140.4)
FOUR_GPUS = host(140.4, 140.4, 140.4, 140.4, islands=((0, 1, 2, 3),))


def config(architecture: str = "LlamaForCausalLM", **fields: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "torch_dtype": "bfloat16",
        **fields,
    }


def model(folder: Path, **fields: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def args(text: str) -> Any:
    return parse_engine_args(text, origin="x")


# ------------------------------------------------------------------------------------------------ devices


def test_too_few_gpus_are_told_with_all_the_numbers() -> None:
    assert shortage(EngineSpec(tp=4, pp=2, dp=3), TWO_GPUS) == (
        "needs 24 GPUs (TP 4 x PP 2 x DP 3 = 24), this host has 2 (2x NVIDIA H200)"
    )


def test_too_few_cores_are_told_with_all_the_numbers() -> None:
    assert shortage(EngineSpec(tp=4), CPU) == (
        "needs 4 GPUs (TP 4 x PP 1 x DP 1 = 4), this host has none; on CPU each rank needs a core, and this host has 2"
    )


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        (EngineSpec(tp=2), TWO_GPUS),
        (EngineSpec(tp=2), CPU),
        (EngineSpec(), CPU),
        (EngineSpec(kind="url", url="http://h", tp=64), CPU),
        (EngineSpec(model=QWEN, tp=2), TWO_GPUS),
        (EngineSpec(model=QWEN), CPU),
        (EngineSpec(model="Qwen/Qwen2.5-72B-Instruct", tp=3), host(1, 1, 1)),
    ],
)
def test_a_host_that_suffices_is_no_shortage(spec: EngineSpec, where: Host) -> None:
    assert shortage(spec, where) is None


def test_an_endpoint_is_somebody_elses_host() -> None:
    needs = Needs(min_gpus=8, min_gpu_memory=GIB, gpu="H200", nvlink=True)
    assert shortage(EngineSpec(kind="url", url="http://h", model=QWEN, tp=3), CPU, needs) is None


# ------------------------------------------------------------------------------------------------ what the marker asks for


@pytest.mark.parametrize(
    ("needs", "where", "tp", "reason"),
    [
        (Needs(min_gpus=4), TWO_GPUS, 1, "needs 4 GPUs (the marker's min_gpus), this host has 2 (2x NVIDIA H200)"),
        (Needs(min_gpus=2), CPU, 1, "needs 2 GPUs (the marker's min_gpus), this host has none (no GPU, 2 CPU cores)"),
        (
            Needs(gpu="h100"),
            TWO_GPUS,
            2,
            "needs 2 GPUs with 'h100' in the name (the marker's gpu), this host has 2 (2x NVIDIA H200)",
        ),
        (
            Needs(min_gpu_memory=80 * GIB),
            host(79.6, 79.6, name="NVIDIA H100 80GB HBM3"),
            1,
            "needs 1 GPU of 80.0 GiB or more (the marker's min_gpu_memory), this host has 2 (NVIDIA H100 80GB HBM3: 79.6 GiB);"
            " an 80 GB card has a little less than 80 GiB: write '80 GB'",
        ),
        (
            Needs(min_gpu_memory=80 * GIB, min_gpus=2),
            host(140.4, 79.6),
            1,
            "needs 2 GPUs of 80.0 GiB or more (the marker's min_gpu_memory), this host has 2 (NVIDIA H200: 140.4 GiB,"
            " NVIDIA H200: 79.6 GiB); an 80 GB card has a little less than 80 GiB: write '80 GB'",
        ),
        (
            Needs(min_gpu_memory=80 * GIB),
            CPU,
            1,
            "needs 1 GPU of 80.0 GiB or more (the marker's min_gpu_memory), this host has none (no GPU, 2 CPU cores)",
        ),
        (
            Needs(nvlink=True),
            TWO_GPUS,
            2,
            "needs direct links within the 2 GPUs of TP 2 (the marker's nvlink), this host has 2 (2x NVIDIA H200);"
            " no two are linked",
        ),
        (
            Needs(nvlink=True),
            host(1, 1, 1, 1, islands=((0, 2), (1, 3))),
            4,
            "needs direct links within the 4 GPUs of TP 4 (the marker's nvlink), this host has 4 (4x NVIDIA H200);"
            " they are linked in groups of 2 + 2",
        ),
        (
            Needs(nvlink=True),
            CPU,
            2,
            "needs direct links within the 2 GPUs of TP 2 (the marker's nvlink), this host has none (no GPU, 2 CPU cores);"
            " no two are linked",
        ),
    ],
)
def test_a_demand_that_is_not_met_is_told_with_what_there_is(needs: Needs, where: Host, tp: int, reason: str) -> None:
    assert device_shortage(EngineSpec(tp=tp), where, needs) == reason


@pytest.mark.parametrize(
    ("needs", "where", "spec"),
    [
        (Needs(min_gpus=2), TWO_GPUS, EngineSpec()),
        (Needs(gpu="h200", min_gpu_memory=140 * GIB), TWO_GPUS, EngineSpec(tp=2)),
        (Needs(min_gpu_memory=80 * 10**9), host(79.6), EngineSpec()),
        (Needs(min_gpu_memory=80 * GIB), host(40, 140.4), EngineSpec()),
        (Needs(nvlink=True), TWO_GPUS, EngineSpec()),
        (Needs(nvlink=True), TWO_GPUS, EngineSpec(pp=2)),
        (Needs(nvlink=True), FOUR_GPUS, EngineSpec(tp=4)),
        (Needs(nvlink=True), host(1, 1, 1, 1, islands=((0, 2), (1, 3))), EngineSpec(tp=2, dp=2)),
        (Needs(nvlink=True), host(1, 1, 1, islands=((0, 1), (1, 2))), EngineSpec(tp=3)),
    ],
)
def test_a_demand_that_is_met_is_no_shortage(needs: Needs, where: Host, spec: EngineSpec) -> None:
    assert device_shortage(spec, where, needs) is None


def test_gpus_of_another_name_or_size_do_not_count_for_the_others() -> None:
    mixed = host(140.4, 140.4, 40, 40, islands=((0, 1, 2, 3),))
    assert device_shortage(EngineSpec(tp=4), mixed, Needs(min_gpu_memory=80 * GIB)) is not None
    assert device_shortage(EngineSpec(tp=2), mixed, Needs(min_gpu_memory=80 * GIB, nvlink=True)) is None


def test_gpus_of_unknown_size_are_not_taken_for_large_ones() -> None:
    assert device_shortage(EngineSpec(), replace(TWO_GPUS, devices=()), Needs(min_gpu_memory=GIB)) == (
        "needs 1 GPU of 1.0 GiB or more (the marker's min_gpu_memory), this host does not tell how large its GPUs are"
    )


# ------------------------------------------------------------------------------------------------ links


def test_a_tp_group_over_pcie_is_a_warning_with_what_to_compare() -> None:
    assert link_warning(EngineSpec(tp=2), TWO_GPUS.devices) == (
        "TP 2 over GPUs 0, 1, which direct links (NVLink) do not join: every layer waits for PCIe, which is slower;"
        " compare with --llmperf-tp=1, and with --llmperf-pp=2 in place of TP"
    )


@pytest.mark.parametrize(
    ("spec", "islands", "warned"),
    [
        (EngineSpec(), (), False),
        (EngineSpec(pp=4), (), False),
        (EngineSpec(tp=4), ((0, 1, 2, 3),), False),
        (EngineSpec(tp=4), ((0, 1), (2, 3)), True),
        (EngineSpec(tp=2, pp=2), ((0, 1), (2, 3)), False),
        (EngineSpec(tp=2, dp=2), ((0, 2), (1, 3)), True),
        (EngineSpec(tp=2), ((0, 1),), False),
        (EngineSpec(tp=8), (), False),
        (EngineSpec(kind="url", url="http://h", tp=2), (), False),
    ],
)
def test_only_links_within_a_tp_group_matter(spec: EngineSpec, islands: tuple[tuple[int, ...], ...], warned: bool) -> None:
    assert (link_warning(spec, host(1, 1, 1, 1, islands=islands).devices) is not None) == warned


def test_a_lowered_power_limit_is_a_warning_that_names_the_gpus() -> None:
    first, second = TWO_GPUS.devices
    lowered = replace(second, power_limit_w=500.0, default_power_limit_w=700.0)
    assert power_warning((replace(first, power_limit_w=700.0, default_power_limit_w=700.0), lowered)) == (
        "power limit lowered: GPU 1 (500 W, by default 700 W); slower than others of its kind under load, see"
        " `nvidia-smi -q -d POWER`"
    )
    assert power_warning((first, replace(second, power_limit_w=500.0))) is None  # what is the default is not told


# ------------------------------------------------------------------------------------------------ heads


def test_heads_that_tp_does_not_divide_are_told_with_possible_degrees() -> None:
    assert shortage(EngineSpec(model=QWEN, tp=8), host(*[140.4] * 8)) == (
        "28 attention heads are not divisible by TP 8; TP 1, 2 or 4 would do, or --llmperf-pp"
    )


def test_kv_heads_that_can_be_neither_split_nor_copied_are_told() -> None:
    assert shortage(EngineSpec(model=QWEN, tp=7), host(*[140.4] * 8)) == (
        "4 KV heads can be neither split nor copied evenly over TP 7; TP 1, 2 or 4 would do, or --llmperf-pp"
    )


def test_heads_are_checked_on_cpu_too() -> None:
    assert shortage(EngineSpec(tp=3), replace(CPU, cores=4)) == (
        "4 attention heads are not divisible by TP 3; TP 1, 2 or 4 would do, or --llmperf-pp"
    )


@pytest.mark.parametrize("outer", ["text_config", "llm_config", "language_config", "thinker_config"])
def test_heads_are_found_in_the_config_of_a_model_that_sees(tmp_path: Path, outer: str) -> None:
    inner: dict[str, Any] = {"num_attention_heads": 6}
    fields = {"num_attention_heads": 4, outer: {"text_config": inner} if outer == "thinker_config" else inner}
    assert model_shortage(EngineSpec(model=model(tmp_path, **fields), tp=3), FOUR_GPUS) is None
    assert model_shortage(EngineSpec(model=model(tmp_path, **fields), tp=4), FOUR_GPUS) == (
        "6 attention heads are not divisible by TP 4; TP 1, 2 or 3 would do, or --llmperf-pp"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_key_value_heads": 8},
        {"num_attention_heads": 0},
        {"num_attention_heads": "12"},
        {"num_attention_heads": None, "text_config": None},
        {"num_attention_heads": 9, "num_key_value_heads": 1},
        {"num_attention_heads": 9, "num_key_value_heads": 2, "kv_lora_rank": 512},
    ],
)
def test_heads_that_are_not_told_or_fit_are_no_shortage(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert model_shortage(EngineSpec(model=model(tmp_path, **fields), tp=3), FOUR_GPUS) is None


@pytest.mark.parametrize("text", ["--hf-overrides '{\"a\": 1}'", "--hf-overrides.num_attention_heads 9", "--config serve.yaml"])
def test_engine_arguments_that_may_replace_the_model_end_the_check(text: str) -> None:
    assert shortage(EngineSpec(tp=3, args=args(text)), FOUR_GPUS) is None
    assert shortage(EngineSpec(tp=3, args=args("--max-num-seqs 4")), FOUR_GPUS) is not None


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", "null"])
def test_a_config_that_cannot_be_read_is_left_to_the_engine(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert shortage(EngineSpec(model=str(tmp_path), tp=3), FOUR_GPUS) is None


# ------------------------------------------------------------------------------------------------ how large the weights are


@pytest.mark.parametrize(
    ("published", "fields"),
    [
        (7_615_616_512, model_config(QWEN)),
        (494_032_768, model_config("qwen2.5-0.5b-shape")),
        (8_030_261_248, config()),  # Llama 3.1 8B
        (
            1_235_814_400,  # Llama 3.2 1B
            config(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True),
        ),
        (7_241_732_096, config("MistralForCausalLM", vocab_size=32000)),  # Mistral 7B
        (
            3_821_079_552,  # Phi-3 mini
            config("Phi3ForCausalLM", hidden_size=3072, intermediate_size=8192, num_key_value_heads=None, vocab_size=32064),
        ),
        (
            596_049_920,  # Qwen3 0.6B
            config(
                "Qwen3ForCausalLM",
                **{"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
                **{"head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
            ),
        ),
        (46_702_792_704, config("MixtralForCausalLM", vocab_size=32000, num_local_experts=8)),  # Mixtral 8x7B
        (
            30_532_122_624,  # Qwen3 30B A3B
            config(
                "Qwen3MoeForCausalLM",
                **{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_key_value_heads": 4},
                **{"head_dim": 128, "vocab_size": 151936, "num_experts": 128, "moe_intermediate_size": 768},
            ),
        ),
        (
            14_315_784_192,  # Qwen1.5 MoE A2.7B
            config(
                "Qwen2MoeForCausalLM",
                **{"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16},
                **{"num_key_value_heads": 16, "vocab_size": 151936, "num_experts": 60, "moe_intermediate_size": 1408},
                shared_expert_intermediate_size=5632,
            ),
        ),
    ],
)
def test_parameters_are_exactly_those_of_the_published_models(published: int, fields: dict[str, Any]) -> None:
    assert weight_bytes({**fields, "torch_dtype": "bfloat16"}, None) == 2 * published


def parameters(fields: dict[str, Any]) -> int:
    return (weight_bytes({**fields, "torch_dtype": "bfloat16"}, None) or 0) // 2


def test_biases_count_where_the_config_switches_them_on() -> None:
    plain = config(num_hidden_layers=1)
    # q, k, v over 32 + 2 x 8 heads of 128, and the output; gate, up and down.
    assert parameters({**plain, "attention_bias": True}) - parameters(plain) == 48 * 128 + 4096
    assert parameters({**plain, "mlp_bias": True}) - parameters(plain) == 2 * 14336 + 4096


def test_dense_layers_among_experts_count_as_dense() -> None:
    moe = config("Qwen3MoeForCausalLM", num_hidden_layers=4, head_dim=128, num_experts=16, moe_intermediate_size=768)
    dense_less_sparse = 3 * 4096 * 14336 - (16 * 3 * 4096 * 768 + 4096 * 16)
    every = parameters(moe)
    assert parameters({**moe, "decoder_sparse_step": 2}) - every == 2 * dense_less_sparse
    assert parameters({**moe, "mlp_only_layers": [0, 2, 3]}) - every == 3 * dense_less_sparse


@pytest.mark.parametrize(("tp", "loaded_gib"), [(1, 14.29), (2, 7.16)])
def test_the_weights_are_a_little_less_than_vllm_says_it_loaded(tp: int, loaded_gib: float) -> None:
    # vLLM's "Model loading took ... GiB" on H200: its buffers are in it too.
    share = (weight_bytes(model_config(QWEN), bundled_model(QWEN)) or 0) / tp / GIB / loaded_gib
    assert 0.985 < share < 1


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 512},
        {"architectures": []},
        {"architectures": [["LlamaForCausalLM"]]},
        {"architectures": None},
        {"torch_dtype": None},
        {"torch_dtype": "float64"},
        {"torch_dtype": "bfloat16", "text_config": {"dtype": "float32"}},
        {"vocab_size": "128256"},
        {"intermediate_size": [14336] * 32},
        {"bias": True},
        {"architectures": ["MistralForCausalLM"], "num_key_value_heads": None},
        {"architectures": ["MistralForCausalLM"], "attention_bias": True},
        {"architectures": ["Qwen3ForCausalLM"], "head_dim": None},
        {"architectures": ["MixtralForCausalLM"]},
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "head_dim": 128,
            "num_experts": 8,
            "moe_intermediate_size": 8,
            "mlp_only_layers": 3,
        },
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        {"quantization_config": {"quant_method": "awq"}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4.5}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4.0}},
        {"quantization_config": "fp8"},
        {"compression_config": {"quant_method": "fp8"}},
    ],
)
def test_what_is_not_known_is_not_guessed(change: dict[str, Any]) -> None:
    assert weight_bytes({**config(), **change}, None) is None


@settings(deadline=None)
@given(
    st.sampled_from(sorted(config())),
    st.one_of(st.none(), st.text(max_size=3), st.integers(-1, 3), st.floats(), st.lists(st.integers(), max_size=2)),
)
def test_a_config_with_odd_values_is_never_an_error(name: str, value: object) -> None:
    size = weight_bytes({**config(), name: value}, None)
    assert size is None or size > 0


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", "torch.bfloat16"])
def test_every_usual_type_takes_two_bytes_even_32_bits(name: str, kind: str) -> None:
    fields = {**config(), "torch_dtype": None, name: kind}
    assert weight_bytes(fields, None) == 2 * 8_030_261_248


@pytest.mark.parametrize(
    ("quantization", "linear_bytes"),
    [
        ({"quant_method": "fp8"}, 1.0),
        ({"quant_method": "awq", "bits": 4}, 0.5),
        ({"quant_method": "gptq", "bits": 8}, 1.0),
        ({"quant_method": "gptq", "bits": 3}, 0.375),
    ],
)
def test_quantization_shrinks_the_matrices_of_the_layers_only(quantization: dict[str, Any], linear_bytes: float) -> None:
    linear = 32 * (4096 * 48 * 128 + 4096 * 4096 + 3 * 4096 * 14336)
    others = 8_030_261_248 - linear
    assert weight_bytes(config(quantization_config=quantization), None) == linear * linear_bytes + others * 2


def index(folder: Path, text: str) -> Path:
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        config(),
        {"torch_dtype": "bfloat16"},
        {"text_config": {"dtype": "float16"}},
        {"quantization_config": {"quant_method": "mxfp4"}},
    ],
)
def test_the_index_of_the_files_knows_best(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert weight_bytes(fields, index(tmp_path, '{"metadata": {"total_size": 12345678}}')) == 12_345_678


def test_the_index_of_files_in_32_bits_is_not_what_is_loaded(tmp_path: Path) -> None:
    folder = index(tmp_path, '{"metadata": {"total_size": 32121044992}}')
    assert weight_bytes(config(torch_dtype="float32"), folder) == 2 * 8_030_261_248
    assert weight_bytes({"torch_dtype": "float32"}, folder) is None


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"metadata": null}', '{"metadata": {"total_size": "9"}}', '{"metadata": {"total_size": 0}}']
)
def test_an_index_without_a_size_is_as_none(tmp_path: Path, text: str) -> None:
    assert weight_bytes(config(), index(tmp_path, text)) == 2 * 8_030_261_248
    assert weight_bytes({"torch_dtype": "bfloat16"}, tmp_path) is None


# ------------------------------------------------------------------------------------------------ whether they fit


def test_weights_that_do_not_fit_are_told_with_the_arithmetic() -> None:
    eager = args("--gpu-memory-utilization 0.9")
    assert shortage(EngineSpec(model=QWEN, args=eager), host(8, 8)) == (
        "the weights of qwen2.5-7b-shape take 14.2 GiB / (TP 1 x PP 1) = 14.2 GiB on each GPU, more than the 0.9 x 8.0 GiB that"
        " vLLM may use; a TP degree of 2 or more would fit"
    )


def test_a_degree_that_takes_more_gpus_than_there_are_says_so() -> None:
    assert shortage(EngineSpec(model=QWEN, tp=2), host(4, 4)) == (
        "the weights of qwen2.5-7b-shape take 14.2 GiB / (TP 2 x PP 1) = 7.1 GiB on each GPU, more than the 0.92 x 4.0 GiB that"
        " vLLM may use; a TP degree of 4 or more would fit, on 4 GPUs where this host has 2"
    )


def test_where_no_degree_fits_other_ways_are_named() -> None:
    reason = shortage(EngineSpec(model=QWEN), host(0.25)) or ""
    assert reason.endswith("; no TP degree alone would fit: add --llmperf-pp, or take a quantized model")


def test_pipeline_stages_share_the_weights() -> None:
    assert shortage(EngineSpec(model=QWEN, pp=2), host(8, 8)) is None
    assert shortage(EngineSpec(model=QWEN, dp=2), host(8, 8)) is not None


@pytest.mark.parametrize(
    ("text", "fits"), [("", True), ("--gpu-memory-utilization 0.85", False), ("--gpu-memory-utilization=x", True)]
)
def test_what_vllm_may_use_of_a_gpu_decides(text: str, fits: bool) -> None:
    size = QWEN_BYTES / GIB / 0.9
    assert (shortage(EngineSpec(model=QWEN, args=args(text)), host(size)) is None) == fits


def test_of_unequal_gpus_the_largest_are_counted() -> None:
    assert shortage(EngineSpec(model=QWEN), host(8, 24)) is None
    assert shortage(EngineSpec(model=QWEN), host(24, 8)) is None
    assert "more than the 0.92 x 6.0 GiB" in (shortage(EngineSpec(model=QWEN, tp=2), host(6, 24)) or "")


@pytest.mark.parametrize(
    "text",
    [
        "--quantization fp8",
        "-q fp8",
        "--cpu-offload-gb 10",
        "--dtype float32",
        "--load-format bitsandbytes",
        "--runner pooling",
        "--kv-cache-memory-bytes 1G",
        "--hf-overrides '{\"num_hidden_layers\": 2}'",
    ],
)
def test_engine_arguments_that_change_what_the_weights_take_end_the_check(text: str) -> None:
    assert shortage(EngineSpec(model=QWEN, args=args(text)), host(8)) is None


@pytest.mark.parametrize("text", ["", "--dtype float16", "--load-format dummy", "--max-model-len 64"])
def test_other_engine_arguments_do_not(text: str) -> None:
    assert shortage(EngineSpec(model=QWEN, args=args(text)), host(8)) is not None


def test_gpus_of_unknown_size_are_no_reason_to_refuse_a_model() -> None:
    assert shortage(EngineSpec(model=QWEN), replace(host(8), devices=())) is None


def test_experts_that_dp_spreads_are_not_counted(tmp_path: Path) -> None:
    mixtral = config("MixtralForCausalLM", vocab_size=32000, num_local_experts=8)
    spec = EngineSpec(model=model(tmp_path, **mixtral))
    assert shortage(spec, host(80, 80)) is not None
    assert shortage(replace(spec, dp=2), host(80, 80)) is None


@pytest.mark.parametrize(
    ("gpu_gib", "most", "expected"),
    [(80, 8, 1), (15, 8, 2), (8, 8, 2), (7, 8, 4), (4, 8, 4), (4, 2, None), (3, 8, None), (1, 64, 28)],
)
def test_the_smallest_degree_fits_and_divides_the_heads(gpu_gib: float, most: int, expected: int | None) -> None:
    fields = {**model_config(QWEN), "intermediate_size": 18944}
    if expected == 28:  # 18944 is not divisible by 7
        fields["intermediate_size"] = 18928
    assert smallest_tp(fields, None, round(gpu_gib * GIB), 0.9, most) == expected


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200), st.floats(0.1, 1), st.integers(1, 64))
def test_more_memory_never_asks_for_a_larger_degree(gpu_gib: int, utilization: float, most: int) -> None:
    fields = model_config(QWEN)
    less = smallest_tp(fields, None, gpu_gib * GIB, utilization, most)
    more = smallest_tp(fields, None, (gpu_gib + 1) * GIB, utilization, most)
    assert less is None or (more is not None and more <= less <= most)


def test_an_unknown_model_has_no_smallest_degree() -> None:
    assert smallest_tp({}, None, 80 * GIB, 0.9, 8) is None


# ------------------------------------------------------------------------------------------------ models that ship


MODELS = (
    "tiny", "qwen2.5-0.5b-shape", "qwen2.5-7b-shape", "qwen3-30b-a3b-shape", "llama-3.1-8b-shape", "llama-3.3-70b-shape",
)  # fmt: skip


def test_these_models_ship() -> None:
    folder = bundled_model("tiny")
    assert folder is not None
    assert sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) == sorted(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_bundled_model_is_complete(name: str) -> None:
    folder = bundled_model(name)
    assert folder is not None
    fields = model_config(name)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = json.loads((folder / "tokenizer_config.json").read_text())
    ends = json.loads((folder / "generation_config.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    assert weight_bytes(fields, None) is not None
    assert max(vocabulary.values()) < fields["vocab_size"]
    assert (vocabulary[words["bos_token"]], vocabulary[words["eos_token"]]) == (ends["bos_token_id"], ends["eos_token_id"])
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (ends["bos_token_id"], ends["eos_token_id"])
    assert not list(folder.glob("*.safetensors*"))
