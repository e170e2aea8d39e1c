"""The ExLlama adapters: which TabbyAPI it is, options after `--`, cache types, the log, cards, files of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exllama_machine import Branch, write_clone
from exllama_models import ExFormat, exl_model
from mgpu.adapter import Adapter, Cause, Probe, Stage
from mgpu.errors import RefusedError, RuntimeFailedError, RuntimeMissingError, UsageError
from mgpu.inspect.source import read_model
from mgpu.launch.find import find_runtime
from mgpu.launch.probe import probe_runtime
from mgpu.launch.scratch import Scratch
from mgpu.request import Request
from mgpu_adapters.exllama.adapter import ExLlamaV2, ExLlamaV3
from mgpu_adapters.exllama.flags import read_flags
from mgpu_adapters.exllama.log import read_line
from mgpu_adapters.exllama.settings import cache_mode
from mgpu_adapters.exllama.tabby import Clone
from planning import card, rig_of

V2: Final = ExLlamaV2()
V3: Final = ExLlamaV3()


def look(adapter: Adapter, *folders: Path, **environ: str) -> Clone | None:
    """What mgpu finds when MGPU_TABBYAPI names these folders."""
    if folders:
        environ["MGPU_TABBYAPI"] = ":".join(map(str, folders))
    found = find_runtime(adapter.search, explicit=None, environ=environ)
    if found is None:
        return None
    installed = adapter.installed(probe_runtime(found, adapter.probes, environ=environ))
    assert isinstance(installed, Clone)
    return installed


def refused(adapter: Adapter, *folders: Path) -> RuntimeMissingError:
    with pytest.raises(RuntimeMissingError) as caught:
        look(adapter, *folders)
    assert caught.value.hint
    return caught.value


# Which TabbyAPI it is.


@pytest.mark.parametrize(("adapter", "branch", "library"), [(V3, "main", (1, 4, 2)), (V2, "exl2", (0, 3, 2))])
@pytest.mark.parametrize("venv", ["venv", ".venv"])
def test_a_clone_is_told_by_its_files(
    tmp_path: Path, adapter: Adapter, branch: Branch, library: tuple[int, ...], venv: str
) -> None:
    clone = look(adapter, write_clone(tmp_path / "tabby", branch, venv=venv))
    assert clone is not None
    assert clone.executable == str(tmp_path / "tabby" / "main.py")
    assert clone.python == str(tmp_path / "tabby" / venv / "bin" / "python")
    assert clone.library == library
    assert clone.origin == "$MGPU_TABBYAPI"
    assert clone.runtime == adapter.name
    assert ".".join(map(str, library)) in clone.version


def test_without_a_venv_the_python_on_the_path_runs_it(tmp_path: Path) -> None:
    clone = look(V3, write_clone(tmp_path / "tabby", "main", venv=None))
    assert clone is not None
    assert clone.python == "python3"
    assert clone.library == ()
    assert "1.4.1 or newer" in clone.version


def test_of_two_clones_each_takes_its_own(tmp_path: Path) -> None:
    main, old = write_clone(tmp_path / "main", "main"), write_clone(tmp_path / "old", "exl2")
    for folders in ((main, old), (old, main), (tmp_path / "gone", main, old)):
        v2, v3 = look(V2, *folders), look(V3, *folders)
        assert v2 is not None
        assert v3 is not None
        assert v2.executable == str(old / "main.py")
        assert v3.executable == str(main / "main.py")


def test_the_usual_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert look(V3) is None
    write_clone(tmp_path / "tabbyAPI", "main")
    write_clone(tmp_path / "tabbyAPI-exl2", "exl2")
    for adapter, name in ((V3, "tabbyAPI"), (V2, "tabbyAPI-exl2")):
        clone = look(adapter)
        assert clone is not None
        assert clone.executable == str(tmp_path / name / "main.py")
        assert clone.origin == "a usual place"


def test_a_branch_that_does_not_serve_the_format(tmp_path: Path) -> None:
    error = refused(V2, write_clone(tmp_path / "main", "main"))
    assert "serves no EXL2" in error.message
    assert "git clone --branch exl2-checkpoint" in error.hint
    error = refused(V3, write_clone(tmp_path / "old", "exl2"))
    assert "too old for today's EXL3" in error.message
    assert "colon between" in error.hint


def test_packages_that_are_missing_or_old(tmp_path: Path) -> None:
    error = refused(V3, write_clone(tmp_path / "bare", "main", versions={}))
    assert "has no exllamav3" in error.message
    assert error.hint.endswith("venv/bin/pip install '.[cu12]'")
    error = refused(V3, write_clone(tmp_path / "old", "main", versions={"exllamav3": "1.3.0"}))
    assert "exllamav3 1.3.0" in error.message
    assert "needs 1.4.1" in error.message
    assert "git pull" in error.hint


def test_folders_that_are_none(tmp_path: Path) -> None:
    assert "no such directory" in refused(V3, tmp_path / "gone").message
    (tmp_path / "empty").mkdir()
    assert "has no main.py" in refused(V3, tmp_path / "empty").message
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "main.py").write_text("print('hello')")
    assert "is no TabbyAPI" in refused(V3, tmp_path / "other").message


@given(outputs=st.dictionaries(st.text(max_size=40), st.text(max_size=60), max_size=5), odd=st.text(max_size=30))
def test_any_files_are_told_or_refused(outputs: dict[str, str], odd: str) -> None:
    texts = outputs | {"backends/exllamav3/model.py": odd}
    for adapter in (V2, V3):
        with suppress(RuntimeMissingError):
            adapter.installed(Probe(executable="/x/main.py", origin="test", outputs=texts))


# Options after `--`.


def test_options_are_read_as_tabbyapi_reads_them() -> None:
    given_ = read_flags(
        ("--max_seq_len", "4096", "--cache-mode=8,4", "--vision", "true", "--draft-gpu-split", "1", "2")
    )
    assert given_.number("max-seq-len") == 4096
    assert given_.word("cache-mode") == "8,4"
    assert given_.truth("vision") is True
    assert given_.in_section("draft_model") == {"draft_gpu_split": ("1", "2")}
    assert "cache-size" not in given_


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        (("--gpu-split", "20", "24"), "would bypass mgpu", "--gpus"),
        (("--host", "0.0.0.0"), "would bypass mgpu", "--host"),
        (("--max-seq-len",), "lacks its value", "--max-seq-len"),
        (("--nonsense", "1"), "no option", "config_sample.yml"),
        (("-c", "1"), "no option", "--max-seq-len"),
        (("4096",), "no option", "--max-seq-len"),
        (("--cache-size", "1", "2"), "one value", "once"),
    ],
)
def test_options_that_mean_nothing(words: tuple[str, ...], said: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_flags(words)
    assert said in caught.value.message
    assert words[0].partition("=")[0] in caught.value.message
    assert hint in caught.value.hint


@given(
    st.lists(st.text(max_size=12) | st.sampled_from(["--max-seq-len", "--vision", "--api-servers", "8"]), max_size=6)
)
def test_any_words_are_read_or_refused(words: list[str]) -> None:
    with suppress(UsageError):
        given_ = read_flags(tuple(words))
        given_.number("max-seq-len")
        given_.truth("vision")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Mapping[ExFormat, Path]:
    directory = tmp_path_factory.mktemp("models")
    formats: tuple[ExFormat, ...] = ("exl2", "exl3")
    return {format_: exl_model(directory, format_, "8B") for format_ in formats}


def job(adapter: Adapter, path: Path, *words: str, **asked: Any) -> Any:
    request = Request(runtime_args=words, **asked)
    return adapter.job(read_model(str(path)), request, adapter.assumed())


def test_the_job_follows_request_and_options(small: Mapping[ExFormat, Path]) -> None:
    for adapter, path in ((V2, small["exl2"]), (V3, small["exl3"])):
        asked = job(adapter, path, users=3, ctx=4000)
        assert (asked.ctx, asked.users, asked.ctx_train) == (4000, 3, 131072)
        assert asked.at_ctx(5000).ctx == 5000
        assert asked.at_users(7).users == 7
        fixed = job(adapter, path, "--max-seq-len", "2048", "--max-batch-size", "2")
        assert (fixed.at_ctx(5000).ctx, fixed.at_users(7).users) == (2048, 2)
        assert job(adapter, path, "--tensor-parallel", "true").pinned.mode == "tensor"
        assert job(adapter, path, "--tensor-parallel", "false").pinned.mode == "pipeline"
        with pytest.raises(UsageError, match="less than one context"):
            job(adapter, path, "--cache-size", "4096")
        with pytest.raises(UsageError, match="neither true nor false"):
            job(adapter, path, "--tensor-parallel", "yes")


def test_work_reads_the_weights_once_a_token(small: Mapping[ExFormat, Path]) -> None:
    for adapter, path in ((V2, small["exl2"]), (V3, small["exl3"])):
        model, work = read_model(str(path)), job(adapter, path).work
        embedding = model.bytes_by_class()["token_embedding"]
        assert work.weights[-1] == model.weights_bytes - embedding
        assert work.n_units == 33
        assert work.cache[-1] == work.depth * 32 * 2 * 2 * 8 * 128


@pytest.mark.parametrize(
    ("kv_type", "v2", "v3"),
    [("f16", "FP16", "FP16"), ("q8_0", "Q8", "8,8"), ("q4_0", "Q4", "4,4"), ("Q6", "Q6", "6,6"), ("8, 4", "", "8,4")],
)
def test_cache_types(kv_type: str, v2: str, v3: str) -> None:
    assert cache_mode(kv_type, version=3) == v3
    if v2:
        assert cache_mode(kv_type, version=2) == v2


@pytest.mark.parametrize(("version", "kv_type"), [(2, "8,4"), (2, "q5_1"), (3, "9,9"), (3, "iq4_nl"), (3, "")])
def test_cache_types_that_are_none(version: int, kv_type: str) -> None:
    with pytest.raises(UsageError) as caught:
        cache_mode(kv_type, version=version)
    assert "q8_0" in caught.value.hint


def test_warnings(small: Mapping[ExFormat, Path], tmp_path: Path) -> None:
    assert job(V3, small["exl3"]).warnings == ()
    model = exl_model(tmp_path, "exl3", "8B")
    (model / "tabby_config.yml").write_text("model:\n  cache_size: 131072\n")
    assert "tabby_config.yml" in job(V3, model).warnings[0]
    said = job(V3, small["exl3"], "--vision", "true", ctx=1 << 18, host="0.0.0.0").warnings
    for words in ("--vision", "131072", "--host 0.0.0.0 without --api-key"):
        assert any(words in line for line in said)
    assert not job(V3, small["exl3"], host="0.0.0.0", api_key="k").warnings


# The log.

_PREFIX: Final = "2026-08-13 20:55:45.123 "


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ("INFO:     Loading model: /models/x", "loading weights"),
        ("INFO:     Loading with a manual GPU split (or a one GPU setup)", "loading weights as planned"),
        ("INFO:     Model successfully loaded.", "weights loaded"),
        ("INFO:     Uvicorn running on http://127.0.0.1:8080 (Press CTRL+C to quit)", "serving"),
    ],
)
def test_stages(line: str, stage: str) -> None:
    assert read_line(_PREFIX + line) == Stage(text=stage)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("RuntimeError: Insufficient VRAM in split for model and cache", "no room"),
        ("AssertionError: Insufficient space in device allocation", "no room"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB", "out of memory"),
        ("NotImplementedError: Tensor-parallel is not currently implemented for Olmo3Model", "Olmo3Model"),
        ("OSError: CUDA_HOME environment variable is not set.", "compiled"),
        ("RuntimeError: ERROR: TabbyAPI requires exllamav3 1.4.1 or greater. Your current version is 1.3.0.", "1.3.0"),
        ("ERROR: Inference dependencies for TabbyAPI are not installed.", "not installed"),
    ],
)
def test_causes(line: str, words: str) -> None:
    fact = read_line(line)
    assert isinstance(fact, Cause)
    assert words in fact.text
    assert fact.hint
    assert not fact.port_taken


@pytest.mark.parametrize(
    "line",
    [
        "WARNING:  Port 8080 is currently in use. Switching to 8081.",
        "ERROR:    Ports 8080 and 8081 are in use by different services.",
        "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 8080): address already in use",
    ],
)
def test_a_taken_port_is_known(line: str) -> None:
    """It is bound minutes after it was looked for: another try takes another one."""
    fact = read_line(_PREFIX + line)
    assert isinstance(fact, Cause)
    assert fact.port_taken


@given(st.text())
def test_any_line_is_read(line: str) -> None:
    fact = read_line(line)
    assert fact is None or isinstance(fact, Stage | Cause)


# Cards.


def test_old_cards_are_disabled_with_a_finding() -> None:
    rig = rig_of(card(0, 24, 936, compute_capability="8.6"), card(1, 8, 256, compute_capability="7.5"))
    bound = V3.bind(rig, ())
    assert [gpu.enabled for gpu in bound.gpus] == [True, False]
    assert "GPU 1" in bound.findings[-1].text
    fine = rig_of(rig.gpus[0])
    assert V2.bind(fine, ()) is fine
    with pytest.raises(RefusedError, match=r"8\.0, and this is 7\.5"):
        V2.bind(rig_of(rig.gpus[1]), ())


# Files of its own.


def test_scratch_is_private_and_goes(tmp_path: Path) -> None:
    scratch = Scratch({"config.yml": "a: 1\n", str(tmp_path / "elsewhere"): "no"})
    assert scratch.directory is not None
    file = Path(scratch.directory) / "config.yml"
    assert file.read_text() == "a: 1\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "elsewhere").exists()
    scratch.remove()
    scratch.remove()
    assert not file.parent.exists()


def test_nothing_is_made_for_nothing(tmp_path: Path) -> None:
    assert Scratch({str(tmp_path / "absolute"): ""}).directory is None


def test_a_name_that_cannot_be_written_leaves_nothing() -> None:
    with pytest.raises(RuntimeFailedError, match="cannot write"):
        Scratch({"good": "", "x" * 300: ""})
    assert not list(Path(os.environ["XDG_STATE_HOME"]).glob("mgpu/run-*"))


def test_a_plan_in_json_has_the_files(mgpu: Any, small: Mapping[ExFormat, Path]) -> None:
    told = json.loads(mgpu("plan", str(small["exl3"]), "--rig", "3090", "--json").stdout)
    assert told["plan"]["runtime"] == "exllamav3"
    assert set(told["command"]["files"]) == {"config.yml"}
    assert told["command"]["argv"][-2:] == ["--config", "config.yml"]
