"""Public test helpers: a simulated engine, and `Example`, which runs pytest on a small project.

    def test_my_gate(tmp_path):
        result = Example({"test_x.py": "..."}).run(tmp_path, "--update-baselines")
        assert result.outcomes == {"passed": 1}

The engine is a class (`SimulatedEngine`), the fixture `simulated_engine`, and a command (`python -m pytest_llmperf.testing
--port N`); as an engine of the plugin it is `--llmperf-engine=simulated`, with its `--sim-` arguments in
`--llmperf-engine-args`. Names are loaded when they are used: the command must start quickly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_llmperf.testing.clock import Clock as Clock
    from pytest_llmperf.testing.example import Example as Example
    from pytest_llmperf.testing.example import Result as Result
    from pytest_llmperf.testing.server import Options as Options
    from pytest_llmperf.testing.server import SimulatedEngine as SimulatedEngine

_HOME = {"Clock": "clock", "Example": "example", "Result": "example", "Options": "server", "SimulatedEngine": "server"}


def __getattr__(name: str) -> object:
    """Return a public name, importing its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
