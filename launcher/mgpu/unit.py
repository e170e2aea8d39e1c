"""`mgpu run … --unit`: a systemd user unit that does the same at each login, or at boot (systemd.service(5))."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from mgpu.errors import MgpuError, UsageError
from mgpu.request import KEY_VARIABLE

#: What decides where and how it runs, and what a user manager does not know (systemd.exec(5): a fixed PATH).
_VARIABLES: Final = re.compile(
    r"PATH|(?:CUDA|HIP|ROCR|GGML|ONEAPI|OLLAMA|MGPU|TABBY|HF|VLLM)_[A-Z0-9_]+|XDG_(?:STATE|CONFIG|CACHE|DATA)_HOME|LD_LIBRARY_PATH"
)
_SECRET: Final = re.compile(r"KEY|TOKEN|SECRET|PASSW")

#: What cannot get better by trying again: usage, refused, a bad model, no room, no runtime, a wrong rig.
_HOPELESS: Final = "2 3 4 5 6 8"

#: Options of ours that a unit has no use for; those in the second set take a value.
_DROPPED: Final = frozenset({"--unit", "--detach"})
_DROPPED_WITH_VALUE: Final = frozenset({"--restart"})

_HEAD: Final = """\
# Keep this as ~/.config/systemd/user/{file}, then
#   systemctl --user daemon-reload && systemctl --user enable --now {file}
# `loginctl enable-linger` lets it start at boot, without a login.
"""


def unit(arguments: Sequence[str], model: str, name: str, environ: Mapping[str, str]) -> str:
    """The unit's text. `arguments`: of `mgpu`, as they were typed; `model`: the word among them that names the model.

    Raises `UsageError` for what a unit cannot hold: a key, text that is no valid UTF-8.
    """
    ours = list(arguments[: arguments.index("--")]) if "--" in arguments else list(arguments)
    if any(word == "--api-key" or word.startswith("--api-key=") for word in ours):
        raise UsageError(
            "a unit is a file that others may read: not a place for --api-key",
            hint=f"leave it out (a key is made and kept), or set ${KEY_VARIABLE} by EnvironmentFile=",
        )
    words = _kept(ours, model) + list(arguments[len(ours) :])
    settings = [_assignment(key, environ[key]) for key in sorted(environ) if _counts(key)]
    program = _quoted(sys.executable)  # a path: no variables are replaced in it
    exec_start = " ".join((program, *(_word(word) for word in ("-P", "-m", "mgpu", *words))))
    lines = (
        "[Unit]",
        f"Description=mgpu: {_plain(name)}",
        "StartLimitIntervalSec=600",
        "StartLimitBurst=7",
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=main",
        "TimeoutStartSec=infinity",
        *_working_directory(),
        *settings,
        f"ExecStart={exec_start}",
        "Restart=on-failure",
        "RestartSec=5",
        f"RestartPreventExitStatus={_HOPELESS}",
        "SuccessExitStatus=130",
        "KillMode=mixed",
        "TimeoutStopSec=45",
        "",
        "[Install]",
        "WantedBy=default.target",
        "",
    )
    return _HEAD.format(file=f"mgpu-{name}.service") + "\n".join(lines)


def _kept(words: Sequence[str], model: str) -> list[str]:
    """Without what a unit does by itself; the model by its whole path, as a unit starts elsewhere."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in _DROPPED:
            continue
        if word in _DROPPED_WITH_VALUE:
            next(rest, None)
            continue
        if word.partition("=")[0] in _DROPPED_WITH_VALUE:
            continue
        path = Path(word)
        kept.append(os.path.abspath(word) if word == model and path.exists() else word)  # noqa: PTH100 - links stay
    return kept


def _working_directory() -> tuple[str, ...]:
    """Where it was typed, for relative paths among the arguments; a unit starts at home otherwise.

    Not in quotes (systemd.exec(5)), so that some names cannot be written. `-`: it may have gone by then.
    """
    path = os.getcwd()  # noqa: PTH109 - text
    fit = path.isprintable() and not path.endswith(("\\", " "))
    return (f"WorkingDirectory=-{path.replace('%', '%%')}",) if fit else ()


def _counts(name: str) -> bool:
    return _VARIABLES.fullmatch(name) is not None and _SECRET.search(name) is None


def _assignment(name: str, value: str) -> str:
    return f"Environment={_quoted(f'{name}={value}')}"


def _word(word: str) -> str:
    """One argument of ExecStart: `$` would be a variable there."""
    return _quoted(word.replace("$", "$$"))


def _quoted(text: str) -> str:
    """A word in double quotes, with systemd's escapes; `%` would be a specifier (systemd.syntax(7))."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _no_text(text) from error
    if re.fullmatch(r"[A-Za-z0-9_@+=:,./-]+", text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return '"' + "".join(char if char.isprintable() else _escape(char) for char in escaped) + '"'


def _escape(char: str) -> str:
    code = ord(char)
    if code == 0x0A:
        return "\\n"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _plain(name: str) -> str:
    return re.sub(r"[^ -~]|%", " ", name)


def _no_text(text: str) -> MgpuError:
    return UsageError(f"{text!a} is not valid UTF-8, which a unit must be", hint="give the file another name")
