"""Lines of logs without their prefixes, and the exceptions that a log names."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.measure.engines.child import failure
from pytest_llmperf.measure.engines.logs import complaints, named_errors, read_line

ERROR = "ValueError: two words"
PREFIXES = [
    "",
    "(VllmWorker rank=1 pid=88) ERROR 05-12 10:00:00 [multiproc_executor.py:522] ",
    "(VllmWorkerProcess pid=538) ERROR 07-23 20:47:21 multiproc_worker_utils.py:226] ",
    "(EngineCore_DP0 pid=1) ",
    "(EngineCore pid=7) ERROR 11-21 20:14:56 [core.py:1330] ",
    "(APIServer pid=8025)   ",
    "(Worker_TP0_EP0 pid=91) ERROR 06-22 10:58:00 [multiproc_executor.py:888] ",
    "\x1b[36m(RayWorkerWrapper pid=263, ip=10.0.16.95)\x1b[0m ERROR 01-30 11:53:53 [worker_base.py:620] ",
    "^[[36m(RayTrainWorker pid=123, ip=10.0.0.1)^[[0m ",
    "(pid=776, ip=fd00::1) ",
    "(raylet pid=5) (VllmWorker rank=0 pid=9) [rank0]: ",
    "[rank0]: ",
    "[rank1]:[E512 10:00:00.123456789 ProcessGroupNCCL.cpp:632] ",
    "[default3]:[rank3]: ",
    "ERROR:    ",
    "ERROR:root:",
    "\x1b[31mERROR\x1b[0m:    ",
    "CRITICAL 05-12 10:00:00 [launcher.py:9] ",
    "2025-05-01 10:00:00,123 - ERROR - worker.py:22 - ",
    "2025-05-01 10:00:00.123 | ERROR    | engine.core:run:12 - ",
    "[2025-05-01 10:00:00 TP0] ",
    "[2025-05-01 10:00:00 DP1 TP0 PP2] ",
    "[2025-05-25 19:45:03] [ERROR] ",
    "[TP5 EP5] ",
    "[07/08/2025-19:47:15] [TRT-LLM] [RANK 1] [E] ",
    "[TensorRT-LLM][ERROR] ",
    "2024-06-17T13:18:29.371622Z ERROR shard-manager: text_generation_launcher: ",
    "2024-06-17T13:18:29.371622Z ERROR text_generation_router: ",
    "E1103 02:59:01.152656 81041 backend_model.cc:553] ERROR: ",
    "0.00.012.345 E ",
    "Feb 22 06:35:18 some-host env[2827]: (EngineCore_DP0 pid=2827) ERROR 02-22 06:35:18 [core.py:8] ",
    "qwen-4b  | (EngineCore_DP0 pid=94) ERROR 03-09 12:57:12 [core.py:8] ",
    "2026-05-01 19:08:52.245 | (EngineCore pid=187) ERROR 05-01 17:08:53 [core.py:1] ",
    "  | ",
    "time=2025-03-07T05:36:39.884Z level=ERROR source=server.go:421 msg=",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_an_exception_is_found_behind_a_prefix(prefix: str) -> None:
    assert read_line(prefix + ERROR).text == ERROR
    assert named_errors(["before", prefix + ERROR, "after"]) == [ERROR]


@pytest.mark.parametrize(
    ("line", "level", "process"),
    [
        ("(VllmWorker rank=1 pid=88) ERROR 05-12 10:00:00 [multiproc_executor.py:522] x", "ERROR", "88"),
        ("(RayWorkerWrapper pid=263, ip=10.0.16.95) INFO 01-30 11:53:53 [x.py:1] x", "INFO", "263, ip=10.0.16.95"),
        ("[rank0]:W0318 06:57:13.573000 165 torch/_inductor/utils.py:1703] x", "WARNING", ""),
        ("[07/08/2025-19:47:15] [TRT-LLM] [I] x", "INFO", ""),
        ("INFO:     x", "INFO", ""),
        ('{"level":"warn","message":"x"}', "WARN", ""),
        ('(Shard pid=4) {"level":"info","fields":{"message":"x"}}', "INFO", "4"),
        ("x", "", ""),
    ],
)
def test_a_line_keeps_its_level_and_process(line: str, level: str, process: str) -> None:
    read = read_line(line)
    assert (read.text, read.level, read.process) == ("x", level, process)


@pytest.mark.parametrize(
    ("lines", "errors"),
    [
        ([f"WARNING 05-12 10:00:00 [x.py:1] {ERROR}", f"INFO:     {ERROR}"], []),
        ([f"(Worker_TP{rank} pid={rank}) {ERROR}" for rank in range(4)], [ERROR]),
        (["terminate called after throwing an instance of 'std::runtime_error'", "  what():  no device"],
         ["std::runtime_error: no device"]),
        (["[TensorRT-LLM][ERROR] x", "terminate called after throwing an instance of 'tensorrt_llm::common::TllmException'",
          "  what():  [TensorRT-LLM][ERROR] Assertion failed: head size"],
         ["tensorrt_llm::common::TllmException: [TensorRT-LLM][ERROR] Assertion failed: head size"]),
        (["/src/ggml.c:12: GGML_ASSERT(n > 0 && \"some\") failed"], ['/src/ggml.c:12: GGML_ASSERT(n > 0 && "some") failed']),
        (["Fatal Python error: Segmentation fault"], ["Fatal Python error: Segmentation fault"]),
        (["AssertionError", "NotImplementedError", "this is no Error", "Exception in ASGI application"],
         ["AssertionError", "NotImplementedError"]),
        (["[2025-05-01 10:00:00 TP0] Scheduler hit an exception: Traceback (most recent call last):", "KeyError: 'a'"],
         ["KeyError: 'a'"]),
        ([json.dumps({"level": "ERROR", "fields": {"message": f"\x1b[2mShard failed\x1b[0m:\n\n{ERROR}\n"}})], [ERROR]),
        (["Error: ShardCannotStart"], ["Error: ShardCannotStart"]),
    ],
)  # fmt: skip
def test_a_log_names_its_exceptions_once_each(lines: list[str], errors: list[str]) -> None:
    assert named_errors(lines) == errors


def test_the_last_lines_have_no_colours_and_no_moving_bars(tmp_path) -> None:
    log = tmp_path / "log"
    log.write_text(f"\x1b[31m{ERROR}\x1b[0m\r\nLoading:  1%\rLoading: 50%\rLoading: 99%\nend\n" + "\n" * 9)
    assert failure("It died.", log).tail == f"{ERROR}\nLoading: 99%\nend"


@given(st.text())
def test_no_line_fails_to_be_read(line: str) -> None:
    list(complaints([line]))
    named_errors(line.splitlines())


@given(st.lists(st.sampled_from(PREFIXES), max_size=4), st.text(max_size=20))
def test_prefixes_of_prefixes_leave_the_rest_as_it_is(prefixes: list[str], rest: str) -> None:
    assert read_line("".join(prefixes) + "~" + rest).text == ("~" + rest).strip()
