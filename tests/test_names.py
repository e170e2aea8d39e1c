"""Names and paths as people have them, or as somebody hostile would choose them: a name, and never anything else."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Mgpu, write_program
from fake_build import SERVER, build_program
from fakenvml.machine import Machine, rtx_3090
from mgpu.adapter import Command
from mgpu.launch.logs import new_log
from mgpu.launch.scratch import Scratch
from mgpu.report.lines import joint_line, shell_line

Header = Callable[[str], Path]
Env = dict[str, str]

_ROOT: Final = Path(__file__).parents[1]
_PYTHONPATH: Final = os.pathsep.join(str(_ROOT / part) for part in ("launcher", "adapters", "profiles"))

SMALL: Final = "Llama-3.1-8B-Instruct-Q4_K_M"

#: What a file or directory may be called on Linux.
NAMES: Final = {
    "space": "a b",
    "quotes": 'it\'s "x"',
    "newline": "a\nb",
    "dash": "-rf",
    "option": "--help",
    "bytes": os.fsdecode(b"a\xff\xfeb"),
    "substitution": "$(touch pwned)`touch pwned`${HOME}",
    "separators": "a;touch pwned&b|c>d",
    "percent": "100%s %d %(x)s {0} {x}",
    "tilde": "~root",
    "backslash": "a\\nb\\",
    "long": "x" * 200,
    "dots": "a...",
    "hidden": ".hidden",
    "glob": "*?[a]!",
    "markup": "[red]a[bold]",
    "unicode": "modèle\u202e\U0001f600",
    "controls": "a\x1b]0;b\x07\t\r",
}

#: Started with a model, it writes down its words and answers as llama-server does.
_STARTED: Final = """\
if "STAND_IN" in os.environ:
    sys.exit(print(json.dumps(words)))
with open({record!r}, "w") as out:
    json.dump([sys.argv[0], *words], out)
port = words[words.index("--port") + 1]
os.execv(sys.executable, [sys.executable, {fake!r}, "--port", port])
"""


@pytest.fixture
def machine(fake_nvml: Path, tmp_path: Path) -> Env:
    """The environment of a machine with a 3090 and a llama-server."""
    config = tmp_path / "machine.toml"
    config.write_text(Machine(rtx_3090(0)).toml(), encoding="utf-8")
    started = _STARTED.format(record=str(tmp_path / "record.json"), fake=SERVER)
    server = write_program(tmp_path / "llama-server", build_program(started))
    return {"LD_LIBRARY_PATH": str(fake_nvml), "FAKE_NVML_CONFIG": str(config), "MGPU_LLAMA_SERVER": str(server)}


def place(header: Header, folder: Path, name: str) -> Path:
    """The model in a directory of that name, as a file of that name."""
    directory = folder / name
    directory.mkdir()
    path = directory / f"{name}.gguf"
    os.link(header(SMALL), path)
    return path


def recorded(tmp_path: Path) -> list[str]:
    """The words the runtime was started with, its own name left out."""
    words: list[str] = json.loads((tmp_path / "record.json").read_text())
    return words[1:]


def all_below(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*")}


@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
class TestAModelCalledThat:
    def test_runs_as_planned_and_as_pasted(
        self, header: Header, machine: Env, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Launched, printed as JSON, and pasted into a shell: the same words reach the runtime."""
        path = place(header, tmp_path, name)
        monkeypatch.chdir(path.parent)
        given = f"./{path.name}"
        before = all_below(tmp_path)
        port = free()
        done = raw("run", given, "--prompt", "Hello?", "--port", port, env=machine)
        assert done.returncode == 0, done.stderr
        launched = recorded(tmp_path)
        assert launched[1] in {given, str(path)}
        told = raw("run", given, "--json", "--port", port, env=machine)
        argv = json.loads(told.stdout)["command"]["argv"]
        assert argv[1:] == launched[: len(argv) - 1]
        line = raw("run", given, "--dry-run", "--port", port, env=machine).stdout
        assert pasted(line, machine) == argv[1:]
        assert {path.name for path in all_below(tmp_path) - before} <= {"record.json"}

    def test_can_be_looked_at(self, header: Header, tmp_path: Path, name: str) -> None:
        path = place(header, tmp_path, name)
        for arguments in (
            ("inspect",),
            ("inspect", "--json"),
            ("plan", "--rig", "3090"),
            ("plan", "--rig", "3090", "--json"),
        ):
            done = raw(arguments[0], str(path), *arguments[1:])
            assert done.returncode == 0, done.stderr
            assert b"\x1b]0;" not in done.stdout + done.stderr, "a name that talks to the terminal"
        assert not list(tmp_path.rglob("pwned"))


def raw(*words: str, env: Env | None = None) -> subprocess.CompletedProcess[bytes]:
    """`mgpu` as a person runs it, with what it says as bytes: a path need not be text."""
    return subprocess.run(
        [sys.executable, "-m", "mgpu", *words],
        env={**os.environ, "PYTHONPATH": _PYTHONPATH, **(env or {})},
        capture_output=True,
        timeout=60,
        check=False,
    )


def free() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def pasted(line: bytes, env: Env) -> list[str]:
    """The words that the runtime gets when a shell evaluates the line, as the README says it can."""
    environ = {**os.environ, **env, "STAND_IN": "1", "LINE": os.fsdecode(line)}
    done = subprocess.run(["sh", "-c", 'eval "$LINE"'], env=environ, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    words: list[str] = json.loads(done.stdout)
    return words


class TestARigCalledThat:
    @pytest.mark.parametrize(
        "name", ["../../x", "/tmp/x", "a/b", "..", ".", "", "a\nb", "a\0b", "-x", "a b/../c", "x" * 300]
    )
    def test_is_no_way_out(self, name: str, tmp_path: Path) -> None:
        config = Path(os.environ["XDG_CONFIG_HOME"])
        before = all_below(tmp_path, config.parent)
        for command in ("save", "use", "remove", "check", "show"):
            if "\0" in name:
                continue
            done = raw("rig", command, "--", name)
            assert done.returncode in {0, 2, 8}, (command, done.stderr)
            assert b"Traceback" not in done.stderr
        new = all_below(tmp_path, config.parent) - before
        inside = {config / "mgpu", config / "mgpu" / "rigs"}
        assert all(path in inside or path.parent in inside or config not in path.parents for path in new), new
        assert not any(path.suffix == ".toml" and path.parent != config / "mgpu" / "rigs" for path in new), new

    def test_a_pointer_to_elsewhere_reads_nothing(self) -> None:
        config = Path(os.environ["XDG_CONFIG_HOME"]) / "mgpu"
        config.mkdir(parents=True)
        (config / "default-rig").write_text("../../../../etc/passwd\n")
        done = raw("plan", "/no/such.gguf")
        assert done.returncode in {4, 8}
        assert b"root:" not in done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
def test_cards_called_that(header: Header, name: str) -> None:
    done = raw("plan", str(header(SMALL)), "--rig", "2x3090", "--gpus", name)
    assert done.returncode in {2, 8}, done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("name", [*NAMES.values(), "../../../etc/passwd", "a:../../b", "/etc/passwd:x", "a//b:c"])
def test_models_of_ollama_called_that(name: str, tmp_path: Path) -> None:
    done = raw("inspect", "--", name, env={"OLLAMA_MODELS": str(tmp_path)})
    assert done.returncode in {2, 4}, done.stderr
    assert b"Traceback" not in done.stderr


class TestFilesOfOurs:
    @settings(max_examples=100, deadline=None)
    @given(st.text(max_size=300))
    def test_logs_stay_where_logs_are(self, name: str) -> None:
        state = Path(os.environ["XDG_STATE_HOME"]) / "mgpu"
        place = new_log(name, state_dir=state)
        assert place.path.parent == state / "logs"
        assert not place.path.name.startswith((".", "-"))
        assert place.path.exists()
        place.path.unlink()

    def test_a_log_is_no_link_of_somebody_elses(self, tmp_path: Path) -> None:
        """Names hold the second and our process: whoever could guess them cannot write there."""
        assert new_log("m", state_dir=tmp_path / "s").path.parent.stat().st_mode & 0o077 == 0

    def test_scratch_files_are_private(self) -> None:
        before = os.umask(0)
        try:
            scratch = Scratch({"config.yml": "x", "sub/tokens.yml": "y"})
        finally:
            os.umask(before)
        assert scratch.directory is not None
        made = [Path(scratch.directory), *Path(scratch.directory).rglob("*")]
        assert len(made) == 4
        assert all(path.stat().st_mode & 0o077 == 0 for path in made)
        scratch.remove()
        assert not Path(scratch.directory).exists()

    def test_the_state_may_be_a_link_of_ones_own_and_nothing_else_changes(
        self, header: Header, machine: Env, tmp_path: Path, mgpu: Mgpu
    ) -> None:
        state = Path(os.environ["XDG_STATE_HOME"])
        state.mkdir(parents=True)
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        (state / "mgpu").symlink_to(tmp_path / "elsewhere")
        done = mgpu("run", str(header(SMALL)), "--prompt", "Hi", env=machine)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "elsewhere" / "logs").is_dir()


def test_nothing_is_written_elsewhere(
    header: Header, machine: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command set: home, working directory and temporary files are as before, but for our directories."""
    home, work, temporary = tmp_path / "home", tmp_path / "work", tmp_path / "tmp"
    for folder in (home, work, temporary):
        folder.mkdir()
    for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.chdir(work)
    model = str(header(SMALL))
    before = all_below(tmp_path, Path(model).parent)
    for words in (
        ("inspect", model), ("plan", model), ("plan", model, "--json"), ("run", model, "--dry-run"),
        ("run", model, "--json"), ("rig", "show"), ("rig", "list"), ("runtimes",), ("completions", "bash"), ("ps",),
        ("rig", "save", "mine"), ("rig", "use", "mine"), ("rig", "check"), ("run", model, "--prompt", "Hi"),
        ("run", model, "--host", "0.0.0.0", "--prompt", "Hi"), ("rig", "remove", "mine"),
        ("run", model, "--rig", "3060"),
    ):  # fmt: skip
        done = raw(*words, env=machine)
        assert b"Traceback" not in done.stderr, (words, done.stderr)
    ours = {home / ".local" / "state" / "mgpu", home / ".cache" / "mgpu", home / ".config" / "mgpu"}
    new = all_below(tmp_path, Path(model).parent) - before - {tmp_path / "record.json"}
    above = {parent for path in ours for parent in path.parents}
    strange = {path for path in new - above - ours if not ours & set(path.parents)}
    assert strange == set()
    assert (home / ".local" / "state" / "mgpu" / "api-key").exists()


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12), max_size=4),
    value=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
)
def test_a_line_is_its_words(words: list[str], value: str) -> None:
    """Whatever they are: to a real shell, and beside others in one line."""
    code = "import json, os, sys; print(json.dumps([os.environ['X'], sys.argv[1:]]))"
    command = Command(
        argv=(sys.executable, "-c", code, *words), env={"X": value}, scrub=(), files={}, ready_url="", endpoint=""
    )
    for line in (shell_line(command), shell_line(command, ("Y",)), joint_line([command])):
        done = subprocess.run(["sh", "-c", line], capture_output=True, check=True)
        assert json.loads(done.stdout) == [value, words]
