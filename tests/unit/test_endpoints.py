"""Endpoints as people have them: what is found out of each, and how it is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from odd_servers import GATEWAY, LLAMA_CPP, SERVERS, TENSORRT_LLM, TGI, VLLM, Habits, odd_server
from pytest_llmperf.measure.client.processes import LoadClient
from pytest_llmperf.measure.client.prompts import prompts
from pytest_llmperf.measure.engines import api
from pytest_llmperf.measure.engines.engine import EngineError, StartSettings
from pytest_llmperf.measure.engines.opening import open_engine
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.plan.engine import EngineSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_llmperf.measure.client.messages import RoundLog
    from pytest_llmperf.measure.engines.engine import Engine


@pytest.fixture(scope="module")
def client() -> Iterator[LoadClient]:
    with LoadClient() as processes:
        yield processes


@pytest.fixture
def start(tmp_path: Path) -> StartSettings:
    return StartSettings(log_folder=tmp_path)


def open_at(url: str, start: StartSettings, **other: Any) -> Any:
    return open_engine(EngineSpec(kind="url", url=url), settings=replace(start, **other))


def play(engine: Engine, client: LoadClient, **workload: Any) -> RoundLog:
    wanted = workload_from(Axes(concurrency=2), {"prompt_tokens": 6, "output_tokens": 4, "requests": 4, **workload})
    drawn = prompts(wanted, 0, vocabulary=None, nonce="test")
    return engine.play(drawn, client, concurrency=2, request_timeout_s=20, stall_timeout_s=10, stream=wanted.stream)


def errors(log: RoundLog) -> list[str]:
    return [record.error for record in log.records if record.error is not None]


# ------------------------------------------------------------------------------------------------ engine by feature

VERSIONS = {
    "vllm": {"vllm": "0.32.0"},
    "sglang": {"sglang": "0.5.2"},
    "tgi": {"tgi": "3.3.0"},
    "llama.cpp": {"llama.cpp": "b6100-3db4da5"},
    "tensorrt-llm": {"tensorrt-llm": "1.1.0"},
    "ray": {},
}


@pytest.mark.parametrize("name", SERVERS)
def test_model_and_software_of_an_endpoint_are_found_out(name: str, start: StartSettings) -> None:
    with odd_server(SERVERS[name]) as server, open_at(server.url, start) as engine:
        assert engine.endpoint.model == "m"
        assert engine.versions == VERSIONS[name]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "document"])
@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("name", SERVERS)
def test_each_api_of_an_endpoint_is_measured(name: str, api: str, stream: bool, start: StartSettings, client: LoadClient) -> None:
    with odd_server(SERVERS[name]) as server, open_at(server.url, start) as engine:
        log = play(engine, client, api=api, stream=stream)
    assert errors(log) == []
    assert [record.output_tokens for record in log.records] == [4] * 4
    assert [record.prompt_tokens for record in log.records] == [6] * 4
    assert {record.finish_reason for record in log.records} == {"length"}
    assert all(len(record.token_times_s) == (4 if stream else 0) for record in log.records)


def test_only_vllm_is_asked_for_token_ids(start: StartSettings, client: LoadClient) -> None:
    asked = {}
    for name in ("vllm", "tensorrt-llm"):
        with odd_server(SERVERS[name]) as server, open_at(server.url, start) as engine:
            play(engine, client)
            asked[name] = server.bodies[-1].get("return_token_ids")
    assert asked == {"vllm": True, "tensorrt-llm": None}


def test_an_unknown_server_that_forbids_token_ids_is_not_asked(start: StartSettings, client: LoadClient) -> None:
    strict = Habits(fields=TENSORRT_LLM.fields)
    with odd_server(strict) as server, open_at(server.url, start) as engine:
        assert errors(play(engine, client)) == []


def test_a_server_of_texts_is_sent_words_for_token_ids(start: StartSettings, client: LoadClient) -> None:
    with odd_server(TGI) as server, open_at(server.url, start) as engine:
        assert errors(play(engine, client, prefix_tokens=3)) == []
        sent = [body["prompt"] for body in server.bodies[-4:]]
    assert len({" ".join(text.split()[:3]) for text in sent}) == 1  # what ids share, words share
    assert len(set(sent)) == 4


def test_ids_that_a_server_takes_for_text_are_not_sent(start: StartSettings, client: LoadClient) -> None:
    with odd_server(Habits(reads_ids_as_text=True)) as server, open_at(server.url, start) as engine:
        assert {record.prompt_tokens for record in play(engine, client).records} == {6}
        assert isinstance(server.bodies[-1]["prompt"], str)


# ------------------------------------------------------------------------------------------------ which model

TWO = {"data": [{"id": "a"}, {"id": "b"}]}


def test_aliases_and_adapters_are_no_second_model(start: StartSettings) -> None:
    with odd_server(VLLM) as server, open_at(server.url, start) as engine:
        assert engine.endpoint.model == "m"


@pytest.mark.parametrize("listed", [TWO, {"data": [{"id": "b"}, {"id": "a"}]}, {"models": ["a", "b"]}, ["a", "b"]])
def test_of_several_models_one_must_be_named(listed: Any, start: StartSettings) -> None:
    with odd_server(Habits(models=listed)) as server:
        with pytest.raises(EngineError, match=r"several models .* name the one to be measured with --llmperf-model"):
            open_at(server.url, start).__enter__()
        with open_at(server.url, start, served_model="b") as engine:
            assert engine.endpoint.model == "b"


def test_an_adapter_may_be_named(start: StartSettings) -> None:
    with odd_server(VLLM) as server, open_at(server.url, start, served_model="adapter") as engine:
        assert engine.endpoint.model == "adapter"


def test_a_model_that_is_not_listed_is_refused(start: StartSettings) -> None:
    with odd_server(VLLM) as server, pytest.raises(EngineError, match="serves m, m-alias, adapter, not 'x'"):
        open_at(server.url, start, served_model="x").__enter__()


@pytest.mark.parametrize("listed", [None, {"data": []}, "<html>hello</html>", {"data": None}, {"data": [{"object": "model"}]}])
def test_without_a_list_the_given_name_is_measured(listed: Any, start: StartSettings, client: LoadClient) -> None:
    with odd_server(Habits(models=listed)) as server:
        with open_at(server.url, start, served_model="given") as engine:
            assert errors(play(engine, client)) == []
            assert server.bodies[-1]["model"] == "given"
        with pytest.raises(EngineError, match="name the one to be measured with --llmperf-model"):
            open_at(server.url, start).__enter__()


# ------------------------------------------------------------------------------------------------ how it is reached


def test_a_server_of_chats_alone_is_measured_by_chats(start: StartSettings, client: LoadClient) -> None:
    with odd_server(LLAMA_CPP, apis=("chat/completions",)) as server, open_at(server.url, start) as engine:
        assert errors(play(engine, client, api="chat")) == []
        assert engine.generate([1, 2, 3], max_tokens=1).output_tokens == 1
        with pytest.raises(EngineError, match=r"a chat API and none of completions; .*api='chat'"):
            play(engine, client)


def test_a_gateway_gets_its_headers_query_and_path(start: StartSettings, client: LoadClient) -> None:
    headers = (("X-Team", "blue"),)
    with (
        odd_server(GATEWAY) as server,
        open_at(server.url, start, served_model="m", headers=headers, api_key="k") as engine,
    ):
        assert errors(play(engine, client, api="chat")) == []
        assert server.heads[-1]["authorization"] == "Bearer k"
        assert "api-version" not in engine.url


def test_a_given_header_wins_over_the_usual_one(start: StartSettings, client: LoadClient) -> None:
    headers = (("authorization", "Basic eDp5"), ("HOST", "models.test"))
    with odd_server(Habits()) as server, open_at(server.url, start, headers=headers, api_key="k") as engine:
        assert errors(play(engine, client)) == []
        assert (server.heads[-1]["authorization"], server.heads[-1]["host"]) == ("Basic eDp5", "models.test")


def test_a_missing_header_is_named_with_the_option(start: StartSettings) -> None:
    with odd_server(Habits(headers={"x-token": "t"})) as server, pytest.raises(EngineError, match=r"HTTP 403.*--llmperf-header"):
        open_at(server.url, start).__enter__()


def test_a_redirect_tells_where_to_and_is_not_followed(start: StartSettings) -> None:
    with odd_server(Habits()) as other, odd_server(Habits(redirects_to=other.url)) as server:
        with pytest.raises(EngineError, match=f"HTTP 307: redirects to {other.url}/v1/models; name that address"):
            open_at(server.url, start, api_key="secret").__enter__()
        assert other.heads == []


def test_a_field_that_is_none_is_left_out(start: StartSettings, client: LoadClient) -> None:
    left = {"return_token_ids": None, "ignore_eos": None, "temperature": None, "stream_options": None}
    with odd_server(VLLM, finish_reason="stop") as server, open_at(server.url, start) as engine:
        play(engine, client, extra_body=left | {"top_k": 5})
    assert set(server.bodies[-1]) == {"model", "prompt", "max_tokens", "stream", "top_k"}


def test_newer_chats_are_sent_max_completion_tokens(start: StartSettings, client: LoadClient) -> None:
    with odd_server(VLLM) as server, open_at(server.url, start) as engine:
        assert errors(play(engine, client, api="chat", extra_body={"max_tokens": None})) == []
    assert server.bodies[-1]["max_completion_tokens"] == 4
    assert "max_tokens" not in server.bodies[-1]


def test_an_endpoint_that_gives_nothing_says_what_each_path_answered(start: StartSettings) -> None:
    with odd_server(Habits(apis=())) as server, pytest.raises(EngineError) as caught:
        open_at(server.url, start).__enter__()
    assert "/v1/completions answered HTTP 404: Not Found; /v1/chat/completions answered HTTP 404" in str(caught.value)


def test_metrics_that_are_json_are_looked_for_where_prometheus_asks(start: StartSettings) -> None:
    pages = {"/metrics": [{"iter": 1}], "/prometheus/metrics": "trtllm_request_success_total 4\n"}
    with odd_server(TENSORRT_LLM, pages=TENSORRT_LLM.pages | pages) as server, open_at(server.url, start) as engine:
        assert engine.metrics_text() == "trtllm_request_success_total 4\n"
    with odd_server(Habits(pages={"/metrics": "<html>no</html>"})) as server, open_at(server.url, start) as engine:
        assert engine.metrics_text() is None


# ------------------------------------------------------------------------------------------------ the page's table

COLUMNS = "| server | health | models listed | version | completions | chat | usage | `return_token_ids` |"
DOCS = Path(__file__).parents[2] / "docs" / "engines.md"


def row(name: str, start: StartSettings, client: LoadClient) -> str:
    """Return a server's row, each cell from what was measured of it just now."""
    with odd_server(SERVERS[name]) as server, open_at(server.url, start) as engine:
        health = "yes" if api.get(f"{server.url}/health")[0] == 200 else "no"
        logs = {api_name: play(engine, client, api=api_name) for api_name in ("completions", "chat")}
        asked = server.bodies[-8]
        how = "token ids" if isinstance(asked["prompt"], list) else "words"
        cells = {api_name: "yes" if not errors(log) else errors(log)[0] for api_name, log in logs.items()}
        counted = all(record.output_tokens for log in logs.values() for record in log.records)
        version = next(iter(engine.versions.values()), "no")
        sends = "sent" if asked.get("return_token_ids") else "left out"
    listed = engine.endpoint.model == "m"
    columns = [name, health, "yes" if listed else "no", "yes" if version != "no" else "no", f"{cells['completions']}, {how}"]
    return "| " + " | ".join([*columns, cells["chat"], "yes" if counted else "no", sends]) + " |"


def test_the_table_of_servers_is_what_was_measured(start: StartSettings, client: LoadClient) -> None:
    table = "\n".join([COLUMNS, "|---|---|---|---|---|---|---|---|", *(row(name, start, client) for name in SERVERS)])
    assert table in DOCS.read_text(), table
