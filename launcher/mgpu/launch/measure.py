"""How fast a runtime that is ready generates, by its own clock: llama-server tells it with each answer.

The server alone, and not llama-bench beside it: it is what `mgpu run` starts, wherever it was found, it places the
model by the very flags of the plan, and its timings are taken around the same decoding.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from mgpu.adapter import Command
from mgpu.errors import UNREADABLE, RuntimeFailedError
from mgpu.launch.background import Background
from mgpu.launch.client import MAX_BODY, Client
from mgpu.launch.ready import explain
from mgpu.launch.serve import Task
from mgpu.launch.signals import StopSignals
from mgpu.launch.stream import LostError, error_message
from mgpu.launch.watch import Watch
from mgpu.launch.wire import read_whole

_TICK_S: Final = 0.1
_ANSWER_S: Final = 3600.0  # nothing comes before the whole answer, which a CPU may take half an hour for
_ENOUGH_S: Final = 60.0  # repetitions after this much measuring would tell little more
_WARM_UP_TOKENS: Final = 8
_LEAST_MS: Final = 1e-3  # its clock has microseconds
_OK: Final = 200


class Load(Struct, frozen=True, kw_only=True):
    """What is asked of the runtime, `repetitions` times: `n_prompt` tokens read, then `n_gen` generated."""

    n_prompt: int
    n_gen: int
    repetitions: int
    n_vocab: int

    @property
    def depth(self) -> int:
        """Tokens in the cache while generating, on average."""
        return self.n_prompt + self.n_gen // 2


class Timing(Struct, frozen=True, kw_only=True):
    """One repetition of `load`, in tokens per second. `last`: it was the last one of that load."""

    load: Load
    tok_s: float
    prompt_tok_s: float | None
    last: bool = False


def timing_task(loads: Sequence[Load], *, on_timing: Callable[[Timing], None], on_tick: Callable[[], None]) -> Task:
    """What `serve` is to do with the runtime: each load, after a warm-up. `on_tick`: for who shows that time goes by.

    A load ends early when its repetitions so far took a minute; one after the first is left out when a single
    repetition would. The task raises `RuntimeFailedError` when the runtime dies, refuses or answers without timings,
    `InterruptedLaunchError` on a stop signal.
    """

    def task(command: Command, watch: Watch, stop: StopSignals) -> None:
        client = _Timer(command)
        asking = Background(client.timings(loads), stop.wake)
        try:
            while True:
                stop.check()
                done = asking.done  # read before `take`: nothing comes between the two when it is true
                timings = asking.take()
                for timing in timings:
                    on_timing(timing)
                if done and not timings:
                    return
                stop.wait(_TICK_S)
                on_tick()
        except RuntimeFailedError as error:
            raise explain(error, watch, stop) from error
        finally:
            client.abort()  # llama-server does not end while somebody waits for an answer

    return task


class _Timer(Client):
    """A client that asks for tokens nobody reads."""

    def __init__(self, command: Command) -> None:
        super().__init__(command, api_key=None)

    def timings(self, loads: Sequence[Load]) -> Iterator[Timing]:
        """One for each repetition, after a warm-up that is not counted."""
        draw = random.Random(0)  # noqa: S311 - the same prompts each time, in nobody's interest to guess
        self._time(draw, replace(loads[0], n_gen=min(_WARM_UP_TOKENS, loads[0].n_gen)))
        seen: Timing | None = None
        for load in loads:
            if seen is not None and _seconds(load, seen) > _ENOUGH_S:
                return
            started = time.monotonic()
            for left in reversed(range(load.repetitions)):
                seen = self._time(draw, load)
                last = left == 0 or time.monotonic() - started > _ENOUGH_S
                yield replace(seen, last=last)
                if last:
                    break

    def _time(self, draw: random.Random, load: Load) -> Timing:
        body = {
            "prompt": _tokens(draw, load),
            "n_predict": load.n_gen,
            "cache_prompt": False,
            "ignore_eos": True,
            "temperature": 0,
        }
        try:
            with self._request("POST", self._completion_url, body, _ANSWER_S) as response:
                return _read(response.status, read_whole(response, MAX_BODY), load)
        except TimeoutError as error:
            raise RuntimeFailedError(f"did not answer within {_ANSWER_S:.0f} s") from error
        except (OSError, HTTPException) as error:
            raise LostError("broke off a measurement") from error


_Count = Annotated[int, Meta(ge=0, le=1 << 40)]


class _Timings(Struct, frozen=True):
    """llama.cpp b11434 tools/server/server-common.cpp, server_slot_stats::to_json."""

    predicted_n: _Count
    predicted_ms: float
    prompt_n: _Count = 0
    prompt_ms: float = 0.0


class _Completion(Struct, frozen=True):
    timings: _Timings


def _tokens(draw: random.Random, load: Load) -> list[int]:
    """A prompt of random tokens, as llama-bench reads: no two are alike, so nothing of one is cached for the next."""
    return [draw.randrange(load.n_vocab) for _ in range(load.n_prompt)]


def _seconds(load: Load, seen: Timing) -> float:
    """What one repetition would take, at the speed seen with another load."""
    return load.n_prompt / (seen.prompt_tok_s or seen.tok_s) + load.n_gen / seen.tok_s


def _read(status: int, body: bytes, load: Load) -> Timing:
    """The timings in an answer. Raises `RuntimeFailedError` for one that has none, or that stopped short."""
    if status != _OK:
        raise RuntimeFailedError(f"answered a measurement with HTTP {status}: {error_message(body)}")
    try:
        timings = msgspec.json.decode(body, type=_Completion).timings
    except UNREADABLE as error:
        raise RuntimeFailedError(f"answered a measurement without timings: {body[:80]!r}") from error
    # The first token comes with the prompt; the figure per second of older builds counts it as a step all the same.
    steps = timings.predicted_n - 1
    if timings.predicted_n < load.n_gen or steps < 1 or timings.predicted_ms < _LEAST_MS:
        took = f"{timings.predicted_n} of {load.n_gen} tokens in {timings.predicted_ms:g} ms"
        raise RuntimeFailedError(f"generated {took}")
    read = timings.prompt_n > 0 and timings.prompt_ms >= _LEAST_MS
    prompt_tok_s = timings.prompt_n / timings.prompt_ms * 1000 if read else None
    return Timing(load=load, tok_s=steps / timings.predicted_ms * 1000, prompt_tok_s=prompt_tok_s)
