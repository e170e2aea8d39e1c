"""Is the chosen split the best one? Every split of a model over two workers of unequal speed, measured.

    python benchmarks/split_choice.py --llama-server BIN/llama-server --rpc-server BIN/ggml-rpc-server [--rounds N]

Two RPC workers of llama.cpp on this machine stand for two cards: one computes with all cores, one with a single thread.
Each is given room for a part of the model only. mgpu is told what each worker measured alone, and chooses; then every
split by whole layers that fits is run in turn, `--rounds` times over, and so is the runtime's own default (by free
memory). The best of many short answers counts, as what else the machine does only ever makes one slower.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from gguf_writer import TensorSpec, Typed, Value, write_gguf
from mgpu.decide.choose import choose
from mgpu.decide.place import by_room, on_one
from mgpu.inspect.source import read_model
from mgpu.plan import Layout, Shape
from mgpu.request import Request
from mgpu.rig import Gpu, Rig
from mgpu.units import GIB
from mgpu_adapters.llamacpp.adapter import LlamaCpp

N_LAYERS, WIDTH, FF, HEADS, VOCAB = 16, 1536, 6144, 12, 8192
N_TOKENS = 8
N_TIMES = 10  # the best of so many short answers counts: the machine may be busy with other things
ROOM = 0.7  # of the model, on each worker


class Worker(Struct, frozen=True, kw_only=True):
    """One RPC worker, as a card."""

    endpoint: str
    name: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", required=True)
    parser.add_argument("--rpc-server", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        path = Path(directory) / "model.gguf"
        path.write_bytes(content())
        threads = (max(os.cpu_count() or 2, 2), 1)
        workers = [stack.enter_context(worker(asked.rpc_server, count)) for count in threads]
        measure(asked.llama_server, path, workers, asked.rounds)


def measure(server: str, path: Path, workers: list[Worker], rounds: int) -> None:
    model, adapter, request = read_model(str(path)), LlamaCpp(), Request(ctx=512)
    job = adapter.job(model, request, adapter.assumed())
    gpus: list[Gpu] = []
    for index in range(len(workers)):
        gpu = Gpu(
            index=index, name=f"RPC worker {index}", vendor="unknown", total_bytes=64 * GIB, free_bytes=64 * GIB,
            device=f"RPC{index}",
        )  # fmt: skip
        alone = on_one(job, gpu)
        speed = max(tokens_per_s(server, path, workers, alone) for _ in range(rounds))
        work = job.work
        pace = int((work.weights[-1] + work.experts[-1] + work.cache[-1]) * speed)
        everything, shape = range(job.n_units), Shape(n_devices=2)
        stored = job.stored(everything, shape, gpu)
        room = int(ROOM * stored) + job.device(everything, shape, gpu).total - stored
        gpus.append(replace(gpu, bandwidth_bytes_per_s=pace, free_bytes=room))
        print(f"worker {index}, {workers[index].name}: {speed:6.2f} tok/s alone")
    rig = Rig(name="workers", source="profile", gpus=tuple(gpus), ram_bytes=64 * GIB, ram_free_bytes=64 * GIB)
    plan = choose(request, rig, job)
    default = by_room(job, gpus)
    layouts = {layout_key(layout): layout for layout in (*splits(job, gpus), plan.layout, default)}
    results: dict[tuple[Any, ...], list[float]] = {key: [] for key in layouts}
    for _ in range(rounds):  # in turn, so that what else the machine does is shared by all
        for key, layout in layouts.items():
            results[key].append(tokens_per_s(server, path, workers, layout))
    best_of = {key: max(values) for key, values in results.items()}
    for key, value in sorted(best_of.items(), key=lambda item: -item[1]):
        marks = [word for word, one in (("chosen", plan.layout), ("default", default)) if layout_key(one) == key]
        print(f"workers {key[0]}, layers {key[1]}: {value:6.2f} tok/s  {' '.join(marks)}")
    best, chosen, unasked = max(best_of.values()), best_of[layout_key(plan.layout)], best_of[layout_key(default)]
    print(f"chosen / best of all: {chosen / best:.3f}; chosen / default: {chosen / unasked:.3f}")


def splits(job: Any, gpus: list[Gpu]) -> Iterator[Layout]:
    """Every split over both workers, in either order, that fits each worker's room."""
    shape = Shape(n_devices=2)
    for first, second in ((gpus[0], gpus[1]), (gpus[1], gpus[0])):
        for count in range(1, job.n_units):
            layout = Layout(gpus=(first.index, second.index), counts=(count, job.n_units - count), shape=shape)
            pairs = zip(layout.spans(), (first, second), strict=True)
            if all(job.device(span, shape, gpu).total <= gpu.usable_bytes for span, gpu in pairs):
                yield layout


def layout_key(layout: Layout) -> tuple[Any, ...]:
    return layout.gpus, layout.counts


def tokens_per_s(server: str, path: Path, workers: list[Worker], layout: Layout) -> float:
    """Generated tokens per second, as the server itself times them."""
    port = free_port()
    devices = ",".join(f"RPC{index}" for index in layout.gpus)
    split = ["--tensor-split", ",".join(map(str, layout.counts))] if len(layout.gpus) > 1 else ["--split-mode", "none"]
    argv = [server, "--rpc", ",".join(worker.endpoint for worker in workers), "--model", str(path), "--device", devices]
    argv += ["--n-gpu-layers", "999", *split, "--fit", "off", "--ctx-size", "512", "--parallel", "1"]
    argv += ["--port", str(port)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_ready(port, process)
        ask(port, 4)
        return max(float(ask(port, N_TOKENS)["timings"]["predicted_per_second"]) for _ in range(N_TIMES))
    finally:
        process.terminate()
        process.wait()


def ask(port: int, n_tokens: int) -> Any:
    body = {"prompt": [5, 6, 7, 8], "n_predict": n_tokens, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def wait_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit("llama-server died")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(0.1)
    raise SystemExit("llama-server was not ready in time")


@contextlib.contextmanager
def worker(executable: str, threads: int) -> Iterator[Worker]:
    port = free_port()
    argv = [executable, "--host", "127.0.0.1", "--port", str(port), "--threads", str(threads)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(1.0)
        yield Worker(endpoint=f"127.0.0.1:{port}", name=f"{threads} threads" if threads > 1 else "1 thread")
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def content() -> bytes:
    """A llama of weights that are all zero: a CPU takes as long for them as for any."""
    kv_width = WIDTH // 3
    tensors = [TensorSpec("token_embd.weight", (WIDTH, VOCAB), "Q8_0")]
    for il in range(N_LAYERS):
        block = f"blk.{il}."
        tensors += [
            TensorSpec(f"{block}attn_norm.weight", (WIDTH,)),
            TensorSpec(f"{block}attn_q.weight", (WIDTH, WIDTH), "Q8_0"),
            TensorSpec(f"{block}attn_k.weight", (WIDTH, kv_width), "Q8_0"),
            TensorSpec(f"{block}attn_v.weight", (WIDTH, kv_width), "Q8_0"),
            TensorSpec(f"{block}attn_output.weight", (WIDTH, WIDTH), "Q8_0"),
            TensorSpec(f"{block}ffn_norm.weight", (WIDTH,)),
            TensorSpec(f"{block}ffn_gate.weight", (WIDTH, FF), "Q8_0"),
            TensorSpec(f"{block}ffn_up.weight", (WIDTH, FF), "Q8_0"),
            TensorSpec(f"{block}ffn_down.weight", (FF, WIDTH), "Q8_0"),
        ]
    tensors += [TensorSpec("output_norm.weight", (WIDTH,)), TensorSpec("output.weight", (WIDTH, VOCAB), "Q8_0")]
    return write_gguf(metadata(), tensors)


def metadata() -> dict[str, Value]:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [f"w{number}" for number in range(VOCAB - len(words))]
    kinds = [2, 3, 3, *([6] * 256), *([1] * (VOCAB - 259))]
    return {
        "general.architecture": "llama",
        "general.name": "split choice",
        "general.file_type": Typed(4, 7),
        "llama.block_count": Typed(4, N_LAYERS),
        "llama.context_length": Typed(4, 2048),
        "llama.embedding_length": Typed(4, WIDTH),
        "llama.feed_forward_length": Typed(4, FF),
        "llama.attention.head_count": Typed(4, HEADS),
        "llama.attention.head_count_kv": Typed(4, HEADS // 3),
        "llama.attention.layer_norm_rms_epsilon": Typed(6, 1e-5),
        "llama.rope.dimension_count": Typed(4, WIDTH // HEADS),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": Typed(6, [0.0] * VOCAB),
        "tokenizer.ggml.token_type": Typed(5, kinds),
        "tokenizer.ggml.bos_token_id": Typed(4, 1),
        "tokenizer.ggml.eos_token_id": Typed(4, 2),
    }


if __name__ == "__main__":
    main()
