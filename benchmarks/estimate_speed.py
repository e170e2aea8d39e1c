"""What a decision costs: a model's memory on eight cards and its best split, as a ratio to reading the model's header.

    python benchmarks/estimate_speed.py [--rounds N]

Each round reads every header and decides anew, nothing remembered; the least of all rounds counts, as the machine may
be busy with other things. The cards are so small that only all eight, or nearly, hold the model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from gguf_writer import TensorSpec, Typed, Value, write_gguf
from headers import content
from mgpu.decide.choose import choose
from mgpu.inspect.gguf import parse_header
from mgpu.inspect.gguf_model import build_model
from mgpu.model import Model, ModelFile
from mgpu.plan import Plan
from mgpu.request import Request
from mgpu.rig import Gpu, Rig
from mgpu.units import GB, GIB
from mgpu_adapters.llamacpp.adapter import LlamaCpp

N_CARDS = 8

#: Headers without a vocabulary, so that reading them is as quick as can be, and the ratios as bad.
NAMES = (
    "Llama-3.3-70B-Instruct-Q4_K_M",
    "GLM-4.5-Air-Q4_K_M",
    "Kimi-K2-Instruct-Q3_K_M",
    "MiniMax-M2-Q4_K_M",
    "gemma-3-27b-it-Q4_K_M",
    "Qwen3-Next-80B-A3B-Instruct-Q4_K_M",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    print(
        f"{'model':38} {'layers':>6} {'reading':>10} {'deciding':>10} {'ratio':>7}   units on each of {N_CARDS} cards"
    )
    for name, n_vocab, header in headers():
        model = read(header)
        seconds = best_of(rounds, lambda header=header: read(header))  # type: ignore[misc]  # bound now, called now
        rig = rig_for(model)
        decided = best_of(rounds, lambda model=model, rig=rig: decide(model, rig))  # type: ignore[misc]  # as above
        label = f"{name}, {n_vocab} words" if n_vocab else name
        print(
            f"{label:38} {model.hyper.n_layer + 1:6} {seconds * 1e3:7.2f} ms {decided * 1e3:7.2f} ms"
            f" {decided / seconds:7.2f}   {decide(model, rig).layout.counts}"
        )
    mixed(rounds)


def mixed(rounds: int) -> None:
    """Eight cards of eight sizes and speeds: how long the choice among all their sets takes, by how many are needed."""
    print(f"\n{'eight unequal cards':38} {'holding':>10} {'deciding':>10}   placement")
    for name, n_vocab, header in headers():
        if n_vocab:
            continue
        model = read(header)
        for share in (3.0, 1.5, 1.15, 0.7):
            rig = mixed_rig(model, share)
            seconds = best_of(rounds, lambda model=model, rig=rig: decide(model, rig))  # type: ignore[misc]  # as above
            plan = decide(model, rig)
            print(f"{name:38} {share:9.2f}x {seconds * 1e3:7.2f} ms   {plan.placement} on {len(plan.devices)}")


def mixed_rig(model: Model, share: float) -> Rig:
    """Eight cards that together hold `share` times the weights, and 3/2 GiB each for the rest."""
    parts = (32, 24, 24, 16, 16, 12, 12, 8)
    speeds = (1792, 1008, 936, 717, 448, 504, 360, 448)
    gpus: list[Gpu] = []
    for index, (part, speed) in enumerate(zip(parts, speeds, strict=True)):
        size = int(model.weights_bytes * share * (part + index / 8) / sum(parts)) + 3 * GIB // 2
        gpus.append(
            Gpu(
                index=index, name=f"card {index}", vendor="nvidia", total_bytes=size, free_bytes=size,
                bandwidth_bytes_per_s=speed * GB,
            )
        )  # fmt: skip
    return Rig(name="mixed", source="profile", gpus=tuple(gpus), ram_bytes=1024 * GIB, ram_free_bytes=1000 * GIB)


def headers() -> Iterator[tuple[str, int, bytes]]:
    """Name, words in the vocabulary, and the header's bytes."""
    for n_vocab in (0, 151_936):
        yield "Qwen3-235B-A22B", n_vocab, qwen3_235b(n_vocab)
    for name in NAMES:
        yield name, 0, content(name)


def best_of(rounds: int, work: Callable[[], object]) -> float:
    """The least of the seconds the work took."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def read(header: bytes) -> Model:
    parsed = parse_header(header, n_bytes_total=1 << 50, origin="benchmark")
    return build_model([parsed], (ModelFile(path="/benchmark.gguf", n_bytes=1 << 50),))


def decide(model: Model, rig: Rig) -> Plan:
    adapter = LlamaCpp()
    return choose(Request(), rig, adapter.job(model, Request(), adapter.assumed()))


def rig_for(model: Model) -> Rig:
    """Eight equal cards that hold a tenth more than the weights, and 3/2 GiB each for the rest."""
    size = model.weights_bytes * 11 // 10 // N_CARDS + 3 * GIB // 2
    gpus = tuple(
        Gpu(
            index=index, name="card", vendor="nvidia", total_bytes=size, free_bytes=size, bandwidth_bytes_per_s=936 * GB
        )
        for index in range(N_CARDS)
    )
    return Rig(name="benchmark", source="profile", gpus=gpus, ram_bytes=512 * GIB, ram_free_bytes=500 * GIB)


def qwen3_235b(n_vocab: int) -> bytes:
    """The header of Qwen3-235B-A22B: 94 blocks of 128 experts, as its config.json has them; all matrices Q4_K."""
    arch = "qwen3moe"
    metadata: dict[str, Value] = {
        "general.architecture": arch,
        "general.name": "Qwen3-235B-A22B",
        "general.file_type": 14,
        f"{arch}.context_length": 40960,
        f"{arch}.embedding_length": 4096,
        f"{arch}.block_count": 94,
        f"{arch}.feed_forward_length": 12288,
        f"{arch}.expert_feed_forward_length": 1536,
        f"{arch}.expert_count": 128,
        f"{arch}.expert_used_count": 8,
        f"{arch}.attention.head_count": 64,
        f"{arch}.attention.head_count_kv": 4,
        f"{arch}.attention.key_length": 128,
        f"{arch}.attention.value_length": 128,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{arch}.vocab_size": 151_936,
        "tokenizer.ggml.model": "gpt2" if n_vocab else "no_vocab",
    }
    if n_vocab:
        words = [f"word{number}" for number in range(n_vocab)]
        metadata["tokenizer.ggml.tokens"] = words
        metadata["tokenizer.ggml.token_type"] = Typed(5, [1] * n_vocab)
    return write_gguf(metadata, list(_tensors(94)), data=False)


def _tensors(n_layer: int) -> Iterator[TensorSpec]:
    yield TensorSpec("token_embd.weight", (4096, 151_936), "Q4_K")
    shapes = {
        "attn_norm": (4096,),
        "attn_q": (4096, 8192),
        "attn_k": (4096, 512),
        "attn_v": (4096, 512),
        "attn_output": (8192, 4096),
        "attn_q_norm": (128,),
        "attn_k_norm": (128,),
        "ffn_norm": (4096,),
        "ffn_gate_exps": (4096, 1536, 128),
        "ffn_up_exps": (4096, 1536, 128),
        "ffn_down_exps": (1536, 4096, 128),
    }
    for il in range(n_layer):
        for name, shape in shapes.items():
            yield TensorSpec(f"blk.{il}.{name}.weight", shape, "F32" if "norm" in name else "Q4_K")
        yield TensorSpec(f"blk.{il}.ffn_gate_inp.weight", (4096, 128), "F32")
    yield TensorSpec("output_norm.weight", (4096,), "F32")
    yield TensorSpec("output.weight", (4096, 151_936), "Q6_K")


if __name__ == "__main__":
    main()
