"""Host `vllm.LLM` in a process of its own, so that rounds are played without HTTP.

Run as a script by the engine's interpreter, with the arguments of vLLM's server. It answers what is needed to start, check and
watch it (`/health`, `/v1/models`, `/v1/completions`, `/metrics`), and `POST /play`, which plays a whole round on the engine and
returns what happened. HTTP carries a round there and back; nothing is sent while it is played. It imports no part of the package.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import hmac
import http.server
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from typing import Any

_NEVER = "never sent: the request before it in its conversation failed"
_TIMEOUT = "not complete after {:g} s"


def _engine(words: list[str]) -> tuple[Any, Any]:
    """Return the arguments and the running LLM."""
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:  # before vLLM 0.12
        from vllm.utils import FlexibleArgumentParser
    parser = FlexibleArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--api-key", nargs="*")  # several: only one client asks here, and it brings that of the environment
    parser.add_argument("--disable-uvicorn-access-log", action="store_true")
    EngineArgs.add_cli_args(parser)
    args = parser.parse_args(words)
    asked = EngineArgs.from_cli_args(args)
    asked.disable_log_stats = False  # the counters are what is read of it
    return args, vllm.LLM(**{field.name: getattr(asked, field.name) for field in dataclasses.fields(asked)})


class Round:
    """Plays the prompts of a round on an LLM, step by step, as its `generate` does."""

    def __init__(self, llm: Any, plan: dict[str, Any]) -> None:
        """Be ready to play a plan: its prompts, how many at a time, and the time-out of each."""
        self.engine = llm.llm_engine
        self.prompts = plan["prompts"]
        self.concurrency = plan["concurrency"]
        self.timeout_s = plan["request_timeout_s"]
        self.most = plan.get("max_concurrency") or len(self.prompts)
        self.stop_s = plan.get("stop_s")
        self.over = plan.get("over")
        self.records: list[dict[str, Any]] = [{"sent_s": None, "error": _NEVER} for _ in self.prompts]
        self.open: dict[str, int] = {}
        self.waiting = collections.deque(index for index, prompt in enumerate(self.prompts) if not prompt["follows"])
        self.paused: list[tuple[float, int]] = []
        """When the next request of a conversation is due whose user thinks, and its index."""
        self.freed_s = 0.0
        """When an answer made room under the cap last."""
        self.begin_s = 0.0
        self.tokens = 0
        """How many have come: another thread reads it, to see whether the engine makes progress."""

    def play(self) -> list[dict[str, Any]]:
        """Play all prompts in this thread; return a record of each, as a client would make it."""
        self.begin_s = time.perf_counter()
        while self.waiting or self.open or self.paused:
            self._add_due()
            if not self.open:
                if not (self.waiting or self.paused):
                    break  # the round's time is over
                time.sleep(max(0.0, self._next_due_s() - time.perf_counter()))
                continue
            outputs = self.engine.step()
            now_s = time.perf_counter()
            for output in outputs:
                self._take(output, now_s)
            self._drop_overdue(now_s)
        return self.records

    def _due_s(self, index: int) -> float:
        return self.begin_s + (self.prompts[index]["due_s"] or 0.0)

    def _next_due_s(self) -> float:
        # In a closed loop nobody begins before another one is through: then users think.
        at_a_rate = self.waiting and self.prompts[self.waiting[0]]["due_s"] is not None
        begins = [self._due_s(self.waiting[0])] if at_a_rate else []
        return min([*begins, *(due_s for due_s, _ in self.paused[:1])])

    def _add_due(self) -> None:
        """Add what is due, or in a closed loop as many conversations as are to be under way."""
        while self.paused and self.paused[0][0] <= time.perf_counter() and len(self.open) < self.most:
            due_s, index = heapq.heappop(self.paused)
            self._add(index, due_s)
        while self.waiting:
            index = self.waiting[0]
            if self.prompts[index]["due_s"] is not None:
                if self._due_s(index) > time.perf_counter() or len(self.open) >= self.most:
                    return
            elif self._is_over(time.perf_counter()):
                for left in self.waiting:
                    self._leave_out(left)
                self.waiting.clear()
                return
            elif len(self.open) + len(self.paused) >= self.concurrency:
                return
            self.waiting.popleft()
            self._add(index, self._due_s(index) if self.prompts[index]["due_s"] is not None else None)

    def _is_over(self, now_s: float) -> bool:
        return self.stop_s is not None and now_s >= self.begin_s + self.stop_s

    def _leave_out(self, index: int) -> None:
        """Note that a conversation is not sent from this request on, because the round's time is over."""
        self.records[index]["error"] = self.over
        while index + 1 < len(self.prompts) and self.prompts[index + 1]["follows"]:
            index += 1
            self.records[index]["error"] = self.over

    def _follow(self, index: int, now_s: float) -> None:
        """Go on with a conversation: at once, when its user has thought, or not at all where the round's time is over."""
        due_s = now_s + self.prompts[index].get("think_s", 0.0)
        if self._is_over(due_s):
            self._leave_out(index)
        elif due_s > now_s:
            heapq.heappush(self.paused, (due_s, index))
        else:
            self._add(index, None)

    def _add(self, index: int, due_s: float | None) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt = self.prompts[index]
        wanted = {"temperature": 0, "ignore_eos": True, "max_tokens": prompt["output_tokens"], **prompt["body"]}
        wanted = {name: value for name, value in wanted.items() if value is not None}  # None leaves a field out
        try:
            params = SamplingParams(**wanted, output_kind=RequestOutputKind.DELTA)
        except TypeError as error:
            fields = ", ".join(prompt["body"])
            raise ValueError(f"a request has the fields {fields}, of which vllm.SamplingParams takes not all: {error}") from error
        record = self.records[index]
        record.update(sent_s=time.perf_counter(), token_times_s=[], output_tokens=0, error=None)
        if due_s is not None:
            # In a closed loop latencies count from sending. Waiting for room under the cap is no lateness.
            is_open_loop = any(first["due_s"] is not None for first in self.prompts[:1])
            record.update({"due_s": due_s} if is_open_loop else {})
            record["delay_s"] = record["sent_s"] - max(due_s, self.freed_s)
        key = f"llmperf-{time.monotonic_ns()}-{index}"
        asked = {"prompt_token_ids": prompt["token_ids"]} if prompt["token_ids"] else {"prompt": prompt["text"]}
        # What add_request returns is the request's name in newer releases; in older ones nothing.
        self.engine.add_request(key, asked, params)
        self.open[key] = index

    def _take(self, output: Any, now_s: float) -> None:
        index = self.open.get(output.request_id)
        if index is None:
            return
        record = self.records[index]
        new = sum(len(completion.token_ids) for completion in output.outputs)
        record["token_times_s"] += [now_s] * new
        record["output_tokens"] += new
        self.tokens += new
        if not output.finished:
            return
        if len(self.open) >= self.most:
            self.freed_s = now_s
        del self.open[output.request_id]
        record.update(end_s=now_s, prompt_tokens=len(output.prompt_token_ids or ()))
        wanted, exact = self.prompts[index]["output_tokens"], self.prompts[index]["exact"]
        count = record["output_tokens"]
        record["finish_reason"] = reason = getattr(output.outputs[0], "finish_reason", None) if output.outputs else None
        if reason not in ("stop", "length", "repetition"):  # vLLM's others are abort and error
            record["error"] = f"it ended with finish_reason {reason!r} after {count} of {wanted} tokens"
        elif reason == "length" and not exact and count < wanted:
            record["error"] = f"the engine cut it: finish_reason 'length' after {count} of {wanted} tokens"
        elif count != wanted and (exact or not count):
            record["error"] = f"{count} of {wanted} tokens"
        if index + 1 < len(self.prompts) and self.prompts[index + 1]["follows"]:
            self._follow(index + 1, now_s)

    def _drop_overdue(self, now_s: float) -> None:
        late = [key for key, index in self.open.items() if now_s - self.records[index]["sent_s"] > self.timeout_s]
        if late:
            self.engine.abort_request(late)
        for key in late:
            self.records[self.open.pop(key)]["error"] = _TIMEOUT.format(self.timeout_s)


class _Host:
    """The LLM. Only the main thread uses it: CPU workers are bound to that thread, and engines are not thread-safe."""

    def __init__(self, args: Any, llm: Any, key: str) -> None:
        self.llm = llm
        self.key = key
        """What requests must bring; empty: nothing."""
        self.names = args.served_model_name or [args.model]
        self.round: Round | None = None
        self._work: queue.SimpleQueue[tuple[Any, queue.SimpleQueue[Any]]] = queue.SimpleQueue()

    def run(self) -> None:
        """Do the work that other threads ask for; never returns."""
        while True:
            work, answer = self._work.get()
            try:
                answer.put((200, work()))
            except Exception as error:
                traceback.print_exc()
                answer.put((500, {"error": {"message": f"{type(error).__name__}: {error}"}}))

    def ask(self, work: Any) -> tuple[int, Any]:
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._work.put((work, answer))
        answered: tuple[int, Any] = answer.get()
        return answered

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return one completion as the server's API would."""
        from vllm import SamplingParams

        asked = body["prompt"]
        prompt = {"prompt": asked} if isinstance(asked, str) else {"prompt_token_ids": asked}
        params = SamplingParams(temperature=body.get("temperature", 0), max_tokens=body.get("max_tokens", 16))
        [output] = self.llm.generate([prompt], params, use_tqdm=False)
        [choice] = output.outputs
        counts = {"prompt_tokens": len(output.prompt_token_ids), "completion_tokens": len(choice.token_ids)}
        return {"choices": [{"index": 0, "text": choice.text}], "usage": counts}


class _Handler(http.server.BaseHTTPRequestHandler):
    host: _Host
    protocol_version = "HTTP/1.1"

    def refused(self) -> bool:
        """Refuse who does not bring the key; whether it lives may be asked by anybody."""
        wanted = f"Bearer {self.host.key}".encode()
        if not self.host.key or hmac.compare_digest((self.headers.get("Authorization") or "").encode(), wanted):
            return False
        self.give(401, {"error": "Unauthorized"})
        self.close_connection = True  # what it has sent is not read
        return True

    def do_GET(self) -> None:
        if self.path == "/health":
            return self.answer(200, b"")
        if self.path == "/metrics":
            from prometheus_client import generate_latest

            return self.answer(200, generate_latest(), "text/plain; version=0.0.4; charset=utf-8")
        if self.refused():
            return None
        if self.path == "/progress":
            now = self.host.round
            return self.give(200, {"tokens": now.tokens if now else 0, "open": len(now.open) if now else 0})
        if self.path == "/v1/models":
            return self.give(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.host.names]})
        return self.give(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        if self.refused():
            return None
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        if self.path == "/play":
            self.host.round = Round(self.host.llm, body)
            return self.give(*self.host.ask(self.host.round.play))
        if self.path == "/v1/completions":
            return self.give(*self.host.ask(lambda: self.host.complete(body)))
        return self.give(404, {"detail": "Not Found"})

    def give(self, status: int, value: object) -> None:
        self.answer(status, json.dumps(value).encode())

    def answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log no request."""


def main() -> None:
    """Start the LLM, then answer until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Taken out: vLLM makes each of its variables a part of its compile cache's name.
    key = os.environ.pop("VLLM_API_KEY", "")
    hidden = json.loads(os.environ.pop("LLMPERF_ARGUMENTS", "[]"))  # those that hold secrets
    args, llm = _engine([*sys.argv[1:], *hidden])
    try:
        host = _Host(args, llm, key)
        server = http.server.ThreadingHTTPServer((args.host, args.port), type("Handler", (_Handler,), {"host": host}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, name="llmperf-http", daemon=True).start()
        host.run()
    finally:
        _stop(llm)


def _stop(llm: Any) -> None:
    """End the engine core and its workers at once, as vLLM's server does, and this process; else they linger for seconds."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    failed = sys.exc_info()[0] not in (None, SystemExit)
    if failed:
        traceback.print_exc()
    try:
        core = llm.llm_engine.engine_core
        try:
            core.shutdown(timeout=0)
        except TypeError:  # older releases take no timeout
            core.shutdown()
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(failed))


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        sys.path.pop(0)  # this script's folder, whose modules would hide others of the same name
    main()
