"""A small server as others write them, for engines that a command line starts: no alias, no `/metrics`, no version.

`openai_server.py --port N [--model NAME] [--without ROUTE ...] [--slowly N] [--die TEXT] [--print FILE] [--shift N]`
"""

from __future__ import annotations

import argparse
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    options: argparse.Namespace
    asked = 0

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self._routed({"/health": self._health, "/v1/models": self._models})

    def do_POST(self) -> None:
        self._routed({"/v1/completions": self._complete, "/v1/chat/completions": self._complete})

    def _routed(self, routes: dict[str, Any]) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer = routes.get(self.path) if self.path.removeprefix("/v1/") not in self.options.without else None
        if answer is None:
            self._send(404, {"detail": "Not Found"})
        else:
            answer(*([json.loads(data)] if data else []))

    def _send(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _health(self) -> None:
        type(self).asked += 1
        loading = self.asked <= self.options.slowly
        self._send(503 if loading else 200, {"error": {"message": "Loading model"}} if loading else {"status": "ok"})

    def _models(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": name} for name in self.options.model]})

    def _complete(self, body: dict[str, Any]) -> None:
        if self.options.model and body["model"] not in self.options.model:  # as vLLM does
            self._send(404, {"error": {"message": f"no model {body['model']}"}})
            return
        prompt, count = body.get("prompt", "x y z"), body["max_tokens"]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": count}
        end = {"usage": usage, "choices": [{"index": 0, "text": "", "finish_reason": "length"}]}
        if not body.get("stream"):
            self._send(200, {"usage": usage, "choices": [{"text": " word" * count, "finish_reason": "length"}]})
            return
        chunks = [{"choices": [{"index": 0, "text": " word"}]} for _ in range(count)]
        events = [f"data: {json.dumps(chunk)}\n\n" for chunk in (*chunks, end)] + ["data: [DONE]\n\n"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events:
            self.wfile.write(f"{len(event):x}\r\n{event}\r\n".encode())
        self.wfile.write(b"0\r\n\r\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--shift", type=int, default=0, help="listen so many ports above")
    parser.add_argument("--model", nargs="*", default=["served"])
    parser.add_argument("--without", nargs="*", default=[], help="routes: models, completions, /health")
    parser.add_argument("--slowly", type=int, default=0, help="so many times 503 from /health")
    parser.add_argument("--die", help="print this and exit with 3")
    parser.add_argument("--print", type=Path, help="print a file first")
    options = parser.parse_args()
    if options.print:
        print(options.print.read_text(), flush=True)
    if options.die:
        sys.exit(print(options.die, file=sys.stderr) or 3)
    _Handler.options = options
    ThreadingHTTPServer(("127.0.0.1", options.port + options.shift), _Handler).serve_forever()


if __name__ == "__main__":
    main()
