"""A model's files, and what its config.json says of the bytes that its weights take.

Where an architecture is not known, or a setting may change what is loaded, the answer is None: nothing is guessed.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BUNDLED = Path(__file__).parents[2] / "models"


def bundled_model(name: str) -> Path | None:
    """Return the folder of a model that ships with the package (config and tokenizer, no weights), or None."""
    folder = _BUNDLED / name
    return folder if re.fullmatch(r"[\w.-]+", name) and (folder / "config.json").is_file() else None


def model_config(model: str) -> dict[str, Any]:
    """Return a model's config.json where it is a bundled or local folder, else an empty dict."""
    path = (bundled_model(model) or Path(model).expanduser()) / "config.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def config_hash(model: str) -> str | None:
    """Return what tells a bundled or local model's config.json from others; None where there is none.

    The order of its fields says nothing of the model, nor does where it was copied from or what wrote it.
    """
    try:
        config = model_config(model)
    except (OSError, ValueError):
        return None
    facts = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16] if facts else None


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the language model's part of the config of a model that sees or hears; the names differ by model."""
    for name in ("thinker_config", "text_config", "llm_config", "language_config"):
        if isinstance(inner := config.get(name), dict):
            return text_config(inner)
    return config


def weight_bytes(config: dict[str, Any], folder: Path | None) -> int | None:
    """Return the bytes that a decoder model's weights take in vLLM, over all GPUs; None where that is not certain.

    `config` is its config.json. The index of the safetensors in `folder` knows best; without it the parameters are counted.
    Of quantized layers the scales are left out (1 % to 6 %), and vLLM's own buffers too (0.7 % for 7 billion parameters). vLLM
    loads models of 32 bits in 16.
    """
    named = {str(part.get("dtype") or part.get("torch_dtype")) for part in (config, text_config(config))} - {"None"}
    dtype = named.pop().removeprefix("torch.") if len(named) == 1 else None
    stored = None if folder is None else _indexed_bytes(folder)
    if stored is not None and (dtype in ("bfloat16", "float16") or config.get("quantization_config")):
        return stored
    counted = _parameters(config)
    bits = _linear_bits(config)
    if counted is None or bits is None or dtype not in ("bfloat16", "float16", "float32"):
        return None
    linear, others = counted
    return linear * bits // 8 + others * 2


def _indexed_bytes(folder: Path) -> int | None:
    path = folder / "model.safetensors.index.json"
    try:
        size = json.loads(path.read_text())["metadata"]["total_size"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or not as it should be
        return None
    return int(size) if isinstance(size, (int, float)) and not isinstance(size, bool) and size >= 1 else None


def _linear_bits(config: dict[str, Any]) -> int | None:
    """Return the bits of a parameter of a linear layer; None where the quantization is not known."""
    quantized = config.get("quantization_config")
    if config.get("compression_config"):
        return None
    if quantized is None:
        return 16
    method, bits = (quantized.get("quant_method"), quantized.get("bits")) if isinstance(quantized, dict) else (None, None)
    if method == "fp8":
        return 8
    return positive_int(bits) if method in ("awq", "gptq") and bits in (2, 3, 4, 8) else None


@dataclass(frozen=True)
class _Architecture:
    """What a decoder has beyond rotary attention without biases, a gated feed-forward of three matrices and two norms."""

    qkv_bias: bool = False
    head_norms: bool = False
    """Norms of queries and keys within each head; the head size is told then, and is not hidden size / heads."""
    reads_bias: bool = False
    """It heeds `attention_bias` and `mlp_bias`."""
    equal_kv_heads: bool = False
    """Without `num_key_value_heads` there are as many as attention heads."""
    experts: str = ""
    """The key of the number of experts; empty for dense models."""
    expert_size: str = "moe_intermediate_size"
    shared_expert: bool = False


# From vllm/model_executor/models/: one file each; phi3.py is llama.py with fused matrices.
_ARCHITECTURES = {
    "LlamaForCausalLM": _Architecture(reads_bias=True, equal_kv_heads=True),
    "MistralForCausalLM": _Architecture(),
    "Phi3ForCausalLM": _Architecture(equal_kv_heads=True),
    "Qwen2ForCausalLM": _Architecture(qkv_bias=True),
    "Qwen3ForCausalLM": _Architecture(head_norms=True),
    "MixtralForCausalLM": _Architecture(experts="num_local_experts", expert_size="intermediate_size"),
    "Qwen2MoeForCausalLM": _Architecture(qkv_bias=True, experts="num_experts", shared_expert=True),
    "Qwen3MoeForCausalLM": _Architecture(head_norms=True, experts="num_experts"),
}


def _parameters(config: dict[str, Any]) -> tuple[int, int] | None:
    """Return the parameters in the layers' matrices, which quantization shrinks, and all others; None for other architectures."""
    names = config.get("architectures")
    kind = _ARCHITECTURES.get(names[0]) if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else None
    sizes = _sizes(config, "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if kind is None or sizes is None:
        return None
    hidden, layers, heads, vocabulary = sizes
    kv_heads = positive_int(config.get("num_key_value_heads")) or (heads if kind.equal_kv_heads else None)
    head_size = positive_int(config.get("head_dim")) or (None if kind.head_norms else hidden // heads)
    attention_bias, mlp_bias = config.get("attention_bias"), config.get("mlp_bias")
    if kv_heads is None or head_size is None or config.get("bias") or ((attention_bias or mlp_bias) and not kind.reads_bias):
        return None
    feed_forward = _feed_forward(config, kind, hidden, layers)
    if feed_forward is None:
        return None
    qkv = (heads + 2 * kv_heads) * head_size
    linear = layers * (hidden * qkv + heads * head_size * hidden) + feed_forward[0]
    others = layers * 2 * hidden + hidden + feed_forward[1]
    others += vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    others += layers * (2 * head_size if kind.head_norms else 0)
    others += layers * ((qkv if kind.qkv_bias or attention_bias else 0) + (hidden if attention_bias else 0))
    others += layers * (2 * (positive_int(config.get("intermediate_size")) or 0) + hidden if mlp_bias else 0)
    return linear, others


def _feed_forward(config: dict[str, Any], kind: _Architecture, hidden: int, layers: int) -> tuple[int, int] | None:
    """Return the parameters of all feed-forward layers, and of what chooses their experts, which is not quantized."""
    if not kind.experts:
        dense = _sizes(config, "intermediate_size")
        return None if dense is None else (layers * 3 * hidden * dense[0], 0)
    step, skipped = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    names = ["intermediate_size", kind.experts, kind.expert_size] + ["shared_expert_intermediate_size"] * kind.shared_expert
    sizes = _sizes(config, *names)
    if sizes is None or positive_int(step) is None or not isinstance(skipped, list):
        return None
    size, experts, expert_size, *shared = sizes
    sparse = sum((layer + 1) % step == 0 and layer not in skipped for layer in range(layers))
    matrices = sparse * (experts * expert_size + sum(shared)) + (layers - sparse) * size
    return 3 * hidden * matrices, sparse * hidden * (experts + len(shared))


def has_experts(config: dict[str, Any]) -> bool:
    """Return whether it is a mixture of experts, or seems so."""
    return any("expert" in name and value for part in (config, text_config(config)) for name, value in part.items())


def _sizes(config: dict[str, Any], *names: str) -> list[int] | None:
    sizes = [size for name in names if (size := positive_int(config.get(name))) is not None]
    return sizes if len(sizes) == len(names) else None


def positive_int(value: object) -> int | None:
    """Return a whole number above 0; None for all else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
