"""How a runtime is timed: its own clock, so many repetitions, and what an answer must say."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.adapter import Command
from mgpu.errors import RuntimeFailedError
from mgpu.launch import measure
from mgpu.launch.measure import Load, Timing

SHORT = Load(n_prompt=512, n_gen=128, repetitions=3, n_vocab=1000)
DEEP = Load(n_prompt=4032, n_gen=128, repetitions=2, n_vocab=1000)
NOWHERE = Command(
    argv=("x",), env={}, scrub=(), files={}, ready_url="http://[::1]:9/health", endpoint="http://[::1]:9/v1"
)


class Paced(measure._Timer):
    """A client of a runtime at this speed, on a clock that only answers move."""

    def __init__(self, tok_s: float, prompt_tok_s: float | None) -> None:
        super().__init__(NOWHERE)
        self.tok_s = tok_s
        self.prompt_tok_s = prompt_tok_s
        self.now = 0.0
        self.asked: list[Load] = []

    def _time(self, draw: random.Random, load: Load) -> Timing:
        self.asked.append(load)
        self.now += load.n_prompt / (self.prompt_tok_s or self.tok_s) + load.n_gen / self.tok_s
        return Timing(load=load, tok_s=self.tok_s, prompt_tok_s=self.prompt_tok_s)


def timings(monkeypatch: pytest.MonkeyPatch, client: Paced, *loads: Load) -> list[Timing]:
    monkeypatch.setattr("time.monotonic", lambda: client.now)
    return list(client.timings(loads))


class TestRepetitions:
    def test_each_load_so_often_after_one_warm_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        client = Paced(100, 2000)
        found = timings(monkeypatch, client, SHORT, DEEP)
        assert [timing.load for timing in found] == [SHORT] * 3 + [DEEP] * 2
        assert [timing.last for timing in found] == [False, False, True, False, True]
        assert len(client.asked) == len(found) + 1
        assert (client.asked[0].n_prompt, client.asked[0].n_gen) == (512, 8)

    def test_a_minute_is_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = timings(monkeypatch, Paced(4, 20), SHORT)  # 58 s each
        assert [timing.last for timing in found] == [False, True]

    def test_once_at_least(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert [timing.last for timing in timings(monkeypatch, Paced(0.1, 0.5), SHORT)] == [True]

    @pytest.mark.parametrize("prompt_tok_s", [20.0, None])
    def test_what_would_take_more_than_a_minute_for_once_is_left_out(
        self, monkeypatch: pytest.MonkeyPatch, prompt_tok_s: float | None
    ) -> None:
        assert {timing.load for timing in timings(monkeypatch, Paced(10, prompt_tok_s), SHORT, DEEP)} == {SHORT}


def test_depth_is_what_generating_sees_on_average() -> None:
    assert SHORT.depth == 576
    assert DEEP.depth == 4096


class TestAnswer:
    def test_the_first_token_is_no_step(self) -> None:
        answer = {"timings": {"predicted_n": 128, "predicted_ms": 1270.0, "prompt_n": 512, "prompt_ms": 256.0}}
        timing = measure._read(200, json.dumps(answer).encode(), SHORT)
        assert timing.tok_s == pytest.approx(100)
        assert timing.prompt_tok_s == pytest.approx(2000)

    @pytest.mark.parametrize(
        ("status", "body", "words"),
        [
            (500, b'{"error": {"message": "context is full"}}', "HTTP 500: context is full"),
            (200, b'{"content": ""}', "without timings"),
            (200, b"<html>", "without timings"),
            (200, b'{"timings": {"predicted_n": "128", "predicted_ms": 1}}', "without timings"),
            (200, b'{"timings": {"predicted_n": 100, "predicted_ms": 1}}', "generated 100 of 128 tokens"),
            (200, b'{"timings": {"predicted_n": 128, "predicted_ms": 0}}', "generated 128 of 128 tokens in 0 ms"),
        ],
    )
    def test_refused(self, status: int, body: bytes, words: str) -> None:
        with pytest.raises(RuntimeFailedError, match=words):
            measure._read(status, body, SHORT)

    @given(
        body=st.binary(max_size=40)
        | st.fixed_dictionaries(
            {},
            optional={
                name: st.integers() | st.floats() | st.none() | st.text(max_size=3)
                for name in ("predicted_n", "predicted_ms", "prompt_n", "prompt_ms")
            },
        ).map(lambda timings: json.dumps({"timings": timings}).encode()),
        status=st.sampled_from([200, 200, 400, 503]),
    )
    def test_whatever_it_says(self, body: bytes, status: int) -> None:
        try:
            timing = measure._read(status, body, SHORT)
        except RuntimeFailedError:
            return
        assert status == 200
        assert 0 < timing.tok_s < float("inf")
        assert timing.prompt_tok_s is None or 0 < timing.prompt_tok_s < float("inf")


def test_no_two_prompts_are_alike() -> None:
    draw = random.Random(0)
    prompts = [measure._tokens(draw, SHORT) for _ in range(4)]
    assert all(len(prompt) == 512 for prompt in prompts)
    assert all(0 <= token < 1000 for prompt in prompts for token in prompt)
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 4
