"""Whether this host can run a case, with the arithmetic in the reason: devices, what the marker asks for, heads, memory.

It refuses only what cannot work. A model whose shape is not known, or that the engine arguments change on the way to the GPU, is
left to the engine: what is not certain is not checked. Sizes count as the least that they can be.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmperf.measure.host.model import bundled_model, has_experts, model_config, positive_int, text_config, weight_bytes
from pytest_llmperf.plan.kinds import kind_of
from pytest_llmperf.plan.needs import NO_NEEDS
from pytest_llmperf.units import counted, gib

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmperf.measure.gpus.device import Gpu
    from pytest_llmperf.measure.host.machine import Host
    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.plan.needs import Needs

UTILIZATION = 0.92
"""vLLM's default of --gpu-memory-utilization since 0.26, the oldest that is supported; it was 0.9 before."""

_OTHER_MODEL = ("hf-overrides", "hf-config-path", "config", "config-format", "model-impl")
"""Engine arguments with which config.json does not say what is loaded."""
_OTHER_SIZE = (
    *("quantization", "q", "quantization-config", "runner", "convert", "task", "language-model-only"),
    *("offload-backend", "cpu-offload-gb", "offload-group-size", "kv-cache-memory-bytes"),
)
"""Engine arguments with which the weights take another size on the GPU, or may take more of it."""
_MOST_TP = 128
"""Where the search for a TP degree ends."""


def shortage(spec: EngineSpec, host: Host, needs: Needs = NO_NEEDS) -> str | None:
    """Return why the host cannot run the engine, with the numbers, or None: devices, then needs, heads and memory."""
    return device_shortage(spec, host, needs) or model_shortage(spec, host)


def device_shortage(spec: EngineSpec, host: Host, needs: Needs = NO_NEEDS) -> str | None:
    """Return what the host lacks, whatever the engine arguments are: devices, or what the marker asks for; else None."""
    if not kind_of(spec.kind).starts:
        return None
    need = f"{counted(spec.ranks, 'GPU')} (TP {spec.tp} x PP {spec.pp} x DP {spec.dp} = {spec.ranks})"
    if host.gpus:
        if spec.ranks > len(host.gpus):
            return f"needs {need}, this host has {len(host.gpus)} ({host.summary})"
    elif spec.ranks > host.cores:
        return f"needs {need}, this host has none; on CPU each rank needs a core, and this host has {host.cores}"
    return _unmet(spec, host, needs)


def model_shortage(spec: EngineSpec, host: Host) -> str | None:
    """Return why the model cannot be split over so many devices, or is too large for them; None where it is not known."""
    kind = kind_of(spec.kind)
    if not kind.starts or kind.commanded or _given(spec, _OTHER_MODEL):
        return None
    folder = bundled_model(spec.model) or Path(spec.model).expanduser()
    try:
        config = model_config(spec.model)
    except (OSError, ValueError, TypeError):  # unreadable, or no JSON object: the engine tells what is wrong with it
        return None
    return _uneven(spec, config, len(host.gpus) or host.cores) or _too_large(spec, config, folder, host.devices)


def _given(spec: EngineSpec, names: Sequence[str]) -> bool:
    """Return whether any of these engine arguments is given, or a part of one (`hf-overrides.num_hidden_layers`)."""
    return any(name.lstrip("-").partition(".")[0] in names for name, _ in spec.args)


# ------------------------------------------------------------------------------------------------ what the marker asks for


def _unmet(spec: EngineSpec, host: Host, needs: Needs) -> str | None:
    number = max(spec.ranks, needs.min_gpus or 1)
    gpus = counted(number, "GPU")
    here = f"this host has {len(host.gpus) or 'none'} ({host.summary})"
    if needs.min_gpus is not None and len(host.gpus) < needs.min_gpus:
        return f"needs {counted(needs.min_gpus, 'GPU')} (the marker's min_gpus), {here}"
    if needs.gpu is not None and sum(_is_named(name, needs) for name in host.gpus) < number:
        return f"needs {gpus} with {needs.gpu!r} in the name (the marker's gpu), {here}"
    fitting = suited(host.devices, needs)
    if needs.min_gpu_memory is not None and len(fitting) < number:
        return f"needs {gpus} of {gib(needs.min_gpu_memory)} or more (the marker's min_gpu_memory), {_memory_of(host)}"
    sizes = [len(island) for island in islands(fitting)]
    groups = spec.pp * spec.dp
    if needs.nvlink and spec.tp > 1 and sum(size // spec.tp for size in sizes) < groups:
        which = f"the {spec.tp} GPUs" if groups == 1 else f"{groups} groups of {spec.tp} GPUs"
        return f"needs direct links within {which} of TP {spec.tp} (the marker's nvlink), {here}; {_linked(sizes)}"
    return None


def suited(devices: Sequence[Gpu], needs: Needs) -> tuple[Gpu, ...]:
    """Return the GPUs that have the name and the memory that a marker asks for."""
    least = needs.min_gpu_memory
    return tuple(
        gpu
        for gpu in devices
        if _is_named(gpu.name, needs) and (least is None or (gpu.memory_bytes is not None and gpu.memory_bytes >= least))
    )


def _is_named(name: str, needs: Needs) -> bool:
    return needs.gpu is None or needs.gpu.lower() in name.lower()


def _memory_of(host: Host) -> str:
    if not host.devices:
        return "this host does not tell how large its GPUs are" if host.gpus else f"this host has none ({host.summary})"
    known = [(gpu.name, gpu.memory_bytes) for gpu in host.devices if gpu.memory_bytes is not None]
    if not known:
        return "this host does not tell how large its GPUs are"
    sizes = dict.fromkeys(f"{name}: {gib(size)}" for name, size in known)
    return f"this host has {len(host.devices)} ({', '.join(sizes)}); an 80 GB card has a little less than 80 GiB: write '80 GB'"


def _linked(islands: Sequence[int]) -> str:
    if max(islands, default=1) == 1:
        return "no two are linked"
    return "they are linked in groups of " + " + ".join(str(size) for size in islands)


def islands(devices: Sequence[Gpu]) -> list[list[Gpu]]:
    """Return the groups within which each reaches each other over direct links, be it by way of a third; largest first.

    Not "each has a link to each": NCCL's rings need a way round only, as over a torus or the cube mesh of V100s.
    """
    left, islands = list(devices), []
    while left:
        island = [left.pop(0)]
        for gpu in island:  # grows while it is walked
            near = [other for other in left if other.index in gpu.peers or gpu.index in other.peers]
            island += near
            left = [other for other in left if other not in near]
        islands.append(island)
    return sorted(islands, key=len, reverse=True)


def link_warning(spec: EngineSpec, devices: Sequence[Gpu]) -> str | None:
    """Return that a TP group has no direct links between its GPUs, in one line, or None.

    `devices` are those that the engine's ranks get, in order; vLLM counts TP ranks first, then PP, then DP.
    """
    if not kind_of(spec.kind).starts or spec.tp == 1:
        return None
    used = devices[: spec.ranks]
    for start in range(0, len(used) - spec.tp + 1, spec.tp):
        group = used[start : start + spec.tp]
        if len(islands(group)) > 1:
            names = ", ".join(str(gpu.index) for gpu in group)
            return (
                f"TP {spec.tp} over GPUs {names}, which direct links (NVLink) do not join: every layer waits for PCIe, which is"
                f" slower; compare with --llmperf-tp=1, and with --llmperf-pp={spec.tp * spec.pp} in place of TP"
            )
    return None


def power_warning(devices: Sequence[Gpu]) -> str | None:
    """Return which of these GPUs may take less power than they come with, in one line, or None."""
    low = [
        f"GPU {gpu.index} ({gpu.power_limit_w:.0f} W, by default {gpu.default_power_limit_w:.0f} W)"
        for gpu in devices
        if gpu.power_limit_w and gpu.default_power_limit_w and gpu.power_limit_w < gpu.default_power_limit_w
    ]
    if not low:
        return None
    return f"power limit lowered: {', '.join(low)}; slower than others of its kind under load, see `nvidia-smi -q -d POWER`"


# ------------------------------------------------------------------------------------------------ heads


def _uneven(spec: EngineSpec, config: dict[str, Any], devices: int) -> str | None:
    heads, kv_heads = _heads(config)
    if heads is None or _heads_split(config, spec.tp):
        return None
    if heads % spec.tp:
        problem = f"{heads} attention heads are not divisible by TP {spec.tp}"
    else:
        problem = f"{kv_heads} KV heads can be neither split nor copied evenly over TP {spec.tp}"
    good = [str(tp) for tp in range(1, max(devices, spec.tp) + 1) if _splits(config, tp)]
    listed = f"{', '.join(good[:-1])} or {good[-1]}" if len(good) > 1 else good[0]
    return f"{problem}; TP {listed} would do, or --llmperf-pp"


def _heads(config: dict[str, Any]) -> tuple[int | None, int | None]:
    """Return the attention heads and the KV heads that TP splits; None where they are not told, or not split.

    Latent attention (MLA) has one latent for all heads, which every GPU keeps.
    """
    text = text_config(config)
    kv_heads = None if "kv_lora_rank" in text else positive_int(text.get("num_key_value_heads"))
    return positive_int(text.get("num_attention_heads")), kv_heads


def _heads_split(config: dict[str, Any], tp: int) -> bool:
    """Return whether vLLM takes the degree: `verify_with_parallel_config`, and the attention layers' assertions."""
    heads, kv_heads = _heads(config)
    if heads is not None and heads % tp:
        return False
    return kv_heads is None or (kv_heads % tp == 0 if kv_heads >= tp else tp % kv_heads == 0)


def _splits(config: dict[str, Any], tp: int) -> bool:
    """Return whether a TP degree can be advised: the feed-forward layers must split too, quantized ones perhaps not even so."""
    text = text_config(config)
    sizes = [positive_int(text.get(name)) for name in ("intermediate_size", "moe_intermediate_size")]
    return _heads_split(config, tp) and all(size is None or size % tp == 0 for size in sizes)


# ------------------------------------------------------------------------------------------------ memory


def _too_large(spec: EngineSpec, config: dict[str, Any], folder: Path, devices: Sequence[Gpu]) -> str | None:
    if len(devices) < spec.ranks or _given(spec, _OTHER_SIZE):
        return None
    utilization, dtype, load_format = (_value(spec, name) for name in ("gpu-memory-utilization", "dtype", "load-format"))
    if dtype in ("float", "float32") or load_format in ("bitsandbytes", "gguf"):
        return None
    if spec.dp > 1 and has_experts(config):  # vLLM spreads the experts over the DP ranks too
        return None
    try:
        share = UTILIZATION if utilization is None else float(utilization)
    except ValueError:
        return None
    weights = weight_bytes(config, folder)
    sizes = sorted((gpu.memory_bytes for gpu in devices if gpu.memory_bytes is not None), reverse=True)
    if len(sizes) < len(devices):
        return None
    gpu_bytes, parts = sizes[spec.ranks - 1], spec.tp * spec.pp
    if weights is None or weights / parts <= share * gpu_bytes:
        return None
    degree = smallest_tp(config, folder, gpu_bytes * spec.pp, share, _MOST_TP)
    if degree is None:
        advice = "no TP degree alone would fit: add --llmperf-pp, or take a quantized model"
    else:
        advice = f"a TP degree of {degree} or more would fit"
        number = degree * spec.pp * spec.dp
        advice += f", on {number} GPUs where this host has {len(devices)}" if number > len(devices) else ""
    return (
        f"the weights of {spec.model} take {gib(weights)} / (TP {spec.tp} x PP {spec.pp}) = {gib(weights / parts)} on each GPU,"
        f" more than the {share:g} x {gib(gpu_bytes)} that vLLM may use; {advice}"
    )


def smallest_tp(config: dict[str, Any], folder: Path | None, gpu_bytes: int, utilization: float, most: int) -> int | None:
    """Return the smallest TP degree up to `most` that splits the model evenly and whose weights fit; None for none, or unknown.

    `gpu_bytes` is the memory of one GPU, `utilization` the share of it that vLLM may use. Weights that just fit leave nothing
    for the KV cache: it is the least that could do, not the best.
    """
    weights = weight_bytes(config, folder)
    if weights is None:
        return None
    fits = (tp for tp in range(1, most + 1) if weights / tp <= utilization * gpu_bytes and _splits(config, tp))
    return next(fits, None)


def _value(spec: EngineSpec, name: str) -> str | None:
    values = dict(spec.args).get(name)
    return values[0] if values else None
