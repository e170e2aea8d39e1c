"""MODEL as an Ollama name: from its store to the GGUF, without a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Mgpu
from mgpu.errors import BadModelError
from mgpu.inspect.ollama_store import close_names, find_stored, stores
from mgpu.inspect.source import read_model
from ollama_server import put_in_store

Header = Callable[[str], Path]
SMALL = "Llama-3.1-8B-Instruct-Q4_K_M"
LIBRARY = "registry.ollama.ai/library"


@pytest.fixture
def store(tmp_path: Path, header: Header, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with a model of the library, one of a person, one of Hugging Face; it is $OLLAMA_MODELS."""
    directory = tmp_path / "store"
    for name in (
        f"{LIBRARY}/llama3.1/latest",
        f"{LIBRARY}/llama3.1/8b-instruct-q4_K_M",
        "registry.ollama.ai/ann/Fine_tune/v2",
        "hf.co/bartowski/Llama-GGUF/Q4_K_M",
    ):
        put_in_store(directory, name, header(SMALL))
    monkeypatch.setenv("OLLAMA_MODELS", str(directory))
    monkeypatch.chdir(tmp_path)
    return directory


@pytest.mark.parametrize(
    ("given_name", "listed"),
    [
        ("llama3.1", "llama3.1:latest"),
        ("llama3.1:latest", "llama3.1:latest"),
        ("library/llama3.1", "llama3.1:latest"),
        ("registry.ollama.ai/library/llama3.1:latest", "llama3.1:latest"),
        ("LLAMA3.1:8B-Instruct-Q4_k_m", "llama3.1:8b-instruct-q4_K_M"),
        ("ann/fine_tune:v2", "ann/Fine_tune:v2"),
        ("hf.co/bartowski/Llama-GGUF:Q4_K_M", "hf.co/bartowski/Llama-GGUF:Q4_K_M"),
    ],
)
def test_a_name_is_its_gguf(store: Path, given_name: str, listed: str) -> None:
    model = read_model(given_name)
    assert model.alias == listed
    assert model.architecture == "llama"
    assert Path(model.path).parent == store / "blobs"
    assert model.files[0].path == model.path


@pytest.mark.parametrize("name", ["llama3.2", "llama3.1:70b", "bob/fine_tune:v2", "ann/fine_tune", "hf.co/a/b:c"])
def test_other_names_are_not_there(store: Path, name: str) -> None:
    assert find_stored(name, (store,)) is None


def test_a_file_comes_before_a_name(store: Path, tmp_path: Path, header: Header) -> None:
    (tmp_path / "llama3.1").symlink_to(header(SMALL))
    model = read_model("llama3.1")
    assert model.alias is None
    assert model.path == str(tmp_path / "llama3.1")


def test_close_names_are_told(store: Path) -> None:
    with pytest.raises(BadModelError) as raised:
        read_model("llama3.1:8b")
    assert "no model of that name in Ollama's store" in raised.value.message
    assert "llama3.1:8b-instruct-q4_K_M" in raised.value.hint
    assert "llama3.1:latest" in raised.value.hint


def test_without_a_close_name_it_can_be_fetched(store: Path) -> None:
    with pytest.raises(BadModelError) as raised:
        read_model("qwen3:32b")
    assert "ollama pull qwen3:32b" in raised.value.hint
    assert close_names("qwen3:32b", (store,)) == []


def test_a_blob_that_is_gone(store: Path) -> None:
    for blob in (store / "blobs").iterdir():
        blob.unlink()
    with pytest.raises(BadModelError, match=r"its blob sha256-.* is not") as raised:
        read_model("llama3.1")
    assert "ollama pull llama3.1:latest" in raised.value.hint


def test_a_damaged_manifest(store: Path) -> None:
    (store / "manifests" / LIBRARY / "llama3.1" / "latest").write_text("{", encoding="utf-8")
    with pytest.raises(BadModelError, match=r"manifest of llama3\.1:latest is damaged"):
        read_model("llama3.1")


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([], "runs in Ollama's cloud"),
        ([{"mediaType": "application/vnd.ollama.image.tensor", "digest": f"sha256:{'1' * 64}"}], "MLX"),
    ],
)
def test_models_without_a_gguf(store: Path, layers: list[dict[str, str]], words: str) -> None:
    manifest = store / "manifests" / LIBRARY / "llama3.1" / "latest"
    manifest.write_text(json.dumps({"layers": layers}), encoding="utf-8")
    with pytest.raises(BadModelError, match=words):
        read_model("llama3.1")


def test_a_digest_cannot_lead_out_of_the_store(store: Path) -> None:
    manifest = store / "manifests" / LIBRARY / "llama3.1" / "latest"
    layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../../etc/passwd"}]
    manifest.write_text(json.dumps({"layers": layers}), encoding="utf-8")
    with pytest.raises(BadModelError, match="no weights"):
        read_model("llama3.1")


def test_the_stores_of_this_machine(store: Path, tmp_path: Path) -> None:
    assert stores({"OLLAMA_MODELS": str(store)}) == (store,)
    assert stores({"OLLAMA_MODELS": str(tmp_path / "nowhere")}) == ()


@given(st.text(max_size=120))
def test_any_text_is_a_name_or_not(text: str) -> None:
    assert find_stored(text, ()) is None
    close_names(text, ())


@given(st.text(alphabet=st.characters(categories=("L", "N", "P", "S", "Z", "C")), max_size=60))
def test_no_text_leads_out_of_the_store(text: str) -> None:
    found = find_stored(text, (Path("/nonexistent/store"),))
    assert found is None


def test_inspect_and_plan_take_a_name(mgpu: Mgpu, store: Path) -> None:
    shown = mgpu("inspect", "llama3.1", "--json")
    assert shown.returncode == 0
    assert json.loads(shown.stdout)["model"]["architecture"] == "llama"
    planned = mgpu("plan", "llama3.1", "--rig", "3090", "--json")
    assert json.loads(planned.stdout)["plan"]["placement"] == "single"
    missing = mgpu("plan", "llama3.1:8b", "--rig", "3090")
    assert missing.returncode == 4
    assert "did you mean" in missing.stderr
