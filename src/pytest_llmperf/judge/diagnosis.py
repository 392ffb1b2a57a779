"""Which setting to move when a verdict is red; what a dead engine's log says is in `causes.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_llmperf.judge.verdict import Status

if TYPE_CHECKING:
    from pytest_llmperf.judge.scaling import Curve
    from pytest_llmperf.judge.verdict import Verdict

# What to do about preemptions: setting, the value where the user gave none, direction.
_KV_SETTINGS: tuple[tuple[str, str], ...] = (
    ("num-gpu-blocks-override", "raise it, or leave it out: it fixes the KV cache's size"),
    ("gpu-memory-utilization", "raise it: more of the GPU goes to the KV cache"),
    ("max-num-seqs", "lower it: fewer requests share the KV cache"),
    ("max-num-batched-tokens", "lower it: fewer tokens are prefilled at once"),
    ("tensor-parallel-size", "raise it (--llmperf-tp): each GPU holds less of the weights"),
    ("pipeline-parallel-size", "raise it (--llmperf-pp): each GPU holds fewer layers"),
)

# What GPU memory says that got worse.
_MEMORY: tuple[tuple[str, str], ...] = (
    (
        "gpu_memory_balance_ratio",
        "with tensor parallelism every rank holds as much; where one does not, TP does not split the model (the engine's log says"
        " `rank 1 in world size`), code allocates on one rank only, or another process is on that GPU",
    ),
    (
        "gpu_memory_peak_bytes",
        "beyond weights and KV cache come activations, CUDA graphs and what libraries allocate: --max-num-batched-tokens,"
        " --max-num-seqs and the captured graph sizes make the first two; --gpu-memory-utilization bounds what vLLM itself takes",
    ),
)


def advice(verdict: Verdict, engine_args: dict[str, tuple[str, ...]], degrees: dict[str, int]) -> list[str]:
    """Return which settings to move, with the values they have, when preemptions or the KV cache got worse."""
    red = {row.metric for row in verdict.metrics if row.status is Status.REGRESSED}
    lines = [f"{name}: {text}" for name, text in _MEMORY if name in red]
    if not red & {"preemptions", "kv_cache_tokens"}:
        return lines
    given = {
        "tensor-parallel-size": (str(degrees["tp"]),),
        "pipeline-parallel-size": (str(degrees["pp"]),),
        **engine_args,
    }
    lines += ["requests are preempted when the KV cache is full; each of these gives it more room:"]
    for name, direction in _KV_SETTINGS:
        if name in given or name not in ("num-gpu-blocks-override",):
            lines.append(f"  --{name} (now {' '.join(given[name]) if name in given else 'default'}): {direction}")
    return lines


def scaling_advice(scaling: Curve, *, direct_links: bool | None) -> list[str]:
    """Return why a larger degree of tensor parallelism is slower than the smallest, the likeliest cause first; empty if none is.

    `direct_links` tells whether all the GPUs reach each other over NVLink or its like; None where that is not known.
    """
    reference = scaling.reference
    slower = [point for point in scaling.points if point.speed_up < 1]
    if not slower:
        return []
    first, figures = f"TP {reference.degree}", f"{reference.output_tokens_per_s:,.0f} tok/s"
    lines = [
        f"TP {point.degree} is slower than {first}: {point.output_tokens_per_s:,.0f} tok/s against {figures}" for point in slower
    ]
    smaller = f"--llmperf-tp={reference.degree}"
    instead = f"take {smaller}, and use the other GPUs as pipeline stages (--llmperf-pp) or replicas (--llmperf-dp)"
    causes = [
        "the model is too small for the degree: a GPU's part is computed in less time than the exchange of its results takes;"
        f" {instead}",
        f"the batch{_batch(scaling)} is too small to fill the GPUs: raise --llmperf-concurrency or --llmperf-rate, and"
        " --max-num-seqs where it is lower than that",
    ]
    if direct_links is False:  # every layer exchanges results twice (arXiv 1909.08053, section 3)
        causes.insert(0, f"the GPUs are linked by PCIe only, and every layer waits for it: {instead}; or take GPUs with NVLink")
    elif direct_links is None:
        causes.append(f"the GPUs may be linked by PCIe only, which `nvidia-smi topo -m` tells: then {instead}")
    return [*lines, "likely causes, the likeliest first:", *(f"  {number}. {cause}" for number, cause in enumerate(causes, 1))]


def _batch(scaling: Curve) -> str:
    workloads = [measurement.case.workload for measurement in scaling.measurements]
    return f" (concurrency {workloads[0].concurrency})" if workloads and not workloads[0].is_open else ""
