"""Start, wait until ready, answer or stay, stop: one launch from its command to its exit code."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NoReturn, TextIO

from msgspec import Struct

from mgpu.adapter import Adapter, Buffer, Command
from mgpu.errors import InterruptedLaunchError, RuntimeFailedError
from mgpu.launch.ask import print_answer
from mgpu.launch.care import Care
from mgpu.launch.ports import FIRST_PORT, is_free
from mgpu.launch.process import Child
from mgpu.launch.progress import LoadingLine, say
from mgpu.launch.ready import Loading, wait_ready
from mgpu.launch.signals import StopSignals, entered
from mgpu.launch.watch import Watch
from mgpu.service import Attachment

_PORT_TRIES: Final = 3

#: What to do with a runtime that is ready: its command, its log so far, and who may want it stopped.
Task = Callable[[Command, Watch, StopSignals], None]


class Launch(Struct, frozen=True, kw_only=True):
    """What to launch and how. `command_for` is called with the port; `environ` is what `Command.env` is set on top of.

    `port` None: a free one from 8080 up. `prompt`: answer this one question instead of staying; `task`: do this.
    `expected_bytes` is what loading will read, for the progress line; `on_loading` takes that line's place.
    """

    command_for: Callable[[int], Command]
    adapter: Adapter
    environ: Mapping[str, str]
    log_path: Path
    host: str = "127.0.0.1"
    port: int | None = None
    api_key: str | None = None
    expected_bytes: int = 0
    prompt: str | None = None
    task: Task | None = None
    on_loading: Callable[[Loading], None] | None = None
    care: Care = Care()


class Ready(Struct, frozen=True, kw_only=True):
    """A runtime that answers. `seconds` from its start; `buffers` as its log printed them, in that order.

    `proven`: it has generated a token; False when it said that it cannot be asked (a key of its own, embeddings only).
    """

    command: Command
    port: int
    pid: int
    seconds: float
    buffers: tuple[Buffer, ...]
    log_path: Path
    proven: bool


class _PortTakenError(Exception):
    """The port was free when we looked, and somebody else's when the runtime bound it."""


def serve(
    launch: Launch,
    *,
    on_ready: Callable[[Ready], None],
    stop: StopSignals | None = None,
    out: TextIO | None = None,
    err: TextIO | None = None,
) -> int:
    """Run `launch` in the foreground of the main thread; whatever happens, nothing of it runs afterwards.

    `stop`: already entered, by whoever goes on afterwards.

    Returns 0 after a `prompt` was answered or a `task` done. Else it ends with `InterruptedLaunchError` (SIGINT,
    SIGTERM, SIGHUP; a second one kills at once), or with `RuntimeFailedError` when the runtime does not start or dies.
    """
    out, err = out or sys.stdout, err or sys.stderr
    start, tries = FIRST_PORT, 0
    with entered(stop) as heard:
        while True:
            port = launch.care.port(launch.host, launch.port, start)
            heard.check()
            tries += 1
            try:
                may_move = launch.port is None and tries < _PORT_TRIES
                _Session(launch, port, heard, err).run(on_ready, out, may_move=may_move)
            except _PortTakenError:
                start = port + 1
            else:
                return 0


class _Session:
    """One try of a launch on one port."""

    def __init__(self, launch: Launch, port: int, stop: StopSignals, err: TextIO) -> None:
        self.launch = launch
        self.port = port
        self.stop = stop
        self.err = err
        self.command = launch.command_for(port)

    def run(self, on_ready: Callable[[Ready], None], out: TextIO, *, may_move: bool) -> None:
        """Raises `_PortTakenError` only if `may_move`."""
        launch, command = self.launch, self.command
        write_files(command.files)
        started = time.monotonic()
        launch.care.starting(command)
        child = Child.of(command, launch.environ, launch.log_path)
        try:
            launch.care.started(child)
            with Watch(child, launch.adapter) as watch:
                proven = self._load(watch, may_move=may_move)

                def ready(*, proven: bool) -> None:
                    on_ready(self._ready(watch, time.monotonic() - started, proven=proven))

                if command.attachment is not None:
                    self._attach(command.attachment, watch, out, lambda _: ready(proven=True))
                else:
                    ready(proven=proven)
                    self._use(watch, out)
        except InterruptedLaunchError:
            say(self.err, f"stopping {child.name} (once more: kill it)")
            raise
        finally:
            self._end(child)

    def _attach(self, attachment: Attachment, watch: Watch, out: TextIO, on_ready: Callable[[float], None]) -> None:
        """What runs has no model yet: it is made ready, used and given back first."""
        from mgpu.launch.attach import use  # with hashlib and http.client: for services alone

        use(
            attachment,
            stop=self.stop,
            out=out,
            err=self.err,
            prompt=self.launch.prompt,
            on_ready=on_ready,
            watch=watch,
            tend=lambda: self._tend(watch),
            loading=lambda: self.launch.care.loading([(watch, self.command)]),
        )

    def _use(self, watch: Watch, out: TextIO) -> None:
        launch = self.launch
        if launch.task is not None:
            launch.task(self.command, watch, self.stop)
        elif launch.prompt is not None:
            print_answer(launch.prompt, self.command, api_key=launch.api_key, watch=watch, stop=self.stop, out=out)
        else:
            self._stay(watch)

    def _load(self, watch: Watch, *, may_move: bool) -> bool:
        launch, line = self.launch, LoadingLine(self.err, expected_bytes=self.launch.expected_bytes)
        told = launch.on_loading or line

        def on_progress(loading: Loading) -> None:
            launch.care.loading([(watch, self.command)])
            told(loading)

        try:
            return wait_ready(watch, self.command, stop=self.stop, api_key=launch.api_key, on_progress=on_progress)
        except RuntimeFailedError as error:
            ended = watch.child.poll() is not None
            if may_move and (watch.lost_port or (ended and not is_free(self.launch.host, self.port))):
                raise _PortTakenError from error
            raise
        finally:
            line.close()

    def _ready(self, watch: Watch, seconds: float, *, proven: bool) -> Ready:
        return Ready(
            command=self.command,
            port=self.port,
            pid=watch.child.pid,
            seconds=seconds,
            buffers=tuple(watch.buffers),
            log_path=self.launch.log_path,
            proven=proven,
        )

    def _stay(self, watch: Watch) -> NoReturn:
        """Until it dies or we are asked to stop: both end in an exception."""
        while watch.child.poll() is None:
            self.stop.check()
            self.stop.wait(self._tend(watch))
        self.stop.check()
        raise watch.death("while it was serving")

    def _tend(self, watch: Watch) -> float | None:
        return self.launch.care.tend([(watch, self.command)], self.stop)

    def _end(self, child: Child) -> None:
        if child.stop(hurried=lambda: self.stop.hurried) is None:
            say(self.err, f"process {child.pid} does not end, even killed: it is stuck inside a driver or a disk")


def write_files(files: Mapping[str, str]) -> None:
    """What the runtime reads beside its arguments: paths to texts. Relative ones are `Child.of`'s."""
    for name, text in files.items():
        path = Path(name)
        if not path.is_absolute():
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise RuntimeFailedError(
                f"cannot write {path}, which the runtime needs: {error.strerror}", hint="make its directory writable"
            ) from error
