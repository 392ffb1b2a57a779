"""Secrets by their names, and what is shown in their place."""

from __future__ import annotations

import json
import unicodedata
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.judge.provenance import Provenance, changes, engine_facts
from pytest_llmperf.measure.client.endpoint import Endpoint
from pytest_llmperf.measure.client.prompts import Prompt
from pytest_llmperf.measure.engines.vllm import ARGUMENTS, keys_of
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.command import check_command
from pytest_llmperf.plan.engine import EngineSpec, check_url, command_line, parse_engine_args
from pytest_llmperf.plan.marker import parse_marker
from pytest_llmperf.plan.secrets import HIDDEN, is_secret, secrets_in, shown, without
from pytest_llmperf.plan.workload import Workload
from pytest_llmperf.units import printable

KEY = "sk-0815-abcdef"


@pytest.mark.parametrize(
    "name",
    ["api-key", "hf-token", "ssl-keyfile-password", "HF_TOKEN", "VLLM_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID",
     "PGPASSWORD", "OPENAI_APIKEY", "X-Api-Key", "Authorization", "sig", "apiKey", "GOOGLE_APPLICATION_CREDENTIALS",
     "model-loader-extra-config.s3_secret_access_key", "API_TOKENS", "TS_AUTHKEY", "SECRETKEY", "privatekey", "S3_ACCESSKEY",
     "AZURE_CONNECTION_STRING", "LLM_CREDS"],
)  # fmt: skip
def test_names_of_secrets_are_known(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    ["ssl-keyfile", "max-num-batched-tokens", "tokenizer", "tokenizer-mode", "kv-cache-dtype", "long-prefill-token-threshold",
     "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS", "VLLM_USE_FASTOKENS", "CUDA_VISIBLE_DEVICES", "PWD", "OLDPWD", "SSH_AUTH_SOCK",
     "PYTHONHASHSEED", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "served-model-name", ""],
)  # fmt: skip
def test_names_of_other_things_are_left_alone(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("http://u:p@h:1/x?api_key=1&b=2#f", "http://***@h:1/x?api_key=***&b=***#f"),
        ("srv --api-key abc def --port {port}", "srv --api-key *** --port {port}"),
        ("srv --api-key='a b' -m {model}", "srv --api-key=*** -m {model}"),
        ("env HF_TOKEN=xx srv --tp 2", "env HF_TOKEN=*** srv --tp 2"),
        ("sh -c 'srv --api-key abc --x 1'", "sh -c 'srv --api-key *** --x 1'"),
        ('--extra {"s3_secret_access_key": "abc", "x": "y"}', '--extra {"s3_secret_access_key": "***", "x": "y"}'),
        ("srv -H 'Authorization: Bearer abcdefgh'", "srv -H 'Authorization: Bearer ***'"),
        ("srv -H 'Authorization: Token abcdef1' --tp 2", "srv -H 'Authorization: Token ***' --tp 2"),
        ("srv --header 'X-Api-Key: s3cr3tvalue' --tp 2", "srv --header 'X-Api-Key: ***' --tp 2"),
        ('srv --header "X-Api-Key: it\'s-tail" --tp 2', 'srv --header "X-Api-Key: ***" --tp 2'),
        ("srv --header Authorization:Token-abcdef1 --tp 2", "srv --header Authorization:*** --tp 2"),
        ("srv --header=X-Api-Key:s3cr3tvalue --tp 2", "srv --header=X-Api-Key:*** --tp 2"),
        ("Authorization: Token abcdef1 and more", "Authorization: Token ***"),
        ("curl -u user:passw0rd --user 'me:passw0rd' h", "curl -u user:*** --user 'me:***' h"),
        ("docker run --user 1000:1000 http://auth:8000/v1 -v a:b", "docker run --user 1000:1000 http://auth:8000/v1 -v a:b"),
        ('{"password": "it\'s-secret-tail", "x": "y"}', '{"password": "***", "x": "y"}'),
        (r'{"api_key": "ab\"cd-tail", "x": "y"}', '{"api_key": "***", "x": "y"}'),
        ("llama-server -m {model} --port {port} -ngl 99", "llama-server -m {model} --port {port} -ngl 99"),
        ("a=1 --max-num-seqs 64 --kv-cache-dtype=fp8", "a=1 --max-num-seqs 64 --kv-cache-dtype=fp8"),
    ],
)
def test_a_text_is_shown_without_its_secrets(text: str, safe: str) -> None:
    assert shown(text) == safe
    assert shown(safe) == safe
    assert bool(secrets_in(text)) == (text != safe)
    assert HIDDEN not in "".join(secrets_in(text))


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        (f"no {KEY}!", "no ***!"),
        (f"Authorization: Bearer {KEY}", "Authorization: ***"),
        ("You sent sk-0815-ab...", "You sent ***..."),
        ("You sent sk-0815-ab… and so on", "You sent ***… and so on"),
        ("sk-0815-abcd\nmore", "***\nmore"),
        ("sk-0815-abcd", "***"),
        ("sk-0815-a", "sk-0815-a"),
        ("sk-0815-other", "sk-0815-other"),
    ],
)
def test_foreign_text_is_shown_without_secrets_and_pieces_of_them(text: str, safe: str) -> None:
    assert without(text, [f"Bearer {KEY}"]) == safe


def test_a_secret_with_a_quote_is_learned_in_one_piece() -> None:
    assert secrets_in(r'{"api_key": "ab\"cd-tail"}')[:3] == [r"ab\"cd-tail", r"ab\"cd-tail", 'ab"cd-tail']
    assert "it" not in secrets_in('{"password": "it\'s-secret-tail"}')


def test_a_cut_secret_is_found_that_has_dots_or_repeats() -> None:
    assert without("aaaaaaaab... aaaaaaa...", ["aaaaaaabcdef"]) == "a***... ***..."
    assert without("You sent abcdef...", ["abcdef.ghijkl"]) == "You sent ***..."
    assert without("metrics\nmetrics-reader-\nmetrics-reader", ["metrics-reader-2024"]) == "metrics\n***\n***"


def test_a_long_token_is_looked_for_in_no_time() -> None:
    # Milliseconds each; what grows with the square of the length takes minutes here.
    token = "eyJhbG" + "0123456789" * 2_000
    assert without(("x" * 700 + " eyJhbGother ") * 5_000 + token[:100] + "...", [token]).endswith("er ***...")
    for text in ("a.", "-a.", "?", "a:", "'a:", "key: ", "-u a ", "a-", "://", "--a="):
        shown(text * 20_000)


def test_what_is_nested_without_end_is_hidden_as_a_whole() -> None:
    assert shown("--o=" + "a=" * 3 + "api_key=hunter22") == "--o=a=a=a=api_key=***"
    assert shown("--o=" + "a=" * 2_000 + "api_key=hunter22").endswith("a=***")


def test_short_secrets_are_not_looked_for_everywhere() -> None:
    assert without("a key is wrong", ["a", "key", ""]) == "a key is wrong"


@given(st.text(min_size=6), st.text(), st.text())
def test_no_secret_survives_in_whatever_form_it_is_echoed(secret: str, before: str, behind: str) -> None:
    if len(secret.strip()) >= 6:
        assert secret.strip() not in without(before + secret + behind, [secret]).replace(HIDDEN, "\0")
        assert json.dumps(secret.strip(), ensure_ascii=False)[1:-1] not in without(
            json.dumps(secret, ensure_ascii=False), [secret]
        ).replace(HIDDEN, "\0") or any(ord(letter) < 32 for letter in secret)


@given(st.text() | st.text(st.characters(categories=("Cc", "Cf", "Cs", "Zl", "Zp"))))
def test_printable_text_gives_no_orders_and_stands_in_xml(text: str) -> None:
    safe = printable(text)
    assert all(letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cs", "Zl", "Zp") for letter in safe)
    assert not set(safe) & set("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert printable(safe) == safe
    escaped = safe.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    ElementTree.fromstring(f"<a>{escaped}</a>")


def test_printable_text_is_left_alone() -> None:
    assert printable("été 漢字 🎉 a\tb\n") == "été 漢字 🎉 a\tb\n"
    assert printable("\x1b]0;t\x07\x9b1m\r\u202e\x00") == "\\x1b]0;t\\x07\\x9b1m\\r\\u202e\\x00"


# -------------------------------------------------------------------------------------------------------- what is stored


def spec(key: str = KEY, **more: object) -> EngineSpec:
    source = f"--api-key {key} second --hf-token={key} --max-num-seqs 4 --tokenizer http://u:{key}@h/x"
    env = (("HF_TOKEN", key), ("OMP_NUM_THREADS", "2"), ("HTTPS_PROXY", f"http://u:{key}@proxy"))
    return EngineSpec(args=parse_engine_args(source, origin="test"), env=env, **more)  # type: ignore[arg-type]


def facts(spec: EngineSpec) -> dict[str, object]:
    return engine_facts(Case("a.py::t", spec, Workload()))


def test_a_baseline_says_that_secrets_are_set_and_no_more() -> None:
    stored = facts(spec())
    assert stored["args"] == "--api-key '***' --hf-token '***' --max-num-seqs 4 --tokenizer 'http://***@h/x'"
    assert stored["env"] == {"HF_TOKEN": "***", "OMP_NUM_THREADS": "2", "HTTPS_PROXY": "http://***@proxy"}
    twice = EngineSpec(args=parse_engine_args("--lora-modules a=b a=b --api-key", origin="test"))
    assert facts(twice)["args"] == "--api-key --lora-modules a=b a=b"
    commanded = EngineSpec(kind="command", command=f"srv --port {{port}} --api-key {KEY}")
    assert facts(commanded)["command"] == "srv --port {port} --api-key ***"
    headed = EngineSpec(kind="command", command=f"srv --port {{port}} --header 'X-Api-Key: {KEY}' -H Authorization:Token-{KEY}")
    assert facts(headed)["command"] == "srv --port {port} --header 'X-Api-Key: ***' -H Authorization:***"
    assert KEY in headed.secrets


def test_another_key_makes_no_other_engine() -> None:
    assert changes(Provenance(facts(spec())), Provenance(facts(spec("another-key")))) == []
    assert changes(Provenance(facts(EngineSpec())), Provenance(facts(EngineSpec(env=(("HF_TOKEN", KEY),))))) == []


def test_a_key_in_an_old_baseline_is_not_shown() -> None:
    old = facts(spec()) | {
        "args": f"--api-key {KEY} --max-num-seqs 8 --tokenizer http://u:{KEY}@h/x",
        "env": {"HF_TOKEN": KEY, "OMP_NUM_THREADS": "4", "HTTPS_PROXY": f"http://u:{KEY}@proxy"},
        "command": f"srv --api-key {KEY}",
    }
    lines = changes(Provenance(old), Provenance(facts(spec("another-key"))))
    assert lines == [
        "engine command: srv --api-key *** -> not set",
        "engine argument --max-num-seqs: 8 -> 4",
        "environment OMP_NUM_THREADS: 4 -> 2",
    ]


def test_no_repr_shows_a_secret() -> None:
    kept = [
        spec(),
        EngineSpec(kind="url", url=f"http://h/v1?sig={KEY}"),
        EngineSpec(kind="command", command=f"srv {{port}} --api-key {KEY}"),
        check_url(f"http://h/v1?sig={KEY}", origin="x"),
        check_command(f"srv {{port}} --api-key {KEY}", origin="x"),
        parse_marker({"env": {"HF_TOKEN": KEY}, "engine_args": f"--api-key {KEY}"}),
        keys_of(spec()),
    ]
    endpoint = Endpoint(f"http://h/v1?sig={KEY}", "m", KEY, (("X-Token", KEY),))
    plan = endpoint.plan([Prompt(text="x")], concurrency=1, request_timeout_s=1, stall_timeout_s=1)
    assert KEY.encode() in plan.requests[0]
    kept += [endpoint, endpoint.head(), plan]
    assert [each for each in kept if KEY in repr(each)] == []


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: parse_engine_args(f"--api-key '{KEY}", origin="x"),
        lambda: check_url(f"http://u:{KEY}@h", origin="x"),
        lambda: check_url(f"h?sig={KEY}", origin="x"),
        lambda: check_command(f"srv --api-key {KEY}", origin="x"),
        lambda: check_command(f"srv --api-key {KEY} {{nothing}}", origin="x"),
        lambda: parse_marker({"env": [f"HF_TOKEN={KEY}"]}),
        lambda: parse_marker({"env": {"HF_TOKEN": KEY, "CUDA_VISIBLE_DEVICES": "1"}}),
    ],
)
def test_no_usage_error_shows_a_secret(wrong: object) -> None:
    with pytest.raises(PlanError) as error:
        wrong()  # type: ignore[operator]
    assert KEY not in str(error.value)


# ------------------------------------------------------------------------------------------------------ the engine's key


def test_arguments_that_hold_secrets_are_passed_by_environment() -> None:
    keys = keys_of(spec())
    assert keys.api_key == KEY
    assert keys.environment["VLLM_API_KEY"] == keys.environment["HF_TOKEN"] == KEY
    assert json.loads(keys.environment[ARGUMENTS]) == ["--api-key", KEY, "second", "--tokenizer", f"http://u:{KEY}@h/x"]
    assert command_line(keys.without(spec().args)) == ["--max-num-seqs", "4"]


def test_a_single_key_is_no_argument() -> None:
    keys = keys_of(EngineSpec(args=parse_engine_args(f"--api-key {KEY} --hf-token={KEY}", origin="test")))
    assert keys.environment == {"VLLM_API_KEY": KEY, "HF_TOKEN": KEY}


def test_an_engine_without_a_key_gets_one_that_is_new_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    first, second = keys_of(EngineSpec()), keys_of(EngineSpec())
    assert first.api_key
    assert len(first.api_key) >= 32
    assert first.api_key != second.api_key


def test_the_users_own_key_is_taken_and_an_empty_one_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "of-the-run")
    assert keys_of(EngineSpec()).api_key == "of-the-run"
    assert keys_of(EngineSpec(env=(("VLLM_API_KEY", "of-the-test"),))).api_key == "of-the-test"
    none = keys_of(EngineSpec(env=(("VLLM_API_KEY", ""),)))
    assert none.api_key is None
    assert none.environment["VLLM_API_KEY"] == ""
