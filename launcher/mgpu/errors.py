"""Every way mgpu can end, as an exception with its exit code. Caught once, in `mgpu.cli.main`."""

from __future__ import annotations

from typing import ClassVar


class MgpuError(Exception):
    """One line that says what is wrong, with the offending value, and one that says what to do."""

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "bug"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


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
    """The runtime did not start, or died. `log_tail` holds its last lines."""

    exit_code = 7
    code = "runtime-failed"

    def __init__(self, message: str, *, hint: str = "", log_tail: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint=hint)
        self.log_tail = log_tail


class ProfileError(MgpuError):
    """A rig profile cannot be read, or does not match this machine."""

    exit_code = 8
    code = "profile"


class InterruptedLaunchError(MgpuError):
    """The person (or the system) asked us to stop: Ctrl-C, SIGTERM, a closed terminal."""

    exit_code = 130
    code = "interrupted"
