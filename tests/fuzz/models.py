"""Model files: GGUF, safetensors, config.json and its like, Ollama's store; and plans made from what they claim."""

from __future__ import annotations

import io
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import headers
from fuzz.target import MIB, Target, check_line, scratch
from gguf_writer import Typed, Value, llama_metadata, llama_tensors, small_llama, write_gguf, write_shards
from mgpu.decide.choose import choose
from mgpu.decide.consider import with_reserves
from mgpu.errors import BadModelError, DoesNotFitError, MgpuError, RuntimeMissingError, UsageError
from mgpu.inspect.gguf import NeedMore, parse_header
from mgpu.inspect.gguf_model import build_model
from mgpu.inspect.hf_model import read_directory
from mgpu.inspect.ollama_store import close_names, find_stored, stores
from mgpu.inspect.safetensors import parse_header as parse_safetensors
from mgpu.inspect.source import read_model
from mgpu.model import Model, ModelFile
from mgpu.report.as_json import model_report
from mgpu.report.lines import run_lines, title
from mgpu.report.screen import console
from mgpu.report.tables import model_screen
from mgpu.request import Request
from mgpu_adapters.registry import load_adapter
from mgpu_profiles.rigs import parse_rig
from mgpu_profiles.store import BUNDLED
from safetensors_writer import CONFIGS, Spec, awq, entries, exl2, exl3, gptq, header, small_config, small_tensors

#: A part of an input that is a file: its name, then its bytes.
_PART: Final = re.compile(rb"(?:^|\n)%%% ([^\n]{0,200})\n")
_BEHIND: Final = 1 << 36  # bytes of weights that a fuzzed header may claim


def joined(files: Mapping[str, bytes]) -> bytes:
    """Several files as one input."""
    return b"".join(b"\n%%% " + name.encode() + b"\n" + content for name, content in files.items())


def write_parts(data: bytes, root: Path) -> list[str]:
    """The files of an input, in `root` and nowhere else; a safetensors file as long as its header wants it."""
    for old in root.iterdir():
        old.unlink()
    words = _PART.split(data)
    names = []
    for name, content in zip(words[1::2], words[2::2], strict=False):
        plain = re.sub(r"[^\w.-]", "_", name.decode("utf-8", "replace"))[:100].lstrip(".") or "none"
        path = root / plain
        path.write_bytes(content)
        if plain.endswith(".safetensors"):
            _lengthen(path, content)
        names.append(plain)
    return names


def _lengthen(path: Path, content: bytes) -> None:
    try:
        (length,) = struct.unpack_from("<Q", content)
        told = json.loads(content[8 : 8 + length])
        end = max(entry["data_offsets"][1] for name, entry in told.items() if name != "__metadata__")
        if 0 <= end < 1 << 45 and length < 1 << 45:
            os.truncate(path, 8 + length + end)
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError, ValueError, struct.error):
        return  # a header that is not sound: as it is


def _folder(name: str) -> Path:
    folder = scratch() / name
    folder.mkdir(exist_ok=True)
    return folder


# What mgpu inspect prints, and what plans take.


def show(model: Model) -> None:
    """`mgpu inspect`, as text and as JSON."""
    check_line(title(model))
    json.dumps(model_report(model, 0)).encode()
    console(io.StringIO(), width=80).print(model_screen(model, 0))


_RIGS: Final = tuple(
    parse_rig((BUNDLED / f"{name}.toml").read_text(encoding="utf-8"), name)
    for name in ("3090+3060", "4x3090", "cpu-only")
)
_REQUESTS: Final = (
    Request(offload="allow"),
    Request(ctx="max", kv_type="q8_0", offload="allow"),
    Request(users=5, split="tensor", force=True, offload="allow"),
)


def _plan(model: Model, runtimes: tuple[str, ...], number: int) -> None:
    adapter = load_adapter(runtimes[number % len(runtimes)])
    request, rig = _REQUESTS[number // 3 % 3], _RIGS[number // 9 % 3]
    job = adapter.job(model, request, adapter.assumed())
    plan = choose(request, with_reserves(request, rig), job)
    for line in run_lines(model, plan):
        check_line(line, 2000)
    if plan.refusal is not None:
        raise DoesNotFitError(plan.refusal.message, hint=plan.refusal.hint)


# GGUF


def _gguf(data: bytes) -> Model | None:
    total = len(data) + (_BEHIND if data[-1:] != b"\0" else 0)
    try:
        head = parse_header(data, n_bytes_total=total, origin="m.gguf")
    except NeedMore as more:
        assert len(data) < more.at_least <= total  # noqa: PT017 - it is no error
        return None
    return build_model((head,), (ModelFile(path="/models/m.gguf", n_bytes=total),))


def _gguf_shown(data: bytes) -> None:
    model = _gguf(data)
    if model is not None and data[-2:-1] == b"\1":  # not each time: it takes twenty times as long
        show(model)


def _gguf_planned(data: bytes) -> None:
    model = _gguf(data)
    if model is not None:
        show(model)
        _plan(model, ("llama.cpp", "ollama"), sum(data) if len(data) < 1 << 16 else 0)


def _gguf_set(data: bytes) -> None:
    folder = _folder("set")
    names = write_parts(data, folder)
    read_model(str(folder / names[0]) if names else str(folder))


def _gguf_seeds() -> Iterator[bytes]:
    yield small_llama()
    yield small_llama() + b"\1\1"
    words: dict[str, Value] = {
        "tokenizer.ggml.tokens": [f"word{n}" for n in range(40)],
        "tokenizer.ggml.scores": [0.5] * 40,
    }
    yield write_gguf(llama_metadata() | words | {"general.alignment": 64}, llama_tensors(), alignment=64)
    experts: dict[str, Value] = {"llama.expert_count": 4, "llama.expert_used_count": 2, "split.count": Typed(2, 1)}
    yield write_gguf(llama_metadata() | experts, llama_tensors(), data=False)


def _real_headers() -> Iterator[bytes]:
    """Of real architectures, without their weights and without their vocabularies."""
    yield from _gguf_seeds()
    for name in ("gpt-oss-20b-MXFP4", "gemma-3-27b-it-Q4_K_M", "GLM-4.5-Air-Q4_K_M", "Kimi-K2-Instruct-Q3_K_M"):
        yield headers.content(name)


def _set_seeds() -> Iterator[bytes]:
    folder = _folder("seeds") if "MGPU_FUZZ_SCRATCH" in os.environ else None
    if folder is None:
        import tempfile

        with tempfile.TemporaryDirectory() as name:
            yield joined({path.name: path.read_bytes() for path in write_shards(Path(name))})


_GGUF_WORDS: Final = tuple(
    word.encode()
    for word in (
        "GGUF", "general.architecture", "general.alignment", "general.name", "general.type", "general.file_type",
        "llama.block_count", "llama.context_length", "llama.embedding_length", "llama.attention.head_count",
        "llama.attention.head_count_kv", "llama.attention.key_length", "llama.attention.sliding_window",
        "llama.expert_count", "llama.expert_used_count", "llama.nextn_predict_layers", "llama.ssm.state_size",
        "llama.attention.kv_lora_rank", "llama.rope.dimension_count", "tokenizer.ggml.tokens", "split.count",
        "split.no", "split.tensors.count", "blk.0.attn_q.weight", "blk.1.ffn_gate_exps.weight", "output.weight",
        "token_embd.weight", "qwen3next", "gemma3", "deepseek2", "mamba", "gpt-oss", "adapter", "clip",
    )
)  # fmt: skip


# Hugging Face's format


def _safetensors(data: bytes) -> None:
    raw, _, size = data.rpartition(b"\n")
    parse_safetensors(
        raw or data, n_data=int(size) if size[:9].isdigit() and len(size) < 10 else 64, origin="m.safetensors"
    )


def _safetensors_seeds() -> Iterator[bytes]:
    few = [Spec("model.layers.0.w", "F16", (4, 4)), Spec("b", "I32", (8,))]
    yield json.dumps(entries(few)).encode() + b"\n64"
    yield json.dumps({"__metadata__": {"format": "pt"}} | entries(few)).encode() + b"\n64"
    tensors = small_tensors()
    yield json.dumps(entries(tensors)).encode() + f"\n{sum(each.n_bytes for each in tensors)}".encode()


def _directory(data: bytes) -> None:
    folder = _folder("model")
    write_parts(data, folder)
    show(read_directory(folder))


def _directory_planned(data: bytes) -> None:
    folder = _folder("planned")
    write_parts(data, folder)
    model = read_directory(folder)
    runtimes = {"exl2": ("exllamav2",), "exl3": ("exllamav3",)}.get(model.format, ("vllm", "aikit"))
    _plan(model, runtimes, sum(data[:4096]))


def _directory_seeds() -> Iterator[bytes]:
    generation = b'{"max_new_tokens": 2048, "temperature": 0.6, "eos_token_id": [1, 2]}'
    plain = header(small_tensors())
    config = json.dumps(small_config()).encode()
    yield joined({"config.json": config, "model.safetensors": plain, "generation_config.json": generation})
    quantized: dict[str, tuple[dict[str, Any], Any]] = {
        "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, gptq()),
        "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128}, awq()),
        "exl2": ({"quant_method": "exl2", "bits": 4.0, "head_bits": 6}, exl2(4.0)),
        "exl3": ({"quant_method": "exl3", "bits": 4, "head_bits": 6}, exl3(4)),
    }
    for told, store in quantized.values():
        tensors = header(small_tensors(store, "F16"))
        stated = json.dumps(small_config(quantization_config=told)).encode()
        yield joined({"config.json": stated, "model.safetensors": tensors})
    own = json.dumps({"bits": 4, "group_size": 128}).encode()
    tensors = header(small_tensors(gptq(), "F16"))
    yield joined({"config.json": config, "quantize_config.json": own, "model.safetensors": tensors})
    index = json.dumps({"weight_map": {each.name: "model.safetensors" for each in small_tensors()}}).encode()
    yield joined({"config.json": config, "model.safetensors.index.json": index, "model.safetensors": plain})
    for path in sorted(CONFIGS.glob("*.json")):
        yield joined({"config.json": path.read_bytes(), "model.safetensors": plain})


_CONFIG_WORDS: Final = tuple(
    f'"{word}"'.encode()
    for word in (
        "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "model_type",
        "intermediate_size", "num_experts", "num_experts_per_tok", "n_routed_experts", "moe_intermediate_size",
        "max_position_embeddings", "vocab_size", "quantization_config", "quant_method", "bits", "group_size", "exl2",
        "exl3", "gptq", "awq", "compressed-tensors", "config_groups", "text_config", "layer_types", "sliding_window",
        "linear_attention", "sliding_attention", "full_attention", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim",
        "rope_scaling", "architectures", "block_configs", "tie_word_embeddings", "num_kv_shared_layers", "torch_dtype",
        "__metadata__", "dtype", "shape", "data_offsets", "weight_map", "F16", "BF16", "I32", "q_weight", "trellis",
        "linear_num_value_heads", "linear_conv_kernel_dim", "ssm_cfg", "state_size", "mamba", "hybrid_override_pattern",
    )
)  # fmt: skip


# Ollama's store


def _store(data: bytes) -> None:
    root = scratch() / "store"
    for folder in ("manifests/registry.ollama.ai/library/m", "manifests/hf.co/a/b", "blobs"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    name, _, text = data.partition(b"\n")
    (root / "manifests/registry.ollama.ai/library/m/latest").write_bytes(text)
    (root / "blobs" / f"sha256-{'0' * 64}").touch()
    places = stores({"OLLAMA_MODELS": str(root)})
    for asked in ("m", os.fsdecode(name)):
        found = find_stored(asked, places)
        if found is not None:
            assert found.path.parent == root / "blobs", f"{found.path} is not in the store"
            check_line(found.name)
    close_names(os.fsdecode(name), places)


def _store_seeds() -> Iterator[bytes]:
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{'0' * 64}", "size": 1}
    yield b"m:latest\n" + json.dumps({"schemaVersion": 2, "layers": [layer]}).encode()
    away = {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../../../etc/passwd"}
    yield b"registry.ollama.ai/library/../../x:y\n" + json.dumps({"layers": [away]}).encode()


def _argument(data: bytes) -> None:
    """MODEL, as it is typed: a name from outside is nothing but a name."""
    os.chdir(_folder("empty"))
    text = os.fsdecode(data.replace(b"\0", b"") if data[:1] != b"\0" else data)
    if text.partition("://")[0].lower() in {"http", "https"}:
        return  # for the targets that speak HTTP
    read_model(text)


_STORED: Final = (b"../", b"registry.ollama.ai/", b"library/", b":latest", b"sha256:", b"sha256-", b"hf.co/",
                  b'"layers"',
                  b'"mediaType"', b'"digest"', b"application/vnd.ollama.image.tensor")  # fmt: skip
_REFUSED: Final[tuple[type[MgpuError], ...]] = (BadModelError,)
_UNPLANNED: Final = (BadModelError, UsageError, DoesNotFitError, RuntimeMissingError)

TARGETS: Final = (
    Target(name="gguf", check=_gguf_shown, refuses=_REFUSED, seeds=_gguf_seeds, tokens=_GGUF_WORDS),
    Target(
        name="gguf-plan",
        check=_gguf_planned,
        refuses=_UNPLANNED,
        seeds=_real_headers,
        tokens=_GGUF_WORDS,
        weight=0.02,
        most=1 << 22,
        batch=100,
        cpu_s=100,
        alone_s=10,
        memory=512 * MIB,
    ),
    Target(
        name="gguf-set",
        check=_gguf_set,
        refuses=_REFUSED,
        seeds=_set_seeds,
        tokens=_GGUF_WORDS,
        weight=0.05,
        batch=500,
        file_bytes=1 << 46,
    ),
    Target(name="safetensors", check=_safetensors, refuses=_REFUSED, seeds=_safetensors_seeds, tokens=_CONFIG_WORDS),
    Target(
        name="directory",
        check=_directory,
        refuses=_REFUSED,
        seeds=_directory_seeds,
        tokens=_CONFIG_WORDS,
        weight=0.1,
        batch=300,
        file_bytes=1 << 46,
    ),
    Target(
        name="directory-plan",
        check=_directory_planned,
        refuses=_UNPLANNED,
        seeds=_directory_seeds,
        tokens=_CONFIG_WORDS,
        weight=0.02,
        batch=100,
        cpu_s=100,
        alone_s=10,
        memory=512 * MIB,
        file_bytes=1 << 46,
    ),
    Target(name="ollama-store", check=_store, refuses=_REFUSED, seeds=_store_seeds, tokens=_STORED, weight=0.2),
    Target(
        name="argument",
        check=_argument,
        refuses=_REFUSED,
        seeds=lambda: (b"m.gguf", b"~/m", b"llama3:8b", b"a\nb"),
        weight=0.2,
    ),
)
