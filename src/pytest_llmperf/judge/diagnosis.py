"""Why: what has changed since the baseline, what a dead engine's log says, and which setting to move."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pytest_llmperf.judge.verdict import Status

if TYPE_CHECKING:
    from pytest_llmperf.judge.scaling import Curve
    from pytest_llmperf.judge.verdict import Verdict

# What the last lines of an engine's log tell, the most telling first.
_CAUSES: tuple[tuple[str, str], ...] = (
    (
        r"out of memory|OutOfMemoryError|is less than desired [CG]PU memory utilization",
        "the GPU has too little free memory: lower --gpu-memory-utilization, --max-model-len or --max-num-seqs, raise the"
        " TP degree, or end the process that holds the memory",
    ),
    (
        r"No available memory for the cache blocks|larger than the available KV cache memory",
        "no room for the KV cache is left after the weights: lower --max-model-len, or raise --gpu-memory-utilization or the"
        " TP degree",
    ),
    (
        r"must be divisible by tensor parallel size|not divisible by",
        "the TP degree must divide the model's attention heads: choose another --llmperf-tp, or use --llmperf-pp",
    ),
    (
        r"quarantine:|is used by pid|is used by another process|GiB in use, and the driver names no process",
        "the GPU is not free: end the process that uses it, or leave the GPU out with CUDA_VISIBLE_DEVICES",
    ),
    (
        r"no kernel image is available|CUDA driver version is insufficient|unsupported toolchain",
        "this build of vLLM or torch does not fit the GPU or its driver: update the driver, or install the build for its CUDA",
    ),
    (
        r"CUDA error: (an illegal memory access|device-side assert|unspecified launch failure)|Xid",
        "a kernel failed on the GPU: run once with CUDA_LAUNCH_BLOCKING=1 (marker argument env) for the place; a new kernel,"
        " attention backend or quantization is the first suspect, then the GPU itself (nvidia-smi -q, XID)",
    ),
    (
        r"No such file or directory: .*(gcc|cc1|nvcc)|Failed to find C compiler|InductorError|BackendCompilerFailed",
        "torch.compile could not build a kernel: it needs a C compiler (see the environment variable CC), or --enforce-eager",
    ),
    (
        r"NCCL (error|failure)|ncclSystemError|ncclUnhandledCudaError|DistNetworkError",
        "the ranks could not talk to each other: NCCL_DEBUG=INFO says more; check NVLink and shared memory (/dev/shm), or try"
        " --disable-custom-all-reduce",
    ),
    (
        r"unrecognized arguments|invalid choice|expected one argument",
        "an engine argument is wrong: see --llmperf-engine-args",
    ),
    (
        r"Repo id must be in the form|is not a local folder|Repository Not Found|Can't load the configuration|HFValidationError"
        r"|LocalEntryNotFoundError",
        "the model cannot be found: --llmperf-model takes a folder, or a name that the hub has",
    ),
    (r"address already in use", "another process took the port first"),
    (r"No module named '?vllm", "the interpreter has no vLLM: name one that has with --llmperf-python"),
    (r"Killed|SIGKILL", "the process was killed, most often because the machine ran out of memory"),
)

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


def likely_cause(log_tail: str) -> str | None:
    """Return the likely cause of an engine's death, with the setting to change, or None."""
    return next((cause for pattern, cause in _CAUSES if re.search(pattern, log_tail, re.I)), None)


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
