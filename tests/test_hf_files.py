"""Which files of a directory are the model, and every one that is missing, stale or in the way."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from mgpu.inspect.source import read_model
from safetensors_writer import (
    SMALL_PARAMETERS,
    exl2,
    plain,
    refusal,
    small_config,
    small_tensors,
    write_file,
    write_index,
    write_model,
)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A sound model in three shards."""
    return write_model(tmp_path / "small", small_config(), small_tensors(), n_shards=3)


def test_shards_and_index(small: Path) -> None:
    model = read_model(str(small))
    assert [Path(file.path).name for file in model.files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert (model.parameters, model.weights_bytes) == (SMALL_PARAMETERS, 2 * SMALL_PARAMETERS)
    assert model.path == str(small)
    hyper = model.hyper
    assert (hyper.n_layer, hyper.n_head, hyper.n_head_kv, hyper.n_ff) == (2, (4, 4), (2, 2), (256, 256))
    assert (hyper.head_dim_k, hyper.head_dim_v, hyper.n_ctx_train, hyper.n_vocab) == (32, 32, 4096, 512)


def test_shards_without_an_index(small: Path) -> None:
    (small / "model.safetensors.index.json").unlink()
    assert read_model(str(small)).parameters == SMALL_PARAMETERS
    (small / "model-00002-of-00003.safetensors").unlink()
    assert "1 of 3 shards are missing" in refusal(small).message


def test_links_into_the_hub_s_cache(small: Path) -> None:
    """`models--ORG--NAME/snapshots/COMMIT`, each file a link: named as its repository, found from the cache's top."""
    repository = small.parent / "models--meta-llama--Llama-3.1-8B"
    snapshot = repository / "snapshots" / "0e9e39f249a16976918f6564b8830bc894c89659"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(small.iterdir()):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert read_model(str(snapshot)).name == "Llama-3.1-8B"
    assert f"give the path of a snapshot: {snapshot}" in refusal(repository).hint


def test_missing_shards_are_named(small: Path) -> None:
    (small / "model-00001-of-00003.safetensors").unlink()
    (small / "model-00003-of-00003.safetensors").unlink()
    error = refusal(small)
    assert error.message == (
        f"2 of 3 shards are missing in {small}: model-00001-of-00003.safetensors, model-00003-of-00003.safetensors"
    )


def test_all_shards_missing(small: Path) -> None:
    for path in small.glob("*.safetensors"):
        path.unlink()
    assert "3 of 3 shards are missing" in refusal(small).message


def test_shard_cut_short_is_named(small: Path) -> None:
    path = small / "model-00002-of-00003.safetensors"
    os.truncate(path, path.stat().st_size - 7)
    assert refusal(small).message.startswith(f"{path}: the file is incomplete: 7 of")


def test_index_of_another_version_by_its_files(small: Path) -> None:
    """A requantised model in one file, with the index of the original still beside it."""
    for path in small.glob("*.safetensors"):
        path.unlink()
    write_file(small / "model.safetensors", small_tensors())
    error = refusal(small)
    assert "none of the files that model.safetensors.index.json names is there" in error.message
    assert "remove model.safetensors.index.json" in error.hint


def test_index_of_another_version_by_its_tensors(small: Path) -> None:
    path = small / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.0.self_attn.q_norm.weight"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    error = refusal(small)
    assert "names 1 tensors that are in none of its files: model.layers.0.self_attn.q_norm.weight" in error.message


@pytest.mark.parametrize("says", ["exl2", None])
def test_exl2_has_the_index_of_the_original_model(tmp_path: Path, says: str | None) -> None:
    quantization = {"quant_method": says, "bits": 4.25} if says else None
    path = write_model(
        tmp_path / "m", small_config(quantization_config=quantization), small_tensors(exl2(4.25)), stem="output"
    )
    write_index(path, {spec.name: "model-00001-of-00004.safetensors" for spec in small_tensors()})
    model = read_model(str(path))
    assert (model.format, [Path(file.path).name for file in model.files]) == ("exl2", ["output.safetensors"])


@pytest.mark.parametrize("indexed", [True, False])
def test_files_beside_the_model(small: Path, indexed: bool) -> None:
    """Mistral's own copy, an adapter, a projector, Meta's directory: not even read."""
    if not indexed:
        (small / "model.safetensors.index.json").unlink()
    for name in (
        "consolidated.safetensors",
        "adapter_model.safetensors",
        "mmproj.safetensors",
        "optimizer.safetensors",
    ):
        (small / name).write_bytes(b"nothing that could be read")
    (small / "original").mkdir()
    (small / "original" / "consolidated.00.pth").touch()
    (small / "pytorch_model.bin").touch()
    assert len(read_model(str(small)).files) == 3


def test_a_file_the_index_does_not_name_does_not_count(small: Path) -> None:
    write_file(small / "model.fp32.safetensors", small_tensors(plain("F32"), "F32"))
    assert read_model(str(small)).weights_bytes == 2 * SMALL_PARAMETERS


def test_tensor_in_two_files(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", small_config(), small_tensors())
    write_file(path / "model.fp32.safetensors", small_tensors(plain("F32"), "F32"))
    error = refusal(path)
    assert "the tensor model.embed_tokens.weight is in model.fp32.safetensors and in model.safetensors" in error.message
    assert "left over" in error.hint


def test_only_mistral_s_own_files(tmp_path: Path) -> None:
    names = {
        "model.layers": "layers",
        "model.embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "model.norm": "norm",
    }
    tensors = small_tensors()
    for old, new in names.items():
        tensors = [spec._replace(name=spec.name.replace(old, new)) for spec in tensors]
    path = write_model(tmp_path / "m", small_config(), tensors, stem="consolidated")
    (path / "params.json").write_text("{}")
    assert read_model(str(path)).parameters == SMALL_PARAMETERS


def test_gguf_beside_safetensors(small: Path) -> None:
    """The directory is the safetensors model; the GGUF has a path of its own."""
    (small / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    assert read_model(str(small)).format == "safetensors"


def test_one_file_of_the_model(small: Path) -> None:
    error = refusal(small / "model-00001-of-00003.safetensors")
    assert "is one file of a model that is a directory" in error.message
    assert error.hint == f"give the directory: {small}"


@pytest.mark.parametrize(
    ("files", "what", "hint"),
    [
        (("config.json", "pytorch_model.bin"), "it holds PyTorch weights: pytorch_model.bin", "*.safetensors files"),
        (("pytorch_model.bin", "README.md"), "has no config.json", "download config.json"),
        (("config.json", "README.md"), "has no *.safetensors file; it holds README.md, config.json", "download the"),
        (("config.json", "transformer/x.safetensors"), "these directories in it do: transformer", "one of them"),
        (("adapter_config.json", "adapter_model.safetensors"), "a LoRA adapter", "the directory of the model"),
        (("config.json", "adapter_model.safetensors"), "holds a LoRA adapter, not a model", "it was made for"),
        (("params.json", "consolidated.safetensors"), "Meta's or Mistral's own format", "config.json"),
        (("a.safetensors",), "has no config.json", "download config.json"),
        (("sub/a.safetensors",), "it holds directories with some: sub", "give the path"),
    ],
)
def test_directories_that_are_no_model(tmp_path: Path, files: Sequence[str], what: str, hint: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    error = refusal(tmp_path)
    assert what in error.message
    assert hint in error.hint


def test_adapter_says_what_it_was_made_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}')
    assert "made for, meta-llama/Llama-3.1-8B;" in refusal(tmp_path).hint
    (tmp_path / "adapter_config.json").write_text("{")
    assert "made for; after --" in refusal(tmp_path).hint


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors"])
@pytest.mark.parametrize("what", ["fifo", "device", "directory", "broken link", "empty"])
def test_files_that_are_none(small: Path, name: str, what: str) -> None:
    """None of them is waited for."""
    path = small / name
    path.unlink()
    if what in {"device", "broken link"}:
        path.symlink_to("/dev/zero" if what == "device" else "gone")
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    else:
        path.touch()
    said = {"broken link": "is a link to gone, which does not exist", "empty": "is empty (0 bytes)"}
    assert said.get(what, "is not a regular file") in refusal(small).message


@pytest.mark.parametrize(
    ("index", "what"),
    [
        ("{", "has no sound weight_map"),
        ("[]", "has no sound weight_map"),
        ("{}", "has no sound weight_map"),
        ('{"weight_map": {}}', "has no sound weight_map"),
        ('{"weight_map": {"a": 1}}', "Expected `str`, got `int`"),
        ('{"weight_map": ' + '{"a": ' * 50_000, "has no sound weight_map"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "names the file '../../etc/passwd', which cannot be one"),
        ('{"weight_map": {"a": ""}}', "which cannot be one"),
        ('{"weight_map": {"a": ".."}}', "which cannot be one"),
        ('{"weight_map": {"a": "x\\u0000"}}', "which cannot be one"),
        ('{"weight_map": {' + '"a": "b",' * (1 << 21) + '"a": "b"}}', "names more than 1048576 tensors"),
        ('{"weight_map": {"a": "b.safetensors"}}', "none of the files that"),
    ],
)
def test_bad_index(small: Path, index: str, what: str) -> None:
    (small / "model.safetensors.index.json").write_text(index)
    assert what in refusal(small).message
