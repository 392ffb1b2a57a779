"""The phases of an engine's start, as far as its log and our own clock tell.

vLLM says the same in several ways: "Model loading took 14.2 GiB and 3.1 seconds" (0.8), later "14.20 GiB memory and 3.1 seconds";
"torch.compile takes 25.1 s in total" (0.8, of all models so far), later "torch.compile and initial profiling run took", then
"torch.compile took" (0.19, of each model); "init engine (...) took 40.1 seconds" (0.8), later "40.1 s (compilation: 25.1 s)".
What another engine's log does not tell is missing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_llmperf.measure.engines.logs import read_line

if TYPE_CHECKING:
    from collections.abc import Iterable

_BEGUN = re.compile(r"Initializing a (?:V\d )?LLM engine")
_COLD = re.compile(
    r"Compiling a graph for |Cache the graph|saved AOT compiled function|Compiling model again due to a load failure"
)
_WARM = re.compile(r"Directly load (?:the compiled graph|AOT compilation)")
_SECONDS = {
    "model": re.compile(r"Model loading took [\d.]+ Gi?B (?:memory )?and ([\d.]+) s"),
    "weights": re.compile(r"Loading weights took ([\d.]+) s"),
    "compiled so far": re.compile(r"torch\.compile takes ([\d.]+) s in total"),
    "compile": re.compile(r"torch\.compile (?:took|and initial profiling run took) ([\d.]+) s in total"),
    "graphs": re.compile(r"Graph capturing finished in ([\d.]+) s"),
    "engine": re.compile(r"init engine \(.*?\) took ([\d.]+) s"),
    "compile of engine": re.compile(r"init engine \(.*?\) took [\d.]+ s \(compilation: ([\d.]+) s"),
}
"""What is told in seconds. A process may say it of several models."""


@dataclass(frozen=True)
class Phases:
    """The phases of a start in seconds, of the slowest process; None for what was not told, or is below what the log resolves."""

    import_s: float | None = None
    """From the launch of the process to the engine core's first words: imports, arguments, configuration."""
    weights_s: float | None = None
    compile_s: float | None = None
    graphs_s: float | None = None
    """Capture of CUDA graphs, in whole seconds, as vLLM tells it."""
    kv_s: float | None = None
    """Profiling, KV cache and warm-up of kernels: what the engine core took besides compiling and capturing."""
    first_token_s: float | None = None
    """From the server's readiness to its first token."""
    cold: bool | None = None
    """Whether graphs were compiled; False where they came from the cache, None where nothing was told of either."""


def read_phases(lines: Iterable[tuple[float, str]], first_token_s: float | None = None) -> Phases:
    """Return the phases of a start from its log: each line with the seconds from the launch to its coming."""
    durations: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in _SECONDS}
    begun_s, cold, warm = None, False, False
    for at_s, line in lines:
        read = read_line(line)
        cold, warm = cold or bool(_COLD.search(read.text)), warm or bool(_WARM.search(read.text))
        if begun_s is None and _BEGUN.search(read.text):
            begun_s = at_s
        for name, pattern in _SECONDS.items():
            if match := pattern.search(read.text):
                durations[name][read.process].append(_number(match[1]))
    slowest = {name: max(map(sum, of.values()), default=0.0) for name, of in durations.items()}
    slowest["compiled so far"] = max(map(max, durations["compiled so far"].values()), default=0.0)
    compile_s = slowest["compile of engine"] or slowest["compile"] or slowest["compiled so far"]
    rest_s = slowest["engine"] - compile_s - slowest["graphs"]
    return Phases(
        import_s=begun_s or None,
        weights_s=slowest["model"] or slowest["weights"] or None,
        compile_s=compile_s or None,
        graphs_s=slowest["graphs"] or None,
        kv_s=rest_s if rest_s > 0 else None,
        first_token_s=first_token_s,
        cold=cold if cold or warm else None,
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # "1.2.3"
        return 0.0
