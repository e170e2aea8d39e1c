"""`mgpu run … --unit`: read back by systemd's rules, written down here once more (systemd.syntax(7), .service(5))."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Mgpu
from headers import write_model
from launching import House
from mgpu.cli import run
from mgpu.errors import UsageError
from mgpu.options import valued
from mgpu.unit import unit

MODEL: Final = "Qwen2.5-0.5B-Instruct-Q4_K_M"
VALUED: Final = valued(run)
_BY_LETTER: Final = dict(zip("abfnrtv\\\"'s", "\a\b\f\n\r\t\v\\\"' ", strict=True))
_DIGITS: Final = {"x": 2, "u": 4, "U": 8}


def _words(text: str) -> Iterator[str]:
    """Words of a setting: quotes anywhere, C's escapes in quotes and out of them (systemd 252, extract_first_word)."""
    at = 0
    while at < len(text):
        if text[at] in " \t":
            at += 1
            continue
        word, at = _one_word(text, at)
        yield word


def _one_word(text: str, at: int) -> tuple[str, int]:
    word, quote = "", ""
    while at < len(text) and (quote or text[at] not in " \t"):
        char = text[at]
        at += 1
        if char == "\\":
            piece, at = _escaped(text, at)
            word += piece
        elif char == quote:
            quote = ""
        elif not quote and char in "\"'":
            quote = char
        else:
            word += char
    assert not quote, f"a quote without end: {text}"
    return word, at


def _escaped(text: str, at: int) -> tuple[str, int]:
    letter = text[at]
    if letter in _DIGITS:
        end = at + 1 + _DIGITS[letter]
        return chr(int(text[at + 1 : end], 16)), end
    return _BY_LETTER[letter], at + 1


def _without_specifiers(word: str) -> str:
    assert re.fullmatch(r"(?:[^%]|%%)*", word, re.DOTALL), f"a specifier: {word}"
    return word.replace("%%", "%")


def _without_variables(word: str) -> str:
    assert re.fullmatch(r"(?:[^$]|\$\$)*", word, re.DOTALL), f"a variable: {word}"
    return word.replace("$$", "$")


def _settings(text: str) -> dict[str, list[str]]:
    """Values by key. A line that ends in a backslash would go on in the next; blanks at the end would be lost."""
    found: dict[str, list[str]] = {}
    for line in text.split("\n"):
        if line and not line.startswith(("#", ";", "[")):
            assert not line.endswith(("\\", " ", "\t")), line
            assert line.isprintable(), line
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def _argv(text: str) -> list[str]:
    """What systemd would start. The program itself is a path: variables are no matter there."""
    (line,) = _settings(text)["ExecStart"]
    program, *words = map(_without_specifiers, _words(line))
    assert re.search(r"(?:^|\s);(?:\s|$)", re.sub(r'"(?:[^"\\]|\\.)*"', "", line)) is None, "two commands"
    return [program, *map(_without_variables, words)]


def _environment(text: str) -> dict[str, str]:
    assignments = [
        _without_specifiers(word) for line in _settings(text).get("Environment", []) for word in _words(line)
    ]
    return {name: value for name, _, value in (assignment.partition("=") for assignment in assignments)}


_START: Final = [sys.executable, "-P", "-m", "mgpu"]

_NAMES: Final = (
    "two words.gguf",
    "it's.gguf",
    'a "quoted" one.gguf',
    "100%.gguf",
    "%h%n.gguf",
    "$HOME ${HOME} $$.gguf",
    "back\\slash\\.gguf",
    "line\nbreak\ttab.gguf",
    "ünïcode 名前 🦙.gguf",
    "-dash.gguf",
    "; rm -rf ~.gguf",
    "#comment.gguf",
    "bell\x07\x7f.gguf",
    "trailing \\",
)


@pytest.mark.parametrize("name", _NAMES)
def test_a_model_of_any_name_is_started_by_its_whole_path(house: House, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_model(MODEL, tmp_path).rename(path)
    done = house.call("run", str(path), "--ctx", "4096", "--unit", "--", "--alias", "it's $5 or 50%")
    assert done.returncode == 0, done.stderr
    assert _argv(done.stdout) == [*_START, "run", str(path), "--ctx", "4096", "--", "--alias", "it's $5 or 50%"]


_any_text = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20)
_marks = st.text("\"'\\%$; #\n\tä-=a", max_size=12)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(_any_text | _marks, max_size=5), st.dictionaries(st.sampled_from(["PATH", "HF_HOME"]), _any_text | _marks)
)
def test_arguments_and_variables_are_read_back_as_they_were(more: list[str], environ: dict[str, str]) -> None:
    text = unit(["run", "model", "--", *more], VALUED, "chat", environ)
    assert _argv(text) == [*_START, "run", "model", "--", *more]
    assert _environment(text) == environ


def test_relative_paths_mean_what_they_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, house: House) -> None:
    """A user manager starts units at home."""
    write_model(MODEL, tmp_path)
    done = house.call("run", f"{MODEL}.gguf", "--unit", "--", "--lora", "own.gguf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert _argv(done.stdout) == [*_START, "run", str(tmp_path / f"{MODEL}.gguf"), "--", "--lora", "own.gguf"]
    assert _settings(done.stdout)["WorkingDirectory"] == [f"-{tmp_path}"]
    odd = tmp_path / "100% odd"
    odd.mkdir()
    monkeypatch.chdir(odd)
    assert _settings(unit(["run", "m"], VALUED, "m", {}))["WorkingDirectory"] == [f"-{tmp_path}/100%% odd"]
    ends = tmp_path / "ends with \\"
    ends.mkdir()
    monkeypatch.chdir(ends)  # no way to write that
    assert "WorkingDirectory" not in _settings(unit(["run", "m"], VALUED, "m", {}))


@pytest.mark.parametrize("typed", [["--unit", "run", "m", "--detach"], ["run", "--detach", "--unit", "m"]])
def test_what_a_unit_does_by_itself_is_left_out(typed: list[str]) -> None:
    assert _argv(unit(typed, VALUED, "m", {})) == [*_START, "run", "m"]


@pytest.mark.parametrize("typed", [["--restart", "on-failure"], ["--restart=on-failure"]])
def test_what_starts_it_again_stays(typed: list[str]) -> None:
    """It comes back at the same address, sooner, and over the cards that are left."""
    assert _argv(unit(["run", "m", *typed, "--unit"], VALUED, "m", {}))[4:] == ["run", "m", *typed]


def test_a_value_is_neither_the_model_nor_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("m.gguf", "run"):
        (tmp_path / name).touch()
    path = str(tmp_path / "m.gguf")
    for words in (["m.gguf", "--name", "m.gguf"], ["--name", "m.gguf", "m.gguf"], ["m.gguf", "--name=m.gguf"]):
        expected = [path if word == "m.gguf" and words[at - 1] != "--name" else word for at, word in enumerate(words)]
        assert _argv(unit(["run", *words, "--unit"], VALUED, "m.gguf", {}))[4:] == ["run", *expected]
    assert _argv(unit(["run", "run", "--unit"], VALUED, "m", {}))[4:] == ["run", str(tmp_path / "run")]
    odd = ["run", "m.gguf", "--gpus", "--unit", "--rig", "--detach"]
    assert _argv(unit([*odd, "--unit"], VALUED, "m", {}))[4:] == ["run", path, *odd[2:]]


def test_a_key_s_name_as_a_value_is_none() -> None:
    assert "--gpus" in _argv(unit(["run", "m", "--gpus", "--api-key"], VALUED, "m", {}))


def test_the_name_stays() -> None:
    assert _argv(unit(["run", "m", "--name", "chat", "--unit"], VALUED, "chat", {}))[4:] == [
        "run",
        "m",
        "--name",
        "chat",
    ]


def test_what_is_behind_the_dashes_is_the_runtime_s(tmp_path: Path) -> None:
    typed = ["run", "m", "--unit", "--", "--unit", "--restart", "x", "--api-key", "y", "--detach"]
    assert _argv(unit(typed, VALUED, "m", {}))[4:] == ["run", "m", *typed[3:]]


def test_a_program_with_a_dollar_in_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables are not replaced in it."""
    program = str(tmp_path / "$odd 100%" / "python")
    monkeypatch.setattr(sys, "executable", program)
    assert _argv(unit(["run", "m"], VALUED, "m", {}))[0] == program


@pytest.mark.parametrize("typed", [["--api-key", "sk-secret"], ["--api-key=sk-secret"]])
def test_a_key_is_refused(house: House, typed: list[str]) -> None:
    done = house.call("run", house.model, *typed, "--unit")
    assert (done.returncode, done.stdout) == (2, "")
    assert "sk-secret" not in done.stderr
    assert "EnvironmentFile=" in done.stderr


def test_no_secret_of_the_environment_is_in_it(house: House) -> None:
    secrets = {"MGPU_API_KEY": "sk-one", "HF_TOKEN": "sk-two", "VLLM_API_KEY": "sk-three", "AWS_SECRET": "sk-four"}
    done = house.call("run", house.model, "--unit", env={**secrets, "HF_HOME": "/models", "EDITOR": "vi"})
    assert done.returncode == 0, done.stderr
    assert "sk-" not in done.stdout
    environment = _environment(done.stdout)
    assert environment["HF_HOME"] == "/models"
    assert environment["XDG_STATE_HOME"] == house.env["XDG_STATE_HOME"]
    assert "EDITOR" not in environment


def test_it_is_started_again_where_that_may_help_and_stopped_in_peace(house: House) -> None:
    text = house.call("run", house.model, "--unit", "--name", "chat").stdout
    told = {key: values[0] for key, values in _settings(text).items()}
    assert (told["Type"], told["Restart"], told["KillMode"]) == ("notify", "on-failure", "mixed")
    assert told["SuccessExitStatus"] == "130"  # what SIGTERM ends it with
    assert set(told["RestartPreventExitStatus"].split()) == {"2", "3", "4"}  # what is not there at boot may come
    assert (told["RestartSec"], told["StartLimitIntervalSec"]) == ("30", "0")
    assert "StartLimitBurst" not in told
    assert told["WantedBy"] == "default.target"
    assert text.startswith("# Keep this as ~/.config/systemd/user/mgpu-chat.service, then\n")
    assert "systemctl --user enable --now mgpu-chat.service" in text


def test_a_path_that_is_no_text_is_refused(mgpu: Mgpu, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not valid UTF-8"):
        unit(["run", os.fsdecode(b"/m/\xff.gguf")], VALUED, "x", {})


def test_a_question_is_no_service(house: House) -> None:
    done = house.call("run", house.model, "--prompt", "Hello?", "--unit")
    assert done.returncode == 2
    assert "mgpu: --prompt answers once and stops: --unit contradicts that\n" in done.stderr


@pytest.mark.parametrize("name", _NAMES)
def test_systemd_itself_finds_no_fault(house: House, tmp_path: Path, name: str) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("no systemd-analyze")
    path = tmp_path / name
    write_model(MODEL, tmp_path).rename(path)
    text = house.call("run", str(path), "--unit", "--name", "chat", "--", "--alias", name).stdout
    file = tmp_path / "mgpu-chat.service"
    file.write_text(text, encoding="utf-8")
    argv, env = (verify, "--user", "verify", file), {**house.env, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
    if done.returncode and "mgpu-chat" not in done.stderr:
        pytest.skip(f"systemd-analyze cannot verify here: {done.stderr.strip()[:200]}")
    assert (done.returncode, done.stderr) == (0, "")
    file.write_text(text.replace("ExecStart=", 'ExecStart="', 1), encoding="utf-8")  # it would say so
    done = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
    assert done.returncode != 0
