"""Secrets in every place that can hold one, and runs that fail in every way we know: none may stand in anything that is left."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

from pytest_llmperf.testing import Example
from tests.odd_servers import VLLM, odd_server

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from tests.faults import Attempts

TIMEOUT_S = 600.0
"""A run may have to wait until the engines of others have left this host."""
SHOWING = ("-l", "--tb=long", "-vv", "-rA", "--setup-show", "-o", "log_cli=true", "--log-cli-level=DEBUG", "--junitxml=junit.xml")
"""Whatever makes pytest show more."""
SHORT = ("--llmperf-rounds=1", "--llmperf-launches=2", "-p", "no:hypothesispytest", "-p", "no:benchmark", "-p", "no:anyio")
ASKING = """
def test_x(llmperf, baseline):
    assert llmperf(requests=8, prompt_tokens=6, output_tokens=4) == baseline
"""
MEASURING = """
def test_x(llmperf):
    llmperf(requests=8, prompt_tokens=6, output_tokens=4)
"""
ENDPOINT = ("--llmperf-header=X-Token=GATEWAY", "--llmperf-header=X-Account: <header>")
ENGINE = """
import os, pathlib, pytest

@pytest.fixture(scope="session")
def llm_engine_args():
    return {"hf_token": "<fixture>"}

@pytest.mark.llmperf(engine_args="--tokenizer x?token=<argument>", env={"HF_TOKEN": "<marker>", "PROXY": "http://me:<proxy>@x"})
def test_x(llm_engine, llmperf, baseline):
    with open(os.environ["NOTED"], "a") as noted:
        noted.write(llm_engine.api_key + "\\n")
    headers = llm_engine.headers
    measured = llmperf(requests=8, prompt_tokens=6, output_tokens=4)
    {then}
"""
PRINTS_ALL = (
    "import json, os, sys; print(json.dumps(dict(os.environ))); [print(f'{n}={v}') for n, v in os.environ.items()];"
    " print(sys.argv); raise SystemExit(f'RuntimeError: bad environment {os.environ}')"
)
"""A server that tells everything it knows, and dies."""


@dataclass
class Secrets:
    """Distinct secrets by the place where they are planted."""

    chance: random.Random
    values: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, place: str) -> str:
        return self.values.setdefault(place, f"sk-{place}-{self.chance.getrandbits(64):016x}")

    def planted(self, text: str) -> str:
        """Return a text with a secret in the place of each `<name>`."""
        return re.sub(r"<([a-z_]+)>", lambda match: self[match[1]], text)


@dataclass(frozen=True)
class Scenario:
    """One way to fail."""

    name: str
    says: str
    """Stands in the output, so that it failed as meant."""
    files: dict[str, str]
    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    answers: str = ""
    """What the endpoint does; empty where there is none, `closed` where nobody listens."""
    before: tuple[str, ...] | None = None
    """Arguments of a run before this one."""
    log_tells: bool = False
    """The engine itself prints its secrets into its log."""
    quick: bool = True


def _engine(then: str = "assert measured == baseline") -> dict[str, str]:
    return {"test_it.py": ENGINE.replace("{then}", then)}


SIMULATED = ("--llmperf-engine=simulated", "--llmperf-engine-args=--api-key <option> second-<second>")
RECORDING = (*SIMULATED, "--update-baselines")
PLAIN = {"test_it.py": MEASURING}
SCENARIOS = [
    Scenario("connection refused", "cannot be reached", PLAIN, ENDPOINT, answers="closed", quick=False),
    Scenario("401 with the request in its body", "HTTP 401", PLAIN, ENDPOINT, answers="401", quick=False),
    Scenario("403 with the request in its body", "HTTP 403", PLAIN, ENDPOINT, answers="403", quick=False),
    Scenario("redirect to what was asked", "HTTP 307", PLAIN, ENDPOINT, answers="307"),
    Scenario("rounds that fail with the request in their bodies", "HTTP 500", PLAIN, ENDPOINT, answers="500"),
    Scenario("a recorded endpoint", "recorded", {"test_it.py": ASKING}, (*ENDPOINT, "--update-baselines"), answers="sound"),
    Scenario(
        "an endpoint by fixture",
        "HTTP 403",
        {
            "conftest.py": "import pytest\n@pytest.fixture(scope='session')\ndef llm_engine_url():\n"
            "    return 'URL?api_key=<fixture_query>'\n",
            "test_it.py": "def test_x(llm_engine_url, llm_engine, llmperf):\n    llmperf()\n",
        },
        answers="403 by fixture",
    ),
    Scenario("a password in a URL", "not a URL", PLAIN, ("--llmperf-url=http://me:<password>@127.0.0.1:9/v1?sig=<query>",)),
    Scenario(
        "a password in a URL of the ini file",
        "not a URL",
        PLAIN | {"pytest.ini": "[pytest]\nllmperf_url = e=http://<password>@127.0.0.1:9\n"},
        quick=False,
    ),
    Scenario("a recorded engine", "recorded", _engine(), RECORDING, quick=False),
    Scenario(
        "keys of the ini file",
        "assert 1 == 2",
        _engine("assert 1 == 2") | {"pytest.ini": "[pytest]\nllmperf_engine_args = --api-key=<ini>\n"},
        ("--llmperf-engine=simulated", "--llmperf-missing-baseline=record"),
        quick=False,
    ),
    Scenario(
        "a regression with another key",
        "REGRESSED",
        _engine(),
        ("--llmperf-engine=simulated", "--llmperf-engine-args=--api-key=<another> --sim-slow-down 4"),
        before=RECORDING,
    ),
    Scenario(
        "failed requests, a key of the environment",
        "INVALID",
        _engine(),
        ("--llmperf-engine=simulated", "--llmperf-engine-args=--sim-fail-every 3", "--llmperf-missing-baseline=record"),
        env={"VLLM_API_KEY": "<environment>"},
    ),
    Scenario("no baseline", "NO-BASELINE", _engine(), SIMULATED, quick=False),
    Scenario(
        "Ctrl-C", "KeyboardInterrupt", _engine("raise KeyboardInterrupt"),
        (*SIMULATED, "--full-trace", "--llmperf-missing-baseline=record"),
    ),
    Scenario("workers of xdist", "assert 1 == 2", _engine("assert 1 == 2"), (*RECORDING, "-n", "2"), quick=False),
    Scenario(
        "a usage error", "No closing quotation", _engine(),
        ("--llmperf-engine=simulated", "--llmperf-engine-args=--api-key <option> 'x"),
    ),
    Scenario(
        "a list in the ini file", "not a value of this option",
        {
            "test_it.py": MEASURING,
            "pytest.ini": "",
            "pyproject.toml": "[tool.pytest]\nllmperf_engine_args = ['--api-key', '<ini>']\n",
        },
        ("-c", "pyproject.toml", "--llmperf-engine=simulated"), quick=False,
    ),
    Scenario(
        "a bad environment", "must be a dict", {"test_it.py": "import pytest\n"
        "@pytest.mark.llmperf(env=[('HF_TOKEN=<marker>')])\ndef test_x(llmperf): ...\n"},
        ("--llmperf-engine=simulated",), quick=False,
    ),
    Scenario(
        "an engine that dies and prints all it knows",
        "bad environment",
        {
            "test_it.py": f"import pytest\n@pytest.mark.llmperf(env={{'API_TOKEN': '<marker>'}}){MEASURING}",
            "prints.py": PRINTS_ALL,
        },
        (f"--llmperf-command={sys.executable} prints.py {{port}} --api-key <command>",),
        log_tells=True,
    ),
    Scenario(
        "a command that is no program", "there is no program", PLAIN,
        ("--llmperf-command=nosuchserver --port {port} --api-key <command>",), quick=False,
    ),
]  # fmt: skip


@contextlib.contextmanager
def _endpoint(answers: str) -> Iterator[str]:
    """Serve what a scenario wants, and yield its address."""
    if answers in ("sound", "500"):
        with odd_server(VLLM) as server, _echoing(answers, server.url) as url:
            yield url
    else:
        with _echoing(answers.partition(" ")[0], "") as url:
            yield url


@contextlib.contextmanager
def _echoing(answers: str, behind: str) -> Iterator[str]:
    """Serve what puts the request's own head into each error; `500` are only the requests of rounds."""
    import urllib.error
    import urllib.request

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            heads = {"You sent": dict(self.headers.items()), "path": self.path}
            if answers == "sound" or (answers == "500" and b'"stream":true' not in data.replace(b" ", b"")):
                request = urllib.request.Request(behind + self.path, data or None, {"Content-Type": "application/json"})
                try:
                    with urllib.request.urlopen(request, timeout=20) as response:
                        status, body = response.status, response.read()
                except urllib.error.HTTPError as error:
                    status, body = error.code, error.read()
            else:
                status = int(answers)
                body = json.dumps({"error": {"message": f"no: {heads} {self.headers} and so on " + "x" * 100}}).encode()
            self.send_response(status)
            if status == 307:
                self.send_header("Location", f"http://127.0.0.1:1{self.path}&key={self.headers.get('X-Token')}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def log_message(self, *_: object) -> None:
            """Log no request."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class CommandLines:
    """Every command line that is seen while the block runs, but pytest's own: what stands there the user has written."""

    def __enter__(self) -> Self:
        self.seen: set[bytes] = set()
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watch.join()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    self.seen.add(process.read_bytes())

    def holding(self, secret: str) -> list[bytes]:
        """Return those that hold a secret."""
        return [line for line in self.seen if secret.encode() in line and b"\0-m\0pytest\0" not in line]


def _stored(folder: Path, written: set[Path]) -> Iterator[tuple[Path, bytes]]:
    """Yield each file of a folder with its name and content, but those that the test has written itself."""
    for path in folder.rglob("*"):
        if path.is_file() and path not in written and path.suffix != ".pyc" and not path.is_symlink():
            yield path, str(path).encode() + path.read_bytes()


def _run(scenario: Scenario, secrets: Secrets, folder: Path) -> None:
    """Run a scenario, and look for its secrets in everything that is left of it."""
    project, rest = folder / "project", folder / "rest"
    for each in (project, rest):
        each.mkdir(parents=True)
    (noted := folder / "noted").touch()
    by_fixture = "fixture" in scenario.answers
    with _endpoint(scenario.answers) if scenario.answers not in ("", "closed") else contextlib.nullcontext("") as url:
        files = {name: secrets.planted(text.replace("URL", url)) for name, text in scenario.files.items()}
        address = [f"--llmperf-url={url or 'http://127.0.0.1:9'}/v1?sig={secrets['query']}"] if scenario.answers else []
        args = [*SHORT, *SHOWING, f"--basetemp={rest / 'pytest'}", *(() if by_fixture else address)]
        env = {
            "LLMPERF_API_KEY": secrets["api"], "HF_TOKEN": secrets["hf"], "AWS_SECRET_ACCESS_KEY": secrets["aws"],
            # Where no option names it, nobody can know that it is one.
            **({"GATEWAY": secrets["gateway"]} if scenario.answers else {}),
            "TMPDIR": str(rest), "NOTED": str(noted), "PYTHONDONTWRITEBYTECODE": "1",
            **{name: secrets.planted(value) for name, value in scenario.env.items()},
        }  # fmt: skip
        example = Example(files, (), env)
        with CommandLines() as lines:
            outputs = []
            for more in filter(None, (scenario.before, scenario.args)):
                result = example.run(project, *args, *map(secrets.planted, more), timeout_s=TIMEOUT_S)
                outputs.append(result.stdout + result.stderr)
            if not scenario.args:
                result = example.run(project, *args, timeout_s=TIMEOUT_S)
                outputs.append(result.stdout + result.stderr)
    assert scenario.says in outputs[-1], outputs[-1]
    values = [*secrets.values.values(), *noted.read_text().split()]
    written = {project / name for name in ("pytest.ini", *files)}
    left = {str(path): content for path, content in _stored(project, written)} | dict(_stored(rest, set()))
    assert any(str(path).endswith("llmperf.json") or "not a URL" in scenario.says for path in left) or result.returncode == 4
    if scenario.log_tells:
        logs = [path for path in left if str(path).endswith(".log")]
        assert logs
        assert all((Path(path).parent.stat().st_mode | (rest / "pytest").stat().st_mode) & 0o077 == 0 for path in logs)
        left = {path: content for path, content in left.items() if path not in logs}
    for value in values:
        # Nor most of one: a text may have been cut.
        for part in (value, value[:-8] if value.startswith("sk-") else value[:16]):
            assert part not in "\n".join(outputs), _around("\n".join(outputs), part)
            assert [str(path) for path, content in left.items() if part.encode() in content] == []
        if value != secrets.values.get("command"):  # that is the user's own command line
            assert lines.holding(value) == []


def _around(text: str, part: str) -> str:
    place = text.index(part)
    return f"... {text[max(0, place - 400) : place + 200]} ..."


QUICK = [scenario for scenario in SCENARIOS if scenario.quick]


@pytest.mark.fault("no stranger", "secrets in every place, and a run that fails")
@pytest.mark.parametrize("scenario", QUICK, ids=lambda scenario: scenario.name)
def test_no_secret_is_left_by(scenario: Scenario, tmp_path: Path, attempts: Attempts) -> None:
    for chance in attempts(quick=1, full=2):
        _run(scenario, Secrets(chance), tmp_path / str(attempts.tried))


@pytest.mark.fault("no stranger", "secrets in every place, and a run that fails in a rarer way", full=True)
@pytest.mark.parametrize("scenario", [each for each in SCENARIOS if not each.quick], ids=lambda scenario: scenario.name)
def test_no_secret_is_left_by_rarer(scenario: Scenario, tmp_path: Path, attempts: Attempts) -> None:
    for chance in attempts(full=2):
        _run(scenario, Secrets(chance), tmp_path / str(attempts.tried))


WORDS = {"LLMPERF_API_KEY": "engine-dev-key-1", "GRAFANA_TOKEN": "metrics-reader-2024", "DB_PASSWORD": "baseline"}


@pytest.mark.fault("no stranger", "a secret that is a word of ours")
def test_a_secret_that_is_a_word_of_ours_spoils_nothing(tmp_path: Path, attempts: Attempts) -> None:
    for _ in attempts(quick=1):
        args = (*SHORT, "--llmperf-engine=simulated", "--llmperf-json=all.json")
        example = Example({"test_it.py": ASKING}, args, WORDS)
        recorded = example.run(tmp_path, "--update-baselines", timeout_s=TIMEOUT_S)
        assert recorded.outcomes == {"passed": 1}, recorded.stdout + recorded.stderr
        measured = example.run(tmp_path, "--llmperf-tolerance=90%", timeout_s=TIMEOUT_S)
        assert measured.outcomes == {"passed": 1}, measured.stdout + measured.stderr
        assert "baselines: 1 found, 0 new" in measured.stdout
        assert "1 compared" in measured.stdout
        [case] = json.loads((tmp_path / "all.json").read_text())["cases"]
        assert case["engine"]["kind"] == "simulated"
        assert {row["metric"] for row in case["verdict"]["metrics"]} > {"output_tokens_per_s"}
        assert case["launches"][0]["metrics"]


@pytest.mark.fault("no stranger", "a baseline of an older plugin holds keys in plain text", full=True)
def test_a_baseline_with_keys_shows_none_and_loses_them(tmp_path: Path, attempts: Attempts) -> None:
    for chance in attempts(full=3):
        secrets, project = Secrets(chance), tmp_path / str(attempts.tried)
        project.mkdir()
        example = Example({"test_it.py": ASKING}, (*SHORT, *SHOWING, "--llmperf-engine=simulated", "--llmperf-tolerance=50%"))
        assert example.run(project, "--update-baselines").outcomes == {"passed": 1}
        [path] = project.rglob("baselines/**/*.json")
        stored = json.loads(path.read_text())
        stored["provenance"]["engine"] |= {
            "args": secrets.planted("--api-key <args> <second> --hf-token=<hf> --seed 1"),
            "env": {"HF_TOKEN": secrets["env"], "PROXY": secrets.planted("http://me:<proxy>@host/?sig=<query>")},
        }
        path.write_text(json.dumps(stored))
        red = example.run(project, "--llmperf-engine-args=--sim-slow-down 4")
        assert "changed since the baseline: engine argument --seed: 1 -> not set" in red.stdout, red.stdout
        recorded = example.run(project, "--update-baselines")
        assert recorded.outcomes == {"passed": 1}, recorded.stdout
        left = [content for _, content in _stored(project, set())]
        for secret in secrets.values.values():
            assert secret not in red.stdout + red.stderr + recorded.stdout + recorded.stderr
            assert not [content for content in left if secret.encode() in content]
