"""How much faster it gets on 2 and 4 GPUs: against a floor, and each degree against its own baseline.

`pytest examples/test_scaling.py --llmperf-model=qwen2.5-7b-shape --update-baselines`; the summary has the table.
"""

from __future__ import annotations

import pytest

FLOOR = {2: 0.7, 4: 0.5}
"""The least efficiency, by TP degree. Seven billion parameters in bf16 on H200 with NVLink came to 0.82 and 0.64."""


@pytest.mark.llmperf(tp=[1, 2, 4], concurrency=64, min_gpus=2)
def test_scaling(llmperf_sweep, baseline):
    measured_scaling = llmperf_sweep(prompt_tokens=512, output_tokens=128, requests=256)
    assert measured_scaling == baseline
    for degree in measured_scaling.degrees[1:]:
        assert measured_scaling.efficiency(degree) >= FLOOR[degree]
