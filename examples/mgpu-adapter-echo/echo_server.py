"""`echo-server`: the smallest runtime that mgpu can drive. It answers OpenAI's completions with the prompt."""

from __future__ import annotations

import argparse
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """GET /health: 200 as soon as the model is loaded."""
        self._answer(200 if self.path == "/health" else 404, {"status": "ok"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            self._answer(200, {"choices": [{"text": asked["prompt"]}], "usage": {"completion_tokens": 1}})
        elif self.path == "/v1/chat/completions":
            self._stream({"choices": [{"delta": {"content": asked["messages"][-1]["content"]}}]})
        else:
            self._answer(404, {"error": {"message": "no such place"}})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def _stream(self, piece: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(f"data: {json.dumps(piece)}\n\ndata: [DONE]\n\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser(prog="echo-server")
    parser.add_argument("--version", action="version", version="echo-server 1.0")
    parser.add_argument("--model", required=True)
    parser.add_argument("--ctx", type=int)
    parser.add_argument("--layers")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--hoarse", action="store_true", help="fail, to see how that looks")
    options = parser.parse_args()
    sys.stderr.write(f"echo: opening {options.model}\n")
    if options.hoarse:
        sys.stderr.write("echo: no voice\n")
        sys.exit(1)
    ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
