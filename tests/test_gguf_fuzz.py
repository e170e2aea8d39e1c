"""Ten thousand broken headers: each becomes a `Model` or a `BadModelError`, in bounded memory and time."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import headers
from gguf_writer import TensorSpec, Typed, Value, llama_metadata, llama_tensors, small_llama, write_gguf, write_sparse
from mgpu.errors import BadModelError
from mgpu.inspect.gguf import MAX_HEADER_BYTES, MAX_STRING_BYTES, NeedMore, parse_header
from mgpu.inspect.gguf_model import build_model
from mgpu.inspect.source import read_model
from mgpu.model import Model, ModelFile

WORDS: dict[str, Value] = {
    "tokenizer.ggml.tokens": [f"word{n}" for n in range(200)],
    "tokenizer.ggml.scores": [0.5] * 200,
    "llama.flags": [True, False] * 8,
    "general.alignment": 64,
}

#: Sound files: the bytes at hand, and the size of the whole file.
SEEDS: dict[str, tuple[bytes, int]] = {
    "llama 8B": (headers.content("Llama-3.1-8B-Instruct-Q4_K_M"), 4912916320),
    "gpt-oss": (headers.content("gpt-oss-20b-MXFP4"), 12096587328),
    "small": (small_llama(), len(small_llama())),
    "words": (content := write_gguf(llama_metadata() | WORDS, llama_tensors(), alignment=64), len(content)),
}
MUTANTS_EACH = 2400
NUMBERS = (0, 1, 2, 31, 32, 0xFF, 0xFFFF, 1 << 20, 1 << 28, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 60,
           (1 << 63) - 1, 1 << 63, (1 << 64) - 33, (1 << 64) - 1)  # fmt: skip


def flip(content: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def scribble(content: bytearray, rng: random.Random) -> bytearray:
    at = rng.randrange(len(content))
    content[at : at + rng.randrange(1, 16)] = rng.randbytes(rng.randrange(1, 16))
    return content


def lie(content: bytearray, rng: random.Random) -> bytearray:
    """Overwrite 4 or 8 bytes by a number that somebody may believe."""
    width, number = rng.choice((("<I", 4), ("<Q", 8))), rng.choice(NUMBERS)
    at = rng.randrange(len(content) - width[1])
    content[at : at + width[1]] = struct.pack(width[0], number & ((1 << 8 * width[1]) - 1))
    return content


def lie_about_a_length(content: bytearray, rng: random.Random) -> bytearray:
    """As `lie`, where a length or count stands: before text, or at the top."""
    places = [8, 16, *(at - 8 for word in (b"llama.", b"general.", b"blk.", b"token") for at in found(content, word))]
    at = rng.choice(places)
    content[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS))
    return content


def found(content: bytearray, word: bytes) -> Iterator[int]:
    at = content.find(word)
    while at >= 8:
        yield at
        at = content.find(word, at + 1)


def truncate(content: bytearray, rng: random.Random) -> bytearray:
    return content[: rng.randrange(len(content))]


def splice(content: bytearray, rng: random.Random) -> bytearray:
    """Repeat a piece of it somewhere else."""
    start, at = rng.randrange(len(content)), rng.randrange(len(content))
    content[at:at] = content[start : start + rng.randrange(1, 200)]
    return content


def drop(content: bytearray, rng: random.Random) -> bytearray:
    at = rng.randrange(len(content))
    del content[at : at + rng.randrange(1, 40)]
    return content


MUTATIONS: tuple[Callable[[bytearray, random.Random], bytearray], ...] = (
    flip, flip, scribble, lie, lie, lie_about_a_length, lie_about_a_length, truncate, splice, drop,
)  # fmt: skip


def mutants(content: bytes, n: int, seed: str) -> Iterator[bytes]:
    rng = random.Random(seed)
    for _ in range(n):
        yield bytes(rng.choice(MUTATIONS)(bytearray(content), rng))


def outcome(content: bytes, n_bytes_total: int) -> Model | BadModelError | NeedMore:
    """What becomes of a header. `NeedMore` is an answer only where there is more than what is at hand."""
    try:
        header = parse_header(content, n_bytes_total=n_bytes_total, origin="m.gguf")
        return build_model((header,), (ModelFile(path="/m.gguf", n_bytes=n_bytes_total),))
    except (BadModelError, NeedMore) as answer:
        check(answer, len(content), n_bytes_total)
        return answer


def check(answer: BadModelError | NeedMore, n_bytes: int, n_bytes_total: int) -> None:
    if isinstance(answer, NeedMore):
        assert n_bytes < answer.at_least <= min(n_bytes_total, MAX_HEADER_BYTES)
    else:
        assert (answer.message + answer.hint).isprintable()
        assert len(answer.message) < 1000


def peak_bytes(content: bytes, n_bytes_total: int) -> int:
    """Memory taken, at most, on the way to the outcome."""
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    outcome(content, n_bytes_total)
    return tracemalloc.get_traced_memory()[1] - before


@pytest.mark.parametrize("name", SEEDS)
def test_mutants(name: str) -> None:
    content, n_bytes = SEEDS[name]
    assert isinstance(outcome(content, n_bytes), Model)
    kinds: dict[type, int] = {}
    for mutant in mutants(content, MUTANTS_EACH, name):
        start = time.monotonic()
        size = len(mutant) if len(mutant) < len(content) else n_bytes + len(mutant) - len(content)
        kind = type(outcome(mutant, size))
        kinds[kind] = kinds.get(kind, 0) + 1
        assert time.monotonic() - start < 2
    assert kinds[BadModelError] > MUTANTS_EACH // 3  # the mutations do reach the checks
    assert kinds[Model] > 0


@pytest.mark.parametrize("name", SEEDS)
def test_mutants_take_no_more_memory_than_the_sound_file(name: str) -> None:
    content, n_bytes = SEEDS[name]
    tracemalloc.start()
    try:
        peak_bytes(content, n_bytes)  # once for what Python itself keeps
        sound = peak_bytes(content, n_bytes)
        assert sound < 20 * len(content)
        allowed = 2 * sound + 4 * MAX_STRING_BYTES  # a lie may turn that much of the file into one string
        for mutant in mutants(content, 150, name + " memory"):
            assert peak_bytes(mutant, n_bytes) < allowed
    finally:
        tracemalloc.stop()


def test_mutants_as_files(tmp_path: Path) -> None:
    """The same, through the file system, where nothing may ask for more."""
    content, n_bytes = SEEDS["llama 8B"]
    for mutant in mutants(content, 300, "files"):
        path = write_sparse(tmp_path / "m.gguf", mutant, n_bytes)
        try:
            read_model(str(path))
        except BadModelError as error:
            check(error, n_bytes, n_bytes)


Plain = st.one_of(st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(width=32), st.text(max_size=8))


def typed(value: bool | float | str) -> Value:
    """A value as some type that holds it."""
    if isinstance(value, int) and not isinstance(value, bool) and not -(1 << 31) <= value < 1 << 32:
        return Typed(11, value) if value < 1 << 63 else Typed(10, value)
    return value


Values: st.SearchStrategy[Value] = st.one_of(
    Plain.map(typed),
    st.builds(lambda values: Typed(5, values), st.lists(st.integers(-4, 600), max_size=5)),
    st.builds(lambda values: Typed(8, values), st.lists(st.text(max_size=4), max_size=5)),
)
Keys = st.sampled_from(
    [
        *llama_metadata(),
        *("llama.nextn_predict_layers", "llama.expert_count", "llama.expert_used_count", "llama.attention.key_length"),
        *("tokenizer.ggml.tokens", "tokenizer.ggml.tokens.length", "llama.feed_forward_length.length"),
        *("general.type", "general.alignment", "split.count"),
    ]
)
Names = st.one_of(
    st.sampled_from([spec.name for spec in llama_tensors()]),
    st.sampled_from(["blk.0.ffn_up_exps.weight", "blk.1.ffn_gate.", "blk.7.x", "blk..x", "blk.1", "enc.blk.9.x", "."]),
    st.text(max_size=70),
)
Tensors = st.builds(
    TensorSpec,
    Names,
    st.lists(st.one_of(st.integers(-1, 300), st.sampled_from(NUMBERS)), max_size=5).map(tuple),
    st.integers(-2, 45),
    st.one_of(st.none(), st.sampled_from(NUMBERS)),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.dictionaries(Keys, Values, max_size=4), tensors=st.lists(Tensors, max_size=4))
def test_structure(changes: dict[str, Value], tensors: list[TensorSpec]) -> None:
    content = write_gguf(llama_metadata() | changes, [*llama_tensors(), *tensors], data=False)
    assert not isinstance(outcome(content, len(content) + (1 << 20)), NeedMore)
