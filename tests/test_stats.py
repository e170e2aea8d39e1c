"""The tally of work: speeds over all requests and lately, whatever the counters do."""

from __future__ import annotations

import math
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.adapter import Served, Stats
from mgpu.launch.records import Work
from mgpu.launch.stats import WINDOW_S, Tally

BEAT = 15.0


def run(tally: Tally, counters: list[int], *, start: float = 0.0) -> None:
    for beat, generated in enumerate(counters):
        tally.see(Stats(generated=generated, running=1, waiting=0), start + beat * BEAT)


def test_nothing_told_is_nothing_known() -> None:
    assert Tally().work() == Work()
    assert not Tally().is_working


def test_requests_of_the_log() -> None:
    tally = Tally()
    tally.add(Served(n_tokens=100, seconds=2.0), 10.0)
    tally.add(Served(n_tokens=50, seconds=0.5), 20.0)
    work = tally.work(70.0)
    assert work.requests == 2
    assert work.tok_s == pytest.approx(60.0)
    assert work.lately == pytest.approx(150 / 60)
    assert tally.work(1000.0).lately == 0


def test_lately_is_the_last_minute_by_the_clock() -> None:
    tally = Tally()
    run(tally, [1000, 1150, 1300, 1450, 1600])
    assert tally.work().lately == pytest.approx(10.0)
    run(tally, [1600] * 5, start=75.0)
    assert tally.work().lately == 0
    assert not math.isnan(tally.work().lately or 0)


def test_what_was_counted_before_the_first_look_is_not_lately() -> None:
    tally = Tally()
    run(tally, [5_000_000, 5_000_150])
    assert tally.work().lately == pytest.approx(10.0)


def test_counters_that_go_back_count_on() -> None:
    tally = Tally()
    for beat, (tokens, seconds) in enumerate([(100, 2.0), (300, 6.0), (50, 1.0), (100, 2.0)]):
        tally.see(Stats(generated=tokens, generating_s=seconds), beat * BEAT)
    work = tally.work()
    assert work.tok_s == pytest.approx(50.0)
    assert work.lately == pytest.approx((200 + 50 + 50) / 45)


def test_replicas_are_summed_and_one_that_is_silent_counts_on_later() -> None:
    tally = Tally()
    for beat in range(5):
        now = beat * BEAT
        tally.see(Stats(generated=150 * beat, running=1, waiting=2), now, "GPU 0")
        if beat != 2:
            tally.see(Stats(generated=300 * beat, running=1), now, "GPU 1")
    work = tally.work()
    assert (work.running, work.waiting) == (2, 2)
    assert work.lately == pytest.approx(30.0)


def test_unnamed_sources_are_told_apart_by_their_order() -> None:
    tally = Tally()
    for beat in range(3):
        tally.see(Stats(generated=1000 + 150 * beat, running=0), beat * BEAT)
        tally.see(Stats(generated=9000 + 150 * beat, running=3), beat * BEAT)
    assert tally.work().lately == pytest.approx(20.0)
    assert tally.work().running == 3


def test_is_working() -> None:
    tally = Tally()
    tally.see(Stats(generated=0, running=0, waiting=0), 0.0)
    assert not tally.is_working
    tally.see(Stats(generated=0, running=0, waiting=1), 15.0)
    assert tally.is_working
    tally.see(Stats(generated=9, running=0, waiting=0), 30.0)
    assert tally.is_working  # between two looks
    tally.see(Stats(generated=9, running=0, waiting=0), 45.0)
    assert not tally.is_working


def test_counters_too_coarse_give_way_to_the_log() -> None:
    """llama-server prints 123456789 as 1.23457e+08: six digits."""
    tally = Tally()
    for beat in range(5):
        exact = 123_456_000 + 150 * beat
        tally.add(Served(n_tokens=150, seconds=10.0), beat * BEAT)
        tally.see(Stats(generated=int(float(f"{exact:.6g}"))), beat * BEAT)
    assert tally.work().lately == pytest.approx(150 * 5 / WINDOW_S)


def test_a_clock_that_goes_back_begins_anew() -> None:
    tally = Tally()
    run(tally, [0, 150, 300], start=1000.0)
    run(tally, [300, 450], start=0.0)
    assert tally.work().lately == pytest.approx(10.0)


def test_what_we_asked_ourselves_is_no_work() -> None:
    tally = Tally()
    tally.expect(1, 0.0)
    assert not tally.add(Served(n_tokens=1, seconds=0.0), 1.0)
    tally.see(Stats(generated=1, generating_s=0.25, running=0, waiting=0), 15.0)
    assert not tally.is_working
    assert (tally.work(30.0).requests, tally.work(30.0).tok_s, tally.work(30.0).lately) == (None, None, None)
    for number in range(3):
        assert tally.add(Served(n_tokens=20 if number else 1, seconds=1.0), 31.0 + number)
    assert tally.work(40.0).requests == 3


def test_requests_of_others_are_not_taken_for_ours() -> None:
    tally = Tally()
    tally.expect(2, 0.0)
    tally.expect(2, 0.0)
    assert tally.add(Served(n_tokens=2, seconds=0.1), 1.0)  # more than we ask for
    ours = [not tally.add(Served(n_tokens=1, seconds=0.1), 2.0) for _ in range(4)]
    assert ours == [True, True, False, False]
    tally.expect(1, 100.0)
    assert tally.add(Served(n_tokens=1, seconds=0.1), 300.0)  # ours would have come long ago
    tally.expect(1, 300.0, within_s=120.0)
    assert not tally.add(Served(n_tokens=1, seconds=0.1), 420.0)


def test_counters_have_more_than_our_own_token_in_them() -> None:
    tally = Tally()
    tally.expect(1, 0.0)
    tally.see(Stats(generated=101, generating_s=2.0, running=0), 15.0)
    assert tally.has_gained
    assert tally.work().tok_s == pytest.approx(50.0)
    tally.see(Stats(generated=101, generating_s=2.0, running=1), 30.0)
    assert (tally.is_working, tally.has_gained) == (True, False)


def test_months_take_no_memory() -> None:
    tally = Tally()
    tracemalloc.start()
    try:
        for beat in range(2000):
            tally.add(Served(n_tokens=10, seconds=0.1), beat * BEAT)
            tally.see(Stats(generated=beat * 10, running=1), beat * BEAT, f"{beat % 2}")
            if beat == 200:
                before = tracemalloc.get_traced_memory()[0]
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 2048


def test_ever_new_names_take_no_memory() -> None:
    tally = Tally()
    for number in range(2000):
        tally.see(Stats(generated=1), float(number), f"source {number}")
    assert sys.getsizeof(vars(tally)["_sources"]) < 64 * 1024


numbers = st.none() | st.integers(0, 1 << 53)


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e6),
            numbers,
            st.none() | st.floats(0, 1e15),
            numbers,
            st.integers(0, 10**9),
            st.floats(0, 1e9),
        )
    )
)
def test_whatever_is_told_speeds_are_numbers_of_zero_or_more(
    told: list[tuple[float, int | None, float | None, int | None, int, float]],
) -> None:
    tally = Tally()
    for now, generated, seconds, running, n_tokens, took in told:
        tally.see(Stats(generated=generated, generating_s=seconds, running=running), now)
        tally.add(Served(n_tokens=n_tokens, seconds=took), now)
        work = tally.work()
        for speed in (work.tok_s, work.lately):
            assert speed is None or (speed >= 0 and not math.isnan(speed))
    assert tally.work().requests == (len(told) or None)
