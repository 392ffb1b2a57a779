"""An engine that a command line starts: its template, its readiness, whether it is ours, how it fails and ends."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf import EngineError, EngineSpec, open_engine
from pytest_llmperf.measure.client.prompts import Prompt
from pytest_llmperf.measure.engines.command import answers_on_its_port
from pytest_llmperf.measure.engines.engine import StartSettings
from pytest_llmperf.measure.engines.server import ServerEngine
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.command import PLACEHOLDERS, check_command, command_words
from pytest_llmperf.plan.engine import parse_engine_args
from pytest_llmperf.plan.marker import parse_marker
from pytest_llmperf.testing import SimulatedEngine

if TYPE_CHECKING:
    from pytest_llmperf.measure.client.processes import LoadClient

SERVER = Path(__file__).parents[1] / "openai_server.py"
VALUES = dict.fromkeys(PLACEHOLDERS, "") | {"model": "/a model/{x}", "port": "80", "tp": "2"}


def spec(options: str = "", *, model: str = "served", args: str = "") -> EngineSpec:
    command = f"{{python}} '{SERVER}' --port {{port}} {options}"
    engine_args = parse_engine_args(args, origin="test", verbatim=True)
    return EngineSpec(kind="command", model=model, python=sys.executable, command=command, args=engine_args)


def settings(folder: Path, *, timeout_s: float = 30.0) -> StartSettings:
    return StartSettings(folder, startup_timeout_s=timeout_s, stop_grace_s=2.0)


# ------------------------------------------------------------------------------------------------ the template


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("serve {model} --port {port}", ["serve", "/a model/{x}", "--port", "80"]),
        ("serve --port={port} -tp{tp} ''", ["serve", "--port=80", "-tp2", ""]),
        ("'/opt/my server/run' --name 'two words' --port {port}", ["/opt/my server/run", "--name", "two words", "--port", "80"]),
        ('serve --port {port} --json \'{{"a": {{"b": {tp}}}}}\'', ["serve", "--port", "80", "--json", '{"a": {"b": 2}}']),
        (r"serve --port {port} --name a\ b{{model}}", ["serve", "--port", "80", "--name", "a b{model}"]),
        ("sh -c 'exec serve -m \"$0\" --port {port}' {model}", ["sh", "-c", 'exec serve -m "$0" --port 80', "/a model/{x}"]),
    ],
)
def test_a_command_becomes_words_with_its_placeholders_filled(text: str, words: list[str]) -> None:
    assert command_words(check_command(text, origin="x"), VALUES) == words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a command line, e.g. 'llama-server -m {model} --port {port}'"),
        ("llama-server -m {model}", r"{port} is missing: the plugin chooses the port"),
        ("serve --port {{port}}", "{port} is missing"),
        ("serve --port {port} 'x", "quote it as on a shell command line"),
        ("serve --port {port} -m {modell}", "'{modell}' is no placeholder; known are {model}, {port}"),
        ("serve --port {port} {}", "'{}' is no placeholder"),
        ("serve --port {port} --json '{\"a\": 1}'", "write {{ and }} for braces"),
        ("serve --port {port} }", "a brace alone is no placeholder"),
    ],
)
def test_a_command_that_cannot_start_an_engine_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=r"--llmperf-command=") as caught:
        check_command(text, origin="--llmperf-command")
    assert message in str(caught.value)


@given(st.text("{}portmdel -'\"\\", max_size=20))
def test_a_command_is_refused_in_words_or_becomes_words(text: str) -> None:
    try:
        check_command(text, origin="x")
    except PlanError:
        return
    assert any("80" in word for word in command_words(text, VALUES))


@pytest.mark.parametrize(
    ("source", "args"),
    [
        ("--max_batch_size 8 -ngl 99", (("-ngl", ("99",)), ("max_batch_size", ("8",)))),
        ({"max_batch_size": 8, "flash-attn": True}, (("flash-attn", ()), ("max_batch_size", ("8",)))),
        (["--tp", "2", "--no_x"], (("no_x", ()), ("tp", ("2",)))),
    ],
)
def test_arguments_of_a_command_keep_their_spelling(source: object, args: object) -> None:
    assert parse_engine_args(source, origin="x", verbatim=True) == args  # type: ignore[arg-type]
    assert parse_marker({"engine_args": source}, verbatim=True).engine_args == args


def test_the_port_is_not_an_argument_but_a_placeholder() -> None:
    with pytest.raises(PlanError, match=r"--port is set by the plugin; use {port} in --llmperf-command instead"):
        parse_engine_args("--port 1", origin="x", verbatim=True)


# ------------------------------------------------------------------------------------------------ the server


@pytest.mark.parametrize(
    ("options", "model", "name"),
    [
        ("", "served", "served"),
        ("--slowly 3", "served", "served"),
        ("--model other served", "served", "served"),
        ("--model other /files/served", "served", "/files/served"),
        ("--model other another", "served", "other"),
        ("--without /health", "served", "served"),
        ("--without models --model served", "served", "served"),
        ("--without models /health --model served", "served", "served"),
    ],
)
def test_a_server_is_waited_for_and_its_models_name_found(options: str, model: str, name: str, tmp_path: Path) -> None:
    with open_engine(spec(options, model=model), settings=settings(tmp_path)) as engine:
        assert engine.endpoint.model == name
        assert engine.generate([1, 2, 3], max_tokens=2).output_tokens == 2
        assert engine.startup_s
        assert engine.metrics_text() is None
        assert engine.versions == {}  # it tells none
    with pytest.raises(EngineError, match="gave no completion"):
        engine.generate([1])


def test_a_server_with_a_chat_api_alone_is_asked_by_it(tmp_path: Path) -> None:
    with open_engine(spec("--without completions"), settings=settings(tmp_path)) as engine:
        assert engine.generate([1, 2, 3], max_tokens=2).output_tokens == 2
        prompts, nobody = [Prompt((5,))], cast("LoadClient", None)
        with pytest.raises(EngineError, match=r"measure it with llmperf\(api='chat'\)"):
            engine.play(prompts, nobody, concurrency=1, request_timeout_s=5, stall_timeout_s=5)


def test_a_server_that_refuses_every_prompt_is_told_at_once(tmp_path: Path) -> None:
    with (
        pytest.raises(EngineError, match=r"The engine is up but gives no token: .*/v1/completions answered HTTP 404"),
        open_engine(spec("--without completions chat/completions"), settings=settings(tmp_path)),
    ):
        pass


def test_engine_arguments_come_behind_the_command(tmp_path: Path) -> None:
    with open_engine(spec(args="--model mine"), settings=settings(tmp_path)) as engine:
        assert engine.endpoint.model == "mine"


def test_a_bundled_model_is_passed_as_its_folder(tmp_path: Path) -> None:
    with open_engine(spec("--model {model}", model="tiny"), settings=settings(tmp_path)) as engine:
        assert (Path(engine.endpoint.model) / "config.json").is_file()


def test_a_server_behind_a_shell_is_ours_and_ends_with_it(tmp_path: Path) -> None:
    script = tmp_path / "my server.sh"
    script.write_text(f"#!/bin/sh\n'{sys.executable}' '{SERVER}' --port $1\n")
    script.chmod(0o755)
    wrapped = EngineSpec(kind="command", model="served", command=f"'{script}' {{port}}")
    with open_engine(wrapped, settings=settings(tmp_path)) as engine:
        port = int(engine.url.rpartition(":")[2])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port))


def test_a_server_that_dies_at_start_is_told_with_code_and_log(tmp_path: Path) -> None:
    with (
        pytest.raises(EngineError, match="ended with exit code 3 while it was starting") as caught,
        open_engine(spec("--die 'error: failed to load the model'"), settings=settings(tmp_path)),
    ):
        pass
    assert caught.value.tail == "error: failed to load the model"


def test_a_server_that_never_is_ready_names_the_option(tmp_path: Path) -> None:
    with (
        pytest.raises(EngineError, match=r"not ready after 1 s; see --llmperf-startup-timeout"),
        open_engine(spec("--slowly 99999"), settings=settings(tmp_path, timeout_s=1)),
    ):
        pass


def test_a_server_on_another_port_is_told_which(tmp_path: Path) -> None:
    with (
        pytest.raises(EngineError, match=r"not ready after 2 s: it listens on port (\d+), and was told (\d+)"),
        open_engine(spec("--shift 1"), settings=settings(tmp_path, timeout_s=2)),
    ):
        pass


def test_a_port_that_somebody_else_answers_is_not_taken_for_ours(tmp_path: Path) -> None:
    with SimulatedEngine() as stranger, open_engine(spec(), settings=settings(tmp_path)) as engine:
        assert isinstance(engine, ServerEngine)
        child = engine._running()
        assert answers_on_its_port(engine, child)
        engine.url = stranger.url
        engine.endpoint = replace(engine.endpoint, url=stranger.url)
        with pytest.raises(
            EngineError, match=rf"answered by another server, pid {os.getpid()}, which the command has not started"
        ):
            answers_on_its_port(engine, child)


def test_a_program_that_does_not_exist_is_named_before_anything_else(tmp_path: Path) -> None:
    missing = EngineSpec(kind="command", command="no-such-server --port {port}")
    with pytest.raises(EngineError, match="there is no program 'no-such-server'"), open_engine(missing):
        pass
    with pytest.raises(PlanError, match="must be a command line"):
        EngineSpec(kind="command")
