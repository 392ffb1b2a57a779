"""Performance regression tests for LLM inference engines: plan, measure, judge, report.

The package is one sentence. `plan` says what is measured, `measure` how, `judge` whether it got worse, `report` who is
told, and `plugin` is where pytest ends: no other folder imports it. Public names are loaded when they are used, because
this module is imported in every pytest run of an environment that has the plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_llmperf.measure.engines.engine import Engine as Engine
    from pytest_llmperf.measure.engines.engine import EngineError as EngineError
    from pytest_llmperf.measure.engines.opening import open_engine as open_engine
    from pytest_llmperf.measure.measurement import Launch as Launch
    from pytest_llmperf.measure.measurement import Measurement as Measurement
    from pytest_llmperf.plan.case import Case as Case
    from pytest_llmperf.plan.engine import EngineSpec as EngineSpec
    from pytest_llmperf.plan.workload import Workload as Workload
    from pytest_llmperf.report.scaling import Advice as Advice
    from pytest_llmperf.report.scaling import Scaling as Scaling
    from pytest_llmperf.report.scaling import advise as advise
    from pytest_llmperf.report.scaling import scaling_of as scaling_of

__version__ = "0.1.0"

_HOME = {
    "Case": "plan.case",
    "EngineSpec": "plan.engine",
    "Workload": "plan.workload",
    "Launch": "measure.measurement",
    "Measurement": "measure.measurement",
    "Engine": "measure.engines.engine",
    "EngineError": "measure.engines.engine",
    "open_engine": "measure.engines.opening",
    "Advice": "report.scaling",
    "Scaling": "report.scaling",
    "advise": "report.scaling",
    "scaling_of": "report.scaling",
}


def __getattr__(name: str) -> object:
    """Return a public name, importing its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
