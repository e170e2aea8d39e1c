"""`mgpu run … --unit`: a systemd user unit that does the same at each login, or at boot (systemd.service(5))."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from mgpu.errors import MgpuError, UsageError
from mgpu.request import KEY_VARIABLE

#: What decides where and how it runs, and what a user manager does not know (systemd.exec(5): a fixed PATH).
_VARIABLES: Final = re.compile(
    r"PATH|(?:CUDA|HIP|ROCR|GGML|ONEAPI|OLLAMA|MGPU|TABBY|HF|VLLM)_[A-Z0-9_]+|XDG_(?:STATE|CONFIG|CACHE|DATA)_HOME|LD_LIBRARY_PATH"
)
_SECRET: Final = re.compile(r"KEY|TOKEN|SECRET|PASSW")

#: What cannot get better by trying again: usage, refused, a bad model. That there is no room (5), no runtime (6), not
#: the rig (8) may mean at boot that another unit is just loading, a disk is not mounted, a driver not awake yet.
_HOPELESS: Final = "2 3 4"

#: Options of ours that a unit has no use for.
_DROPPED: Final = frozenset({"--unit", "--detach"})

_MODEL: Final = 2  # of the plain words: `run` is the first

_HEAD: Final = """\
# Keep this as ~/.config/systemd/user/{file}, then
#   systemctl --user daemon-reload && systemctl --user enable --now {file}
# `loginctl enable-linger` lets it start at boot, without a login.
"""


def unit(arguments: Sequence[str], valued: Collection[str], name: str, environ: Mapping[str, str]) -> str:
    """The unit's text. `arguments`: of `mgpu`, as they were typed; `valued`: options of `run` that take a value.

    Raises `UsageError` for what a unit cannot hold: a key, text that is no valid UTF-8.
    """
    ours = list(arguments[: arguments.index("--")]) if "--" in arguments else list(arguments)
    if any(option == "--api-key" for option, _ in _told(ours, valued)):
        raise UsageError(
            "a unit is a file that others may read: not a place for --api-key",
            hint=f"leave it out (a key is made and kept), or set ${KEY_VARIABLE} by EnvironmentFile=",
        )
    words = _kept(ours, valued) + list(arguments[len(ours) :])
    settings = [_assignment(key, environ[key]) for key in sorted(environ) if _counts(key)]
    program = _quoted(sys.executable)  # a path: no variables are replaced in it
    exec_start = " ".join((program, *(_word(word) for word in ("-P", "-m", "mgpu", *words))))
    lines = (
        "[Unit]",
        f"Description=mgpu: {_plain(name)}",
        "StartLimitIntervalSec=0",  # it may take days until there is room again
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=main",
        "TimeoutStartSec=infinity",
        *_working_directory(),
        *settings,
        f"ExecStart={exec_start}",
        "Restart=on-failure",
        "RestartSec=30",
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


def _kept(words: Sequence[str], valued: Collection[str]) -> list[str]:
    """Without what a unit does by itself; the model by its whole path, as a unit starts elsewhere."""
    kept: list[str] = []
    n_plain = 0
    for option, typed in _told(words, valued):
        n_plain += not option
        if not option and n_plain == _MODEL and Path(typed[0]).exists():
            kept.append(os.path.abspath(typed[0]))  # noqa: PTH100 - links stay
        elif option not in _DROPPED:
            kept += typed
    return kept


def _told(words: Sequence[str], valued: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """Options with the words they were typed in, their value's among them; the option of plain words is empty."""
    rest = iter(words)
    for word in rest:
        option, has_value, _ = word.partition("=")
        if not word.startswith("-"):
            yield "", [word]
        elif option in valued and not has_value:
            yield option, [word, *itertools.islice(rest, 1)]
        else:
            yield option, [word]


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
