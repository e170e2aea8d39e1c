"""GGUF headers: what is read from good ones, and the one line each bad one gets."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import headers
from gguf_writer import (
    TYPE_IDS,
    Metadata,
    Raw,
    TensorSpec,
    Typed,
    Value,
    llama_metadata,
    llama_tensors,
    pad,
    small_llama,
    string,
    write_gguf,
    write_sparse,
)
from mgpu.errors import BadModelError
from mgpu.inspect.gguf import MAX_ARRAY, MAX_STRING_BYTES, TYPES, Header, NeedMore, parse_header
from mgpu.inspect.gguf_model import build_model
from mgpu.inspect.source import read_model
from mgpu.model import Model, ModelFile, TensorClass


def parse(content: bytes, n_bytes_total: int | None = None) -> Header:
    return parse_header(
        content, n_bytes_total=len(content) if n_bytes_total is None else n_bytes_total, origin="m.gguf"
    )


def build(metadata: Metadata, tensors: list[TensorSpec] | None = None) -> Model:
    content = write_gguf(metadata, llama_tensors() if tensors is None else tensors)
    return build_model((parse(content),), (ModelFile(path="/models/m.gguf", n_bytes=len(content)),))


def one(key: str, value: Value) -> bytes:
    return write_gguf({key: value})


def tensor(name: str | bytes = "t", shape: tuple[int, ...] = (32,), type_name: str | int = "F32") -> bytes:
    return write_gguf({}, [TensorSpec(name, shape, type_name)])


def replaced(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def counts(n_tensors: int, n_keys: int) -> bytes:
    return replaced(write_gguf({"a": 1}), 8, struct.pack("<qq", n_tensors, n_keys))


U64_MAX = (1 << 64) - 1
LIE = Raw(8, struct.pack("<Q", U64_MAX))  # a string of 2^64 - 1 bytes

BAD_HEADERS = {
    "empty": (b"", "m.gguf is empty (0 bytes)"),
    "html": (b"\n<!DOCTYPE html><html>", "not a GGUF file: an HTML or XML page"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "safetensors": (struct.pack("<Q", 90) + b'{"__metadata__"', "a safetensors file"),
    "zip": (b"PK\x03\x04data.pkl", "a zip archive"),
    "ggml": (b"lmgg\0\0\0\0", "the format before GGUF"),
    "zeros": (bytes(4096), "zeros"),
    "error text": (b"Entry not found", "the text of a failed download"),
    "bad magic": (b"GGUX" + bytes(40), "it starts with 'GGUX'"),
    "magic only": (b"GGUF", "the version would end at byte 8, the file ends at 4"),
    "version 0": (write_gguf({}, version=0), "version 0 is not supported"),
    "version 1": (write_gguf({}, version=1), "version 1 is not supported"),
    "version 4": (write_gguf({}, version=4), "version 4 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">Iqq", 3, 0, 0), "big-endian"),
    "no counts": (write_gguf({})[:20], "the counts would end at byte 24, the file ends at 20"),
    "huge number of keys": (counts(0, 1 << 60), "claims 1152921504606846976 keys"),
    "huge number of tensors": (counts(1 << 60, 1), "claims 1152921504606846976 tensors"),
    "negative number of keys": (counts(0, -1), "claims -1 keys"),
    "negative number of tensors": (counts(-1, 1), "claims -1 tensors"),
    "more keys than bytes": (counts(0, 5), "claims 5 keys"),
    "key past the end": (write_gguf([(b"", 1)])[:24] + struct.pack("<Q", 1 << 63) + bytes(64), "key 0 would end at"),
    "key too long": (write_gguf([("k" * (MAX_STRING_BYTES + 1), 1)]), "key 0 is longer than 65536 bytes"),
    "empty key": (write_gguf([("", 1)]), "key 0 is empty"),
    "duplicate key": (write_gguf([("a.b", 1), ("a.b", 2)]), "the key a.b occurs twice"),
    "key not utf-8": (write_gguf([(b"a\xff", 1)]), r"key 0 is not UTF-8: 'a\xff'"),
    "unknown value type": (one("a.b", Raw(13, bytes(16))), "the key a.b has the unknown value type 13"),
    "negative value type": (one("a.b", Raw(-1, bytes(16))), "the key a.b has the unknown value type -1"),
    "string past the end": (one("a.b", LIE), "a.b would end at byte 18446744073709551"),
    "scalar past the end": (one("a.b", 7)[:42], "a.b would end at byte 43"),
    "bool": (one("a.b", Raw(7, b"\x02" + bytes(15))), "the key a.b is a bool of value 2"),
    "bool in array": (one("a.b", Raw(9, struct.pack("<iQ", 7, 2) + b"\1\3")), "the key a.b is a bool of value 3"),
    "nested array": (one("a.b", Raw(9, struct.pack("<iQ", 9, 1) + bytes(32))), "array of arrays"),
    "array of unknown": (one("a.b", Raw(9, struct.pack("<iQ", 77, 1) + bytes(32))), "unknown value type 77"),
    "huge array": (one("a.b", Raw(9, struct.pack("<iQ", 4, 1 << 62))), "a.b would end at byte 18446744073709551"),
    "huge string array": (one("a.b", Raw(9, struct.pack("<iQ", 8, U64_MAX))), "a.b would end at byte"),
    "lying string in array": (
        one("a.b", Raw(9, struct.pack("<iQQ", 8, 2, U64_MAX) + bytes(64))),
        "a.b would end at byte 18446744073709551",
    ),
    "last string in array too long": (
        one("a.b", Raw(9, struct.pack("<iQQQ", 8, 2, 0, 900))),
        "a.b would end at byte 967, the file ends at 96",
    ),
    "alignment u64": (one("general.alignment", Typed(10, 32)), "general.alignment has value type 10"),
    "alignment string": (one("general.alignment", "32"), "general.alignment has value type 8"),
    "alignment 0": (one("general.alignment", 0), "general.alignment is 0, not a power of two"),
    "alignment 48": (one("general.alignment", 48), "general.alignment is 48, not a power of two"),
    "tensor name too long": (tensor("n" * 64), "the name of tensor 0 is longer than 63 bytes"),
    "tensor name not utf-8": (tensor(b"\xc3\x28"), "the name of tensor 0 is not UTF-8"),
    "duplicate tensor": (write_gguf({}, [TensorSpec("t", (32,))] * 2), "the tensor t occurs twice"),
    "five dimensions": (tensor(shape=(32, 1, 1, 1, 1)), "the tensor t has 5 dimensions"),
    "huge number of dimensions": (
        replaced(tensor(), 24 + 9, struct.pack("<I", 1 << 31)),
        "the tensor t has 2147483648 dimensions",
    ),
    "negative dimension": (tensor(shape=(32, -2), type_name=0), "impossible dimensions: [32, -2]"),
    "two negative dimensions": (tensor(shape=(-32, -2), type_name=0), "impossible dimensions: [-32, -2]"),
    "overflowing dimensions": (tensor(shape=(1 << 40, 1 << 40), type_name=0), "impossible dimensions"),
    "overflow before a zero": (tensor(shape=(1 << 40, 1 << 40, 0), type_name=0), "impossible dimensions"),
    "unknown type": (tensor(type_name=43), "the tensor t has the unknown type 43"),
    "negative type": (tensor(type_name=-1), "the tensor t has the unknown type -1"),
    "removed type": (tensor(type_name=31), "the tensor t has type Q4_0_4_4, which llama.cpp no longer reads"),
    "rows not whole blocks": (
        tensor(shape=(250, 2), type_name="Q4_K"),
        "(Q4_K) has rows of 250, not a multiple of 256",
    ),
    "no dimensions for blocks": (tensor(shape=(), type_name="Q8_0"), "(Q8_0) has rows of 1, not a multiple of 32"),
    "first offset": (write_gguf({}, [TensorSpec("t", (32,), offset=32)]), "offset 32, it must be 0"),
    "offset not padded": (
        write_gguf({}, [TensorSpec("s", (3,)), TensorSpec("t", (32,), offset=12)]),
        "the tensor t has offset 12, it must be 32",
    ),
    "offset overlaps": (
        write_gguf({}, [TensorSpec("s", (32,)), TensorSpec("t", (32,), offset=0)]),
        "the tensor t has offset 0, it must be 128",
    ),
    "tensor info cut": (small_llama()[:700], "the header is cut short"),
    "no data": (write_gguf({}, [TensorSpec("t", (100,))], data=False), "416 of 480 bytes are missing"),
    "one byte short": (tensor(shape=(96,))[:-1], "1 of 448 bytes are missing"),
    "only padding of the header missing": (tensor(shape=(0,))[:-1], "1 of 64 bytes are missing"),
}


@pytest.mark.parametrize(("content", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_bad_header_is_one_line(content: bytes, message: str) -> None:
    with pytest.raises(BadModelError) as caught:
        parse(content)
    assert message in caught.value.message
    assert caught.value.message.startswith("m.gguf")
    assert caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


def test_names_from_the_file_cannot_break_the_line() -> None:
    content = write_gguf([("a\n\x1b[31mb" + "c" * 500, Typed(7, 1)), ("x", Raw(99, b""))])
    with pytest.raises(BadModelError) as caught:
        parse(replaced(content, content.index(b"\x07\0\0\0\x01"), b"\x63"))
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_is_kept_by_kind(version: int) -> None:
    metadata: dict[str, Value] = {
        "u8": Typed(0, 255), "i8": Typed(1, -1), "u16": Typed(2, 65535), "i16": Typed(3, -2), "u32": (1 << 32) - 1,
        "i32": -5, "f32": 0.5, "yes": True, "no": False, "u64": Typed(10, U64_MAX), "i64": Typed(11, -(1 << 63)),
        "f64": Typed(12, 1e300), "text": "héllo", "empty": "", "list": [1, 2, 3], "flags": [True, False],
        "floats": [0.5, 1.5], "none": [],
    }  # fmt: skip
    header = parse(write_gguf(metadata, version=version))
    expected = {key: tuple(value) if isinstance(value, list) else value for key, value in metadata.items()}
    assert header.metadata == {k: v.value if isinstance(v, Typed) else v for k, v in expected.items()}
    assert header.version == version
    assert header.metadata["yes"] is True


def test_long_values_leave_their_length() -> None:
    header = parse(
        write_gguf(
            {
                "words": ["a", "bb", ""],
                "few": [1] * MAX_ARRAY,
                "many": [1] * (MAX_ARRAY + 1),
                "short": "s" * MAX_STRING_BYTES,
                "long": "s" * (MAX_STRING_BYTES + 1),
                "after": 7,
            }
        )
    )
    assert header.metadata == {
        "words.length": 3,
        "few": (1,) * MAX_ARRAY,
        "many.length": MAX_ARRAY + 1,
        "short": "s" * MAX_STRING_BYTES,
        "long.length": MAX_STRING_BYTES + 1,
        "after": 7,
    }


def test_arrays_are_kept_up_to_a_total() -> None:
    header = parse(write_gguf({f"a{i}": Typed(1, [-100] * MAX_ARRAY) for i in range(20)}))
    assert [key for key in header.metadata if not key.endswith(".length")] == [f"a{i}" for i in range(8)]


def test_text_that_is_not_utf8_is_read_with_marks() -> None:
    assert parse(one("a.b", Typed(8, b"x\xffy"))).metadata == {"a.b": "x\ufffdy"}


def test_tensors_shapes_sizes_offsets() -> None:
    specs = [
        TensorSpec("a", (256, 3), "Q4_K"),
        TensorSpec("b", (3,), "F32"),
        TensorSpec("c", (), "F16"),
        TensorSpec("d", (0, 5), "F32"),
        TensorSpec("", (2, 2, 2, 2), "BF16"),
    ]
    header = parse(write_gguf({"general.alignment": 64}, specs, alignment=64))
    assert [(t.name, t.shape, t.type) for t in header.tensors] == [(s.name, s.shape, s.type) for s in specs]
    assert [t.n_bytes for t in header.tensors] == [432, 12, 2, 0, 32]
    assert [t.offset for t in header.tensors] == [0, 448, 512, 576, 576]
    assert (header.alignment, header.data_offset) == (64, pad(header.header_bytes, 64))


def test_more_bytes_or_the_last_padding_less_are_fine() -> None:
    content = tensor(shape=(3,))
    assert len(parse(content + b"more").tensors) == 1
    assert len(parse(content[:-20]).tensors) == 1
    with pytest.raises(BadModelError, match="21 of 96 bytes are missing"):
        parse(content[:-21])


def test_every_cut_of_a_file_is_refused() -> None:
    content = small_llama()
    header_bytes = parse(content).header_bytes
    for n_bytes in [*range(header_bytes + 40), len(content) - 1]:
        with pytest.raises(BadModelError):
            parse(content[:n_bytes])


def test_a_part_of_the_header_asks_for_more_until_it_is_whole() -> None:
    content = write_gguf(llama_metadata() | {"words": ["w" * n for n in range(60)]}, llama_tensors())
    whole = parse(content)
    for n_bytes in range(4, whole.header_bytes):
        with pytest.raises(NeedMore) as more:
            parse(content[:n_bytes], len(content))
        assert n_bytes < more.value.at_least <= whole.header_bytes
    assert parse(content[: whole.header_bytes], len(content)) == whole


def test_header_larger_than_any_is_refused() -> None:
    content = one("a.b", Raw(9, struct.pack("<iQ", 4, 1 << 28)))
    with pytest.raises(BadModelError, match="the header is longer than 256 MiB"):
        parse(content, 1 << 40)


Scalars = st.one_of(
    st.booleans(),
    st.integers(-(1 << 31), U64_MAX),
    st.floats(width=32, allow_nan=False),
    st.text(st.characters(codec="utf-8"), max_size=20),
)


@given(
    metadata=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda k: k != "general.alignment"),
        Scalars,
        max_size=8,
    ),
    tensors=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=15),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(sorted(TYPE_IDS))),
        max_size=6,
    ),
)
def test_what_is_written_is_read(metadata: dict[str, Value], tensors: dict[str, tuple[list[int], str]]) -> None:
    specs = [TensorSpec(name, (TYPES[TYPE_IDS[kind]][1], *shape), kind) for name, (shape, kind) in tensors.items()]
    header = parse(write_gguf(metadata, specs))
    assert header.metadata == metadata
    assert [(t.name, t.shape, t.type, t.n_bytes) for t in header.tensors] == [
        (spec.name, spec.shape, spec.type, spec.n_bytes) for spec in specs
    ]


def test_hyperparameters_by_key() -> None:
    model = build(
        llama_metadata(
            attention__head_count=[4, 8],
            attention__head_count_kv=[2, 0],
            attention__key_length=24,
            nextn_predict_layers=1,
            feed_forward_length=[256, 0],
        )
    )
    hyper = model.hyper
    assert (hyper.n_layer, hyper.n_layer_nextn, hyper.n_ctx_train, hyper.n_embd) == (2, 1, 4096, 64)
    assert (hyper.n_head, hyper.n_head_kv, hyper.n_ff) == ((4, 8), (2, 0), (256, 0))
    assert (hyper.head_dim_k, hyper.head_dim_v) == (24, 16)
    assert (model.architecture, model.name, model.quantization, model.format) == ("llama", "Tiny Llama", "F16", "gguf")


def test_defaults_are_llama_cpps() -> None:
    metadata = llama_metadata()
    del metadata["llama.attention.head_count_kv"], metadata["llama.feed_forward_length"], metadata["llama.vocab_size"]
    del metadata["general.name"], metadata["general.file_type"]
    model = build(metadata)
    assert model.hyper.n_head_kv == (4, 4)
    assert model.hyper.n_ff == (0, 0)
    assert model.hyper.n_vocab == 128  # the rows of token_embd
    assert (model.name, model.quantization) == ("m", "F16")


def test_token_list_gives_the_vocabulary() -> None:
    assert build(llama_metadata() | {"tokenizer.ggml.tokens": ["a", "b", "c"]}).hyper.n_vocab == 3


def test_unknown_architecture_works_by_its_own_keys() -> None:
    metadata = {key.replace("llama.", "zyx-9."): value for key, value in llama_metadata().items()}
    model = build(metadata | {"general.architecture": "zyx-9"})
    assert (model.architecture, model.hyper.n_layer, model.hyper.n_head_kv) == ("zyx-9", 2, (2, 2))


def test_guessed_and_unknown_file_types() -> None:
    assert build(llama_metadata() | {"general.file_type": 1024 + 15}).quantization == "Q4_K_M"
    assert build(llama_metadata() | {"general.file_type": 999}, llama_tensors(type_name="Q8_0")).quantization == "Q8_0"


def test_name_is_made_printable() -> None:
    assert build(llama_metadata() | {"general.name": "a\x1b[31m\nb"}).name == "a [31m b"
    assert build(llama_metadata() | {"general.name": " "}).name == "m"


def test_expert_width_comes_from_the_experts_where_no_key_says_it() -> None:
    experts = [TensorSpec(f"blk.{il}.ffn_up_exps.weight", (64, 96, 8), "F16") for il in range(2)]
    hyper = build(llama_metadata(expert_count=8, expert_used_count=[2, 3]), [*llama_tensors(), *experts]).hyper
    assert (hyper.n_expert, hyper.n_expert_used, hyper.n_ff_expert) == (8, 3, 96)


def test_expert_width_by_key() -> None:
    keys = llama_metadata(expert_count=8, expert_used_count=2, expert_feed_forward_length=[0, 48])
    assert build(keys).hyper.n_ff_expert == 48


@pytest.mark.parametrize("architecture", ["hunyuan-dense", "hunyuan_vl"])
def test_one_expert_is_none_where_llama_cpp_says_so(architecture: str) -> None:
    metadata = llama_metadata(expert_count=1, expert_used_count=1)
    hunyuan = {key.replace("llama.", f"{architecture}."): value for key, value in metadata.items()}
    assert not build(hunyuan | {"general.architecture": architecture}).is_moe
    assert build(metadata).is_moe


def test_decoder_blocks_beyond_the_encoder_s_have_no_layer() -> None:
    model = build(
        llama_metadata(), [TensorSpec("enc.blk.1.attn_q.weight", (4,)), TensorSpec("dec.blk.2.x.weight", (4,))]
    )
    assert [tensor.layer for tensor in model.tensors] == [1, None]


KINDS: dict[str, TensorClass] = {
    "token_embd.weight": "token_embedding",
    "token_embd_norm.weight": "token_embedding",
    "per_layer_token_embd.weight": "token_embedding",
    "position_embd.weight": "token_embedding",
    "token_types.weight": "token_embedding",
    "output.weight": "output",
    "output_norm.weight": "output",
    "dec.output_norm.weight": "output",
    "rope_freqs.weight": "other",
    "blk.0.attn_q.weight": "attention",
    "blk.1.attn_norm.weight": "attention",
    "blk.1.ssm_conv1d.weight": "attention",
    "blk.1.shortconv.conv.weight": "attention",
    "blk.1.time_mix_key.weight": "attention",
    "dec.blk.1.cross_attn_q.weight": "attention",
    "blk.0.ffn_up.weight": "ffn",
    "blk.0.ffn_norm.weight": "ffn",
    "blk.0.ffn_up_exps.weight": "expert",
    "blk.0.ffn_down_exps.bias": "expert",
    "blk.0.ffn_gate_up_exps.weight": "expert",
    "blk.0.ffn_gate_chexps.weight": "expert",
    "blk.0.ffn_gate.7.weight": "expert",
    "blk.0.ffn_up_shexp.weight": "shared_expert",
    "blk.0.ffn_gate_inp.weight": "router",
    "blk.0.ffn_gate_inp_shexp.weight": "router",
    "blk.0.exp_probs_b.bias": "router",
    "blk.1.nextn.shared_head_head.weight": "other",
    "blk.1.layer_output_scale.weight": "other",
    "ffn_up": "ffn",
}


def test_tensor_classes_and_blocks() -> None:
    model = build(llama_metadata(), [TensorSpec(name, (32,)) for name in KINDS])
    assert {t.name: t.kind for t in model.tensors} == KINDS
    blocks = {t.name: t.layer for t in model.tensors}
    assert (blocks["blk.1.attn_norm.weight"], blocks["dec.blk.1.cross_attn_q.weight"]) == (1, 1)
    assert blocks["output.weight"] is None


def without(key: str) -> dict[str, Value]:
    return {k: v for k, v in llama_metadata().items() if k != key}


BAD_MODELS: dict[str, tuple[Metadata, list[TensorSpec] | None, str]] = {
    "no architecture": (without("general.architecture"), None, "no general.architecture"),
    "architecture number": (llama_metadata() | {"general.architecture": 7}, None, "general.architecture is 7"),
    "architecture text": (llama_metadata() | {"general.architecture": "a\n"}, None, r"general.architecture is 'a\n'"),
    "architecture empty": (llama_metadata() | {"general.architecture": ""}, None, "general.architecture is ''"),
    "no block count": (without("llama.block_count"), None, "no llama.block_count"),
    "no context length": (without("llama.context_length"), None, "no llama.context_length"),
    "no embedding length": (without("llama.embedding_length"), None, "no llama.embedding_length"),
    "block count 0": (llama_metadata(block_count=0), None, "llama.block_count is 0, it must be 1 to 512"),
    "block count 513": (llama_metadata(block_count=513), None, "llama.block_count is 513"),
    "block count huge": (llama_metadata(block_count=1 << 31), None, "llama.block_count is 2147483648"),
    "block count negative": (llama_metadata(block_count=-1), None, "llama.block_count is -1"),
    "block count float": (llama_metadata(block_count=2.0), None, "llama.block_count is 2.0, it must be a whole number"),
    "block count bool": (llama_metadata(block_count=True), None, "llama.block_count is True"),
    "block count text": (llama_metadata(block_count="2"), None, "llama.block_count is '2'"),
    "block count list": (llama_metadata(block_count=[2]), None, "llama.block_count is (2,)"),
    "nextn beyond": (llama_metadata(nextn_predict_layers=3), None, "nextn_predict_layers is 3, it must be 0 to 2"),
    "head count 0": (llama_metadata(attention__head_count=0), None, "head_count is 0 or missing for block 0"),
    "head count absent": (without("llama.attention.head_count"), None, "head_count is 0 or missing for block 0"),
    "head count 0 once": (llama_metadata(attention__head_count=[4, 0]), None, "block 1, which has blk.1.attn_q"),
    "kv heads too few": (llama_metadata(attention__head_count_kv=[2]), None, "head_count_kv has 1 values for 2 layers"),
    "ff too many": (llama_metadata(feed_forward_length=[8] * 9000), None, "feed_forward_length has 9000 values"),
    "kv heads text": (llama_metadata(attention__head_count_kv=["2", "2"]), None, "head_count_kv is None, it must be"),
    "kv heads negative": (llama_metadata(attention__head_count_kv=Typed(5, [2, -2])), None, "head_count_kv is -2"),
    "key length huge": (llama_metadata(attention__key_length=1 << 40), None, "key_length is 1099511627776"),
    "too many experts": (llama_metadata(expert_count=1025), None, "llama.expert_count is 1025"),
    "more used than there": (
        llama_metadata(expert_count=4, expert_used_count=5), None, "expert_used_count is 5, more than expert_count, 4",
    ),
    "none used": (llama_metadata(expert_count=4), None, "expert_used_count is 0 or missing"),
    "used without experts": (llama_metadata(expert_used_count=2), None, "more than expert_count, 0"),
    "block beyond": (llama_metadata(1), None, "the tensor blk.1.attn_norm.weight is beyond the last block, 0"),
    "block far beyond": (
        llama_metadata(), [TensorSpec("blk." + "9" * 40 + ".x", (1,))], "is beyond the last block",
    ),
    "no tensors": (llama_metadata(), [], "holds no tensors"),
    "projector": (llama_metadata() | {"general.architecture": "clip"}, None, "a vision projector (mmproj)"),
    "projector by type": (llama_metadata() | {"general.type": "mmproj"}, None, "a vision projector (mmproj)"),
    "adapter": (llama_metadata() | {"general.type": "adapter"}, None, "a LoRA adapter"),
    "imatrix": (llama_metadata() | {"general.type": "imatrix"}, None, "an importance matrix"),
}  # fmt: skip


@pytest.mark.parametrize(("metadata", "tensors", "message"), BAD_MODELS.values(), ids=BAD_MODELS.keys())
def test_bad_model_is_one_line(metadata: Metadata, tensors: list[TensorSpec] | None, message: str) -> None:
    with pytest.raises(BadModelError) as caught:
        build(metadata, tensors)
    assert message in caught.value.message
    assert caught.value.message.startswith("/models/m.gguf: ")
    assert caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


class Golden(NamedTuple):
    """What a real file of the model has: sizes from llama.cpp's own tools, numbers from the published config.json."""

    file: str
    architecture: str
    quantization: str
    n_layer: int
    n_embd: int
    n_vocab: int
    file_bytes: int
    header_bytes: int
    n_tensors: int
    tensor_bytes: int
    parameters: int
    heads: tuple[int, int, int]  # n_head, n_head_kv, head_dim
    experts: tuple[int, int, int]  # n_expert, n_expert_used, n_ff_expert
    nextn: int = 0


GOLDEN = [
    Golden("Llama-3.1-8B-Instruct-Q4_K_M", "llama", "Q4_K_M", 32, 4096, 128256, 4912916320, 18016, 292, 4912898304,
           8030261312, (32, 8, 128), (0, 0, 0)),
    Golden("Llama-3.3-70B-Instruct-Q4_K_M", "llama", "Q4_K_M", 80, 8192, 128256, 42512575552, 43840, 724, 42512531712,
           70553706560, (64, 8, 128), (0, 0, 0)),
    Golden("Mixtral-8x7B-Instruct-v0.1-Q4_K_M", "llama", "Q4_K_M", 32, 4096, 32000, 28447748992, 21376, 323,
           28447727616, 46702792704, (32, 8, 128), (8, 2, 14336)),
    Golden("Qwen2.5-32B-Instruct-Q4_K_M", "qwen2", "Q4_K_M", 64, 5120, 152064, 19845402304, 44736, 771, 19845357568,
           32763876352, (40, 8, 128), (0, 0, 0)),
    Golden("Qwen3-30B-A3B-Q4_K_M", "qwen3moe", "Q4_K_M", 48, 2048, 151936, 18550753696, 37280, 579, 18550716416,
           30532122624, (32, 4, 128), (128, 8, 768)),
    Golden("gemma-3-27b-it-Q4_K_M", "gemma3", "Q4_K_M", 62, 5376, 262144, 16539892448, 48864, 808, 16539843584,
           27009002240, (32, 16, 128), (0, 0, 0)),
    Golden("gpt-oss-20b-MXFP4", "gpt-oss", "MXFP4_MOE", 24, 2880, 201088, 12096587328, 28992, 459, 12096558336,
           20914757184, (64, 8, 64), (32, 4, 2880)),
    Golden("GLM-4.5-Air-Q4_K_M", "glm4moe", "Q4_K_M", 47, 4096, 151552, 72848212864, 51072, 803, 72848161792,
           110468824832, (96, 8, 128), (128, 8, 1408), 1),
]  # fmt: skip


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.file)
def test_real_headers(golden: Golden, tmp_path: Path) -> None:
    content = headers.content(golden.file)
    header = parse(content, golden.file_bytes)
    assert (header.data_offset, len(header.tensors)) == (golden.header_bytes, golden.n_tensors)
    model = read_model(str(write_sparse(tmp_path / "model.gguf", content, golden.file_bytes)))
    hyper = model.hyper
    assert (model.architecture, model.quantization, model.name) == (
        golden.architecture, golden.quantization, golden.file,
    )  # fmt: skip
    assert (model.weights_bytes, model.file_bytes, model.parameters) == (
        golden.tensor_bytes, golden.file_bytes, golden.parameters,
    )  # fmt: skip
    assert (hyper.n_layer, hyper.n_embd, hyper.n_vocab) == (golden.n_layer, golden.n_embd, golden.n_vocab)
    n_head, n_head_kv, head_dim = golden.heads
    assert hyper.n_head == (n_head,) * golden.n_layer
    assert hyper.n_head_kv == (n_head_kv,) * golden.n_layer
    assert (hyper.head_dim_k, hyper.head_dim_v, hyper.n_layer_nextn) == (head_dim, head_dim, golden.nextn)
    assert (hyper.n_expert, hyper.n_expert_used, hyper.n_ff_expert) == golden.experts
    assert {t.layer for t in model.tensors if t.layer is not None} == set(range(golden.n_layer))
    assert sum(model.bytes_by_class().values()) == golden.tensor_bytes
    assert ("expert" in model.bytes_by_class()) == model.is_moe == (golden.experts[0] > 0)


def test_a_real_header_cut_short_says_by_how_much(tmp_path: Path) -> None:
    golden = GOLDEN[0]
    content = headers.content(golden.file)
    path = write_sparse(tmp_path / "model.gguf", content, golden.file_bytes - 1234567)
    with pytest.raises(BadModelError, match="incomplete: 1234567 of 4912916320 bytes are missing") as caught:
        read_model(str(path))
    assert "resume" in caught.value.hint


@pytest.mark.runtime
def test_real_file_with_its_tokenizer(real_gguf: Path) -> None:
    model = read_model(str(real_gguf))
    if model.name != "Gemma 3 270m":
        pytest.skip(f"the real model is {model.name}, this test knows Gemma 3 270m")
    hyper = model.hyper
    assert (model.architecture, model.quantization, model.parameters) == ("gemma3", "Q4_K_M", 268098176)
    assert (hyper.n_layer, hyper.n_embd, hyper.n_vocab, hyper.n_ctx_train) == (18, 640, 262144, 32768)
    assert (hyper.n_head[0], hyper.n_head_kv[0], hyper.head_dim_k, hyper.n_ff[0]) == (4, 1, 256, 2048)
    assert (len(model.tensors), model.weights_bytes, model.file_bytes) == (236, 246587904, real_gguf.stat().st_size)
    assert model.metadata["tokenizer.ggml.tokens.length"] == 262144
    assert "tokenizer.ggml.tokens" not in model.metadata


def test_string_is_what_the_format_says() -> None:
    assert string("añ") == b"\x03\0\0\0\0\0\0\0a\xc3\xb1"
