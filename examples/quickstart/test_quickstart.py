"""The smallest performance test: it passes while this engine is as fast as its baseline.

Record the baseline with `pytest examples/quickstart --update-baselines`, then run `pytest examples/quickstart`.
"""

from __future__ import annotations


def test_serving(llmperf, baseline):
    measured = llmperf(prompt_tokens=100)
    assert measured == baseline
