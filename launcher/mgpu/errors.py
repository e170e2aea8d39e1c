"""Every way mgpu can end, as an exception with its exit code. Caught once, in `mgpu.cli.main`."""

from __future__ import annotations

from typing import ClassVar, Final

import msgspec

#: What msgspec raises for a text that is not what it should be: bytes that are no UTF-8, brackets without end, too.
UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

#: Characters of a message and of a hint, at most: what is wrong is said in a line that a person reads.
_MOST_MESSAGE: Final = 480
_MOST_HINT: Final = 900


class MgpuError(Exception):
    """One line that says what is wrong, with the offending value, and one that says what to do.

    Values come from files, programs and the network: whatever is in them, a line stays one line, and is printable.
    """

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "bug"

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message = one_line(message, _MOST_MESSAGE)
        self.hint = one_line(hint, _MOST_HINT)
        super().__init__(self.message)


class UsageError(MgpuError):
    """The command line asks for something that has no meaning."""

    exit_code = 2
    code = "usage"


class RefusedError(MgpuError):
    """A rule refuses the plan; `--force` overrides."""

    exit_code = 3
    code = "refused"


class BadModelError(MgpuError):
    """The model file cannot be read, or is not whole."""

    exit_code = 4
    code = "bad-model"


class DoesNotFitError(MgpuError):
    """No allowed placement has the memory; says by how much, and what would fit."""

    exit_code = 5
    code = "does-not-fit"


class RuntimeMissingError(MgpuError):
    """The runtime is not installed or too old; says the install command."""

    exit_code = 6
    code = "runtime-missing"


class RuntimeFailedError(MgpuError):
    """The runtime did not start, or died. `log_tail` holds its last lines; `report`: the file that has all of it."""

    exit_code = 7
    code = "runtime-failed"

    def __init__(self, message: str, *, hint: str = "", log_tail: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint=hint)
        self.log_tail = log_tail
        self.report = ""


class OutOfMemoryError(RuntimeFailedError):
    """The runtime found less memory than was planned with. `devices`: where, by its own names, if it says so.

    `wanted_bytes`: what it asked for in vain; 0 when that is not known. `held_bytes`: what it had there by then.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        log_tail: tuple[str, ...] = (),
        devices: tuple[str, ...] = (),
        wanted_bytes: int = 0,
        held_bytes: int = 0,
    ) -> None:
        super().__init__(message, hint=hint, log_tail=log_tail)
        self.devices = devices
        self.wanted_bytes = wanted_bytes
        self.held_bytes = held_bytes


class ProfileError(MgpuError):
    """A rig profile cannot be read, or does not match this machine."""

    exit_code = 8
    code = "profile"


class InterruptedLaunchError(MgpuError):
    """The person (or the system) asked us to stop: Ctrl-C, SIGTERM, a closed terminal."""

    exit_code = 130
    code = "interrupted"


def one_line(text: str, most: int) -> str:
    """`text` as it can be printed in one line of at most `most` characters: of a long one, both ends.

    Control characters, bytes that are no text and marks that turn the reading direction are escaped.
    """
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() else _escaped(letter) for letter in text[: 2 * most])
    return text if len(text) <= most else f"{text[: 2 * most // 3]}…{text[-most // 4 :]}"


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
