"""One question to a runtime that is ready; its answer on stdout as it comes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Final, TextIO

from mgpu.adapter import Command
from mgpu.errors import RuntimeFailedError
from mgpu.launch.background import Background
from mgpu.launch.ready import explain
from mgpu.launch.signals import StopSignals
from mgpu.launch.stream import Piece
from mgpu.launch.watch import Watch

_TICK_S: Final = 0.1


def print_answer(  # noqa: PLR0913 - one call, by keyword, from a session that holds them all
    prompt: str,
    command: Command,
    *,
    api_key: str | None,
    watch: Watch,
    stop: StopSignals,
    out: TextIO,
    others: Sequence[Watch] = (),
) -> None:
    """Ask once, write the pieces to `out` as they come, end with a newline. `others` stand behind the one we ask.

    Reasoning is left out, unless there is nothing else. A reader that goes away (`| head`) ends it quietly.
    Raises `RuntimeFailedError` when the runtime dies or refuses, `InterruptedLaunchError` on a stop signal.
    """
    from mgpu.launch.client import Client  # http.client: imported by then, by `wait_ready`

    client = Client(command, api_key)
    try:
        answered = False
        reasoning: list[str] = []
        for piece in _as_they_come(client.answer(prompt), watch, stop, others):
            if piece.reasoning:
                reasoning.append(piece.text)
            else:
                answered = True
                write_text(out, piece.text)
        write_text(out, "\n" if answered else f"{''.join(reasoning)}\n")
    except BrokenPipeError:
        discard(out)
    finally:
        client.abort()  # llama-server does not end while somebody reads an answer


def _as_they_come(answer: Iterator[Piece], watch: Watch, stop: StopSignals, others: Sequence[Watch]) -> Iterator[Piece]:
    """The pieces of `answer`, which is read in a thread of its own."""
    asking = Background(answer, stop.wake)
    while True:
        stop.check()
        done = asking.done  # read before `take`: nothing comes between the two when it is true
        try:
            pieces = asking.take()
        except RuntimeFailedError as error:
            raise explain(error, watch, stop, others) from error
        yield from pieces
        if not pieces:
            if done:
                return
            stop.wait(_TICK_S)


def write_text(out: TextIO, text: str) -> None:
    """Characters that the terminal's encoding lacks become "?"."""
    encoding = out.encoding or "utf-8"
    out.write(text.encode(encoding, "replace").decode(encoding))
    out.flush()


def discard(out: TextIO) -> None:
    """Send what is still buffered nowhere, or Python would complain about it at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, out.fileno())
    os.close(nowhere)
