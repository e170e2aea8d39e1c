"""A FAKE `vllm serve`: the endpoints and log lines of vLLM 0.32 that mgpu looks at, and nothing behind them.

    python fake_vllm.py serve MODEL --host H --port P [-tp N] [-pp N] …

FAKE_VLLM says what goes wrong: `split` (it runs as one rank whatever was asked), `oom` (it dies while loading),
`engine` (its engine dies after the first answer, and it exits with status 0), `deaf` (SIGTERM does nothing), `left`
(it names a file for its workers to meet in, and dies).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULT = os.environ.get("FAKE_VLLM", "")
_MEETING = "vllm_dist_0123456789abcdef0123456789abcdef"


def option(words: list[str], *names: str, default: str = "1") -> str:
    """The last value of a flag."""
    found = [words[at + 1] for at, word in enumerate(words[:-1]) if word in names]
    return found[-1] if found else default


def fingerprint(words: list[str]) -> str:
    """As vLLM puts it in each answer (entrypoints/serve/utils/fingerprint.py)."""
    ranks = option(words, "-tp", "--tensor-parallel-size")
    stages = option(words, "-pp", "--pipeline-parallel-size")
    if FAULT == "split":
        ranks = stages = "1"
    parts = [f"tp{ranks}"] * (ranks != "1") + [f"pp{stages}"] * (stages != "1")
    return "-".join(["vllm-0.32.0", *parts, "0badcafe"])


def log(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Handler(BaseHTTPRequestHandler):
    words: tuple[str, ...] = ()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        log("INFO:     " + format % args)

    def do_GET(self) -> None:
        self._answer(200, None) if self.path == "/health" else self._answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            self._answer(200, self._said({"text": f"plain: {asked['prompt']}"}))
        elif self.path == "/v1/chat/completions":
            self._stream(f"chat: {asked['messages'][-1]['content']}")
        else:
            self._answer(404, {"detail": "Not Found"})
        if FAULT == "engine":
            log("(EngineCore pid=7) ERROR 11-23 18:54:48 [multiproc_executor.py:315] Worker proc VllmWorker-1 died "
                "unexpectedly (exit code: None), shutting down executor.")  # fmt: skip
            threading.Timer(0.2, os._exit, [0]).start()

    def _said(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"prompt_tokens": 2, "completion_tokens": 1}
        return {"choices": [choice], "usage": usage, "system_fingerprint": fingerprint(list(self.words))}

    def _stream(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for piece in (self._said({"delta": {"content": text}}), self._said({"delta": {}, "finish_reason": "stop"})):
            self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def _answer(self, status: int, body: object) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def load() -> None:
    log("(Worker_TP0 pid=9) INFO 11-23 18:57:59 [gpu_model_runner.py:68] Starting to load model ./tiny...")
    if FAULT == "left":
        meeting = Path(os.environ["FAKE_VLLM_TMP"]) / _MEETING
        meeting.write_text("")
        log(f"(Worker pid=9) INFO 11-23 18:57:59 [parallel_state.py:1906] world_size=2 rank=1 local_rank=1 "
            f"distributed_init_method=file://{meeting} backend=gloo")  # fmt: skip
        log("(EngineCore pid=7) ERROR 11-23 torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
        time.sleep(0.5)
        sys.exit(1)
    if FAULT == "oom":
        log("(EngineCore pid=7) ERROR 11-23 torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
        log("RuntimeError: Engine core initialization failed. See root cause above.")
        sys.exit(1)
    log("(EngineCore pid=7) INFO 11-23 [kv_cache_utils.py:2327] GPU KV cache size: 8,192 tokens, Maximum concurrency")


def main(words: list[str]) -> None:
    ignored = signal.SIG_IGN if FAULT == "deaf" else signal.SIG_DFL
    signal.signal(signal.SIGTERM, ignored)
    record = os.environ.get("FAKE_VLLM_RECORD")
    if record:
        kept = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(("CUDA", "VLLM", "OMP"))}
        Path(record).write_text(json.dumps({"argv": words, "env": kept}), encoding="utf-8")
    load()
    Handler.words = tuple(words)
    host, port = option(words, "--host", default="127.0.0.1"), int(option(words, "--port", default="8000"))
    server = ThreadingHTTPServer((host, port), Handler)
    log(f"(APIServer pid=1) INFO 11-23 Starting vLLM server on http://{host}:{port}")
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
