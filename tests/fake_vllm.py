#!/usr/bin/env python3
"""Stands in for an interpreter that has vLLM: it tells versions, and hosts an engine whose rounds never end."""

from __future__ import annotations

import http.server
import itertools
import json
import sys
import threading

TOKENS = itertools.count()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as `host_llm.py` does; a round goes on for ever, with progress."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        names = [{"id": name} for name in served]
        told = {"/v1/models": {"data": names}, "/health": {}, "/progress": {"tokens": next(TOKENS), "open": 1}}
        self.answer(told.get(self.path))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/play":
            print("round begun", flush=True)
            threading.Event().wait()
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        self.answer({"choices": [{"text": "x"}], "usage": usage})

    def answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(404 if value is None else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log no request."""


if sys.argv[1] == "-c":
    print(json.dumps({"vllm": "0.32.0", "torch": None, "cuda": None}))
else:
    words = sys.argv
    first = words.index("--served-model-name") + 1
    served = words[first : words.index("--host")]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler)
    server.daemon_threads = True
    server.serve_forever()
