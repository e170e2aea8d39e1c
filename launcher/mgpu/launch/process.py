"""One runtime as a process: started in a session of its own, stopped with everything it started."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self

from mgpu.adapter import Command
from mgpu.errors import MgpuError, RuntimeFailedError, RuntimeMissingError
from mgpu.launch.leftovers import Leftovers
from mgpu.launch.oom_killer import has_killed, kills
from mgpu.launch.scratch import Scratch
from mgpu.request import KEY_VARIABLE

GRACE_S: Final = (
    5.0  # from SIGTERM to SIGKILL: a batch is finished, tens of GiB are freed; readers can delay it for ever
)
_STRAGGLERS_S: Final = 1.0  # for grandchildren, once their parent has gone
_KILL_S: Final = 5.0  # after SIGKILL; a process inside a driver call can outlast it
_POLL_S: Final = 0.01
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


class Child:
    """A started runtime. `stop` is safe to call in every state, any number of times."""

    def __init__(self, process: subprocess.Popen[bytes], name: str, log_path: Path, log_start: int) -> None:
        self._process = process
        self.name = name
        self.log_path = log_path
        self.log_start = log_start  # where its own lines begin, after those of an earlier try
        self.leftovers = Leftovers()
        self.scratch = Scratch()
        self._known: Any = None  # a Tree: psutil is not imported before it is needed
        self._kills = kills()

    @classmethod
    def start(
        cls,
        argv: tuple[str, ...],
        env: Mapping[str, str],
        log_path: Path,
        *,
        tied: bool = True,
        directory: str | None = None,
    ) -> Self:
        """Start `argv` with stdin from /dev/null and both outputs appended to `log_path`.

        The outputs go to a file, not a pipe: nothing blocks or breaks in the runtime when mgpu dies.
        A session of its own keeps the terminal's Ctrl-C away from it. `tied`: it gets SIGTERM when mgpu dies (Linux).
        Raises `RuntimeMissingError` when the executable cannot run, `RuntimeFailedError` for anything else.
        """
        name = Path(argv[0]).name
        try:
            log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise RuntimeFailedError(
                f"cannot write the log {log_path}: {error.strerror}", hint="set XDG_STATE_HOME to a writable directory"
            ) from error
        log_start = os.fstat(log).st_size
        try:
            process = subprocess.Popen(
                argv,
                env=dict(env),
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent() if tied else None,  # noqa: PLW1509  # see die_with_parent
            )
        except OSError as error:
            raise _cannot_start(argv[0], error) from error
        finally:
            os.close(log)
        return cls(process, name, log_path, log_start)

    @classmethod
    def of(cls, command: Command, environ: Mapping[str, str], log_path: Path) -> Self:
        """Start what `command` says among its own files, and remember what it may leave behind. Raises as `start`."""
        env = environment(command, environ)
        scratch = Scratch(command.files)
        try:
            child = cls.start((*command.argv, *command.watch_argv), env, log_path, directory=scratch.directory)
        except MgpuError:
            scratch.remove()
            raise
        child.name = command.name or child.name
        child.scratch = scratch
        child.leftovers = Leftovers(command.leaves, command.after, env)
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def was_short_of_ram(self) -> bool:
        """Whether the kernel has ended it for want of RAM: that cannot be seen from its end, but it keeps count."""
        return self.poll() == -signal.SIGKILL and has_killed(self._kills)

    def family(self) -> tuple[int, ...]:
        """Its pid and those of its descendants, whom `stop` ends even if it has died before them."""
        from mgpu.launch.tree import Tree  # psutil: 12 ms, and not before the runtime has started

        self._known = Tree(self.pid)
        return (self.pid, *self._known.pids)

    def stop(self, *, grace_s: float = GRACE_S, hurried: Callable[[], bool] = lambda: False) -> int | None:
        """SIGTERM, wait, SIGKILL: to the whole group, and to descendants that left it. Never raises.

        As soon as `hurried()` is true the waiting ends. Returns the exit code; None if even SIGKILL did not end it.
        """
        from mgpu.launch.tree import Tree  # psutil: 12 ms, and not before the runtime has started

        family = Tree(self.pid, self._known)
        code = self.poll()
        self.leftovers.look((self.pid, *family.pids))

        def any_left() -> bool:
            return self._signal_group(0) or family.any_alive()

        if not hurried():
            self._signal_group(signal.SIGTERM)
            _wait_until(lambda: self.poll() is not None or hurried(), grace_s)
            if self.poll() is not None:
                _wait_until(lambda: not any_left() or hurried(), _STRAGGLERS_S)
        self._signal_group(signal.SIGKILL)
        family.kill()
        _wait_until(lambda: self.poll() is not None, _KILL_S)
        _wait_until(lambda: not family.any_alive(), _STRAGGLERS_S)  # a killed process goes when it is scheduled
        self.leftovers.clear(by_itself=code is not None and code >= 0)
        self.scratch.remove()
        return self.poll()

    def _signal_group(self, number: int) -> bool:
        """Whether there was a process in the group to receive it."""
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):  # macOS says EPERM for a group of zombies
            return False
        return True


def environment(command: Command, environ: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment without the variables that `command.scrub` prefixes name, then `command.env` on top."""
    kept = {name: value for name, value in environ.items() if not name.startswith(command.scrub)}
    kept.pop(KEY_VARIABLE, None)  # for us: the runtime has it, if it wants it, by a name of its own
    return kept | dict(command.env)


def describe_exit(code: int) -> str:
    """`-9` as "was killed by SIGKILL (out of memory?)", `1` as "exited with status 1"."""
    if code >= 0:
        return f"exited with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    guess = {
        "SIGKILL": " (out of memory?)",
        "SIGILL": " (built for another processor?)",
        "SIGABRT": " (it aborted itself)",
        "SIGSEGV": " (it crashed)",
        "SIGBUS": " (the model file changed or its disk failed?)",
    }
    return f"was killed by {name}{guess.get(name, '')}"


def die_with_parent() -> Callable[[], None] | None:
    """A `preexec_fn`: what the child runs between fork and exec so that the kernel ends it with us. Linux only.

    Alternatives: `setpriv --pdeathsig` is missing on many systems, a Python shim costs 20 ms and a process.
    A preexec_fn is dangerous when it takes locks; this one makes two system calls through a function that was
    loaded before the fork, with the GIL held (PyDLL). The kernel ties the child to the *thread* that forks it:
    start runtimes from the main thread.
    """
    if sys.platform != "linux":
        return None
    import ctypes  # 3 ms, and not needed elsewhere

    prctl = ctypes.PyDLL(None).prctl
    request, number = ctypes.c_int(_PR_SET_PDEATHSIG), ctypes.c_ulong(signal.SIGTERM)
    parent = os.getpid()

    def tie() -> None:
        prctl(request, number)
        if os.getppid() != parent:  # we died before prctl: no signal will come
            os._exit(1)

    return tie


def _cannot_start(executable: str, error: OSError) -> RuntimeMissingError | RuntimeFailedError:
    if error.errno in {errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR}:
        return RuntimeMissingError(
            f"cannot run {executable}: {error.strerror}", hint="`mgpu runtimes` lists what is installed"
        )
    return RuntimeFailedError(f"cannot start {executable}: {error.strerror}", hint="`--dry-run` shows the command")


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
