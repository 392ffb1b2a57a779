"""Parts of a workload: classes of requests, a warm-up of its own, and how requests arrive."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_llmperf.plan.checks import LARGEST, SMALLEST, PlanError, brief, written

if TYPE_CHECKING:
    from pytest_llmperf.plan.files import File
    from pytest_llmperf.plan.lengths import Lengths

AT_ONCE = math.inf
"""The rate at which all requests are due at the beginning: `rate="inf"`."""


@dataclass(frozen=True)
class RequestClass:
    """One kind of request in a workload of several, with metrics of its own (`short/ttft_p50_s`)."""

    name: str
    share: float
    """Of the requests; shares need not sum to 1."""
    prompt_tokens: int | Lengths
    output_tokens: int | Lengths
    extra_body: str = "{}"
    """Sampling parameters and the like as JSON, over those of the workload."""
    lora: str = ""
    """The name of the LoRA adapter that it asks for; empty for the model itself."""


@dataclass(frozen=True)
class WarmUp:
    """What is sent before anything is measured, where it is not one wave of the workload's own requests."""

    requests: int | None = None
    """None for as many as are in flight at once, or 32 in an open loop."""
    prompt_tokens: int | Lengths | None = None
    """None for the workload's own, as of the fields below."""
    output_tokens: int | Lengths | None = None
    dataset: File | None = None

    @property
    def has_lengths(self) -> bool:
        """Return whether other requests are sent than the workload's own."""
        return any(value is not None for value in (self.prompt_tokens, self.output_tokens, self.dataset))


def parse_rate(name: str, value: object) -> tuple[float, ...]:
    """Return requests per second, or those at both ends of a ramp; raises PlanError naming `name`.

    Infinite is a rate at which all are due at once, and no end of a ramp.
    """
    ends = value if isinstance(value, (list, tuple)) else written(value).split("..")
    try:
        rates = tuple(float(written(end)) for end in ends)
    except ValueError:
        rates = ()
    finite = all(SMALLEST <= rate <= LARGEST for rate in rates)
    if len(rates) not in (1, 2) or not (finite or rates == (AT_ONCE,)):
        raise PlanError(
            f"{name}={brief(value)}: must be requests per second above 0, e.g. 2.5, or a ramp such as '1..10', or 'inf' to send"
            " all at once"
        )
    return rates


def parse_arrivals(text: str) -> float | None:
    """Return the burstiness of arrivals (the gamma distribution's shape; infinite: constant), None where it is unknown."""
    if text in ("poisson", "constant"):
        return 1.0 if text == "poisson" else math.inf
    match = re.fullmatch(r"gamma\(\s*([\d.]+)\s*\)", text)
    try:
        shape = float(match[1]) if match else 0.0
    except ValueError:
        return None
    return shape if SMALLEST <= shape <= LARGEST else None
