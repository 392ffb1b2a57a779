"""A new kind of engine is a class and a row of the table: this one answers each token after a fixed time, and takes none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from pytest_llmperf.judge.verdict import Status
from pytest_llmperf.measure.client.endpoint import Endpoint
from pytest_llmperf.measure.client.messages import RoundLog
from pytest_llmperf.measure.client.response import RequestRecord
from pytest_llmperf.measure.engines.phases import Phases
from pytest_llmperf.plan.engine import EngineSpec, parse_engine_args
from pytest_llmperf.plan.kinds import KINDS, Kind
from tests.whole_run import whole_run

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


class ToyEngine:
    url, gpus, watch, startup_s, log_path, phases = "", (), None, 0.0, None, Phases()
    versions: dict[str, str] = {"toy": "1"}  # noqa: RUF012  an engine's versions are its own

    def __init__(self, spec: EngineSpec, *_: object) -> None:
        self.spec, self.endpoint = spec, Endpoint("", spec.model)
        self.token_s = float(dict(spec.args).get("token-ms", ("10",))[0]) / 1000

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def play(self, prompts: list[Any], client: object, **how: Any) -> RoundLog:
        return RoundLog(tuple(self.answer(index // how["concurrency"], prompt) for index, prompt in enumerate(prompts)))

    def answer(self, wave: int, prompt: Any) -> RequestRecord:
        sent_s, count = 1.0 + wave * (prompt.output_tokens + 1) * self.token_s, prompt.output_tokens
        times_s = tuple(sent_s + token * self.token_s for token in range(1, count + 1))
        return RequestRecord(sent_s, times_s, times_s[-1], len(prompt.token_ids), count)

    def check(self) -> None: ...

    def metrics_text(self) -> None: ...

    def log_text(self) -> str:
        return ""


def test_a_new_kind_of_engine_takes_a_class_and_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "toy", Kind("tests.unit.test_toy_engine:ToyEngine", simulated=True))
    assert whole_run(tmp_path, kind="toy", update="all")[0].status is Status.RECORDED
    assert whole_run(tmp_path, kind="toy")[0].status is Status.PASS
    slower = parse_engine_args("--token-ms 12", origin="test")
    assert whole_run(tmp_path, kind="toy", engine_args=slower)[0].status is Status.REGRESSED
