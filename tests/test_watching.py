"""A launch looked after for a day in a minute: nothing grows. And what is made of what is seen, whatever that is."""

from __future__ import annotations

import gc
import io
import os
import pathlib
import socket
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launching import House, descriptors, wait_for
from mgpu.adapter import Command, Stats
from mgpu.detect.live import CardNow
from mgpu.errors import RuntimeFailedError
from mgpu.launch.health import BEAT_S, IDLE_S, CardLooker, Look, Looker, Lookers, Looking, Vitals
from mgpu.launch.keeper import Keeper, Kept
from mgpu.launch.notify import notify
from mgpu.launch.process import Child
from mgpu.launch.records import Record
from mgpu.launch.signals import StopSignals
from mgpu.launch.store import enter, launches
from mgpu.launch.watch import Watch
from mgpu.rig import Finding, Gpu
from mgpu.units import MIB
from mgpu_adapters.llamacpp.adapter import LlamaCpp
from planning import decide, rig_named

_DAY_S: Final = 24 * 3600.0
_LOST: Final = CardNow(index=0, lost=Finding(text="GPU 0: it is not on the bus any more", hint="reboot"))
_BLIND: Final = CardNow(index=0, blind=Finding(text="NVIDIA: the driver was changed", hint="reboot"))
_WELL: Final = CardNow(index=0, free_bytes=1, used_bytes=1)


def _all_well(gpus: tuple[Gpu, ...]) -> Iterator[tuple[CardNow, ...]]:
    yield (_WELL,)


class _Watched:
    """A keeper of a runtime that does nothing (`sleep`), whose log, time and looks are the test's."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        looker: Looker,
        stack: ExitStack,
        *,
        cards: CardLooker | None = None,
        ends_unwell: bool = False,
    ) -> None:
        self.now = 0.0
        self.said = io.StringIO()
        self.log = folder / "runtime.log"
        plan = decide(model, "3090")
        gpus = rig_named("3090").gpus
        self.child = Child.start(("sleep", "600"), os.environ, self.log)
        stack.callback(self.child.stop, grace_s=0.1)
        kept = Kept(plan=plan, parts=(plan,), gpus=gpus, adapter=LlamaCpp(), ends_unwell=ends_unwell)
        self.entry = stack.enter_context(enter(Record(name="chat")))
        lookers = Lookers(health=looker, cards=cards or _all_well)
        self.keeper = Keeper(self.entry, kept, self.said, lookers=lookers, clock=lambda: self.now)
        self.watch = stack.enter_context(Watch(self.child, LlamaCpp()))
        self.command = Command(
            argv=("sleep", "600"),
            env={},
            scrub=(),
            files={},
            ready_url="http://127.0.0.1:1",
            endpoint="http://127.0.0.1:1",
        )
        self.stop = stack.enter_context(StopSignals())
        self.keeper.ready("http://127.0.0.1:1/v1", str(self.log))

    def beat(self, seconds: float = BEAT_S) -> None:
        """Time goes on, a look is begun, and taken in."""
        self.now += seconds
        self.tend()
        self.keeper._health.join(10)
        self.keeper.cards.join(0.1)
        self.tend()
        self.stop.wait(0)  # as whoever calls `tend` does

    def tend(self) -> float | None:
        return self.keeper.tend([(self.watch, self.command)], self.stop)

    def write(self, text: str) -> None:
        with self.log.open("a") as log:
            log.write(text)


Make = Callable[..., _Watched]


@pytest.fixture
def watched(tmp_path: Path, header: Callable[[str], Path]) -> Iterator[Make]:
    """`watched(looker)`"""
    with ExitStack() as stack:
        model = header("Qwen2.5-0.5B-Instruct-Q4_K_M")
        yield lambda looker, **more: _Watched(tmp_path, model, looker, stack, **more)


class _Day:
    """What a day's looks are like: mostly well, sometimes silent, blind for a while."""

    def __init__(self) -> None:
        self.n_looks = self.n_card_looks = 0
        self.n_tokens = 0

    def look(self, looking: Looking) -> Iterator[Look]:
        self.n_looks += 1
        self.n_tokens += looking.wants_token
        silent = {looking.asked[0].name: f"no answer, {self.n_looks}"} if self.n_looks % 97 < 3 else {}
        stats = {looking.asked[0].name: Stats(generated=7 * self.n_looks, generating_s=0.1 * self.n_looks, running=1)}
        yield Look(silent=silent, stats=stats, token="" if looking.wants_token else None)

    def cards(self, gpus: tuple[Gpu, ...]) -> Iterator[tuple[CardNow, ...]]:
        self.n_card_looks += 1
        blind = self.n_card_looks % 501 < 20
        yield (_BLIND if blind else CardNow(index=0, used_bytes=self.n_card_looks, by_pid={os.getpid(): 5}),)


def _requests(n: int) -> str:
    """A log's lines of requests answered."""
    return "".join(
        f"slot print_timing: id  0 | task {i} |\n       eval time =     {i + 100}.25 ms /    12 tokens\n"
        for i in range(n)
    )


def test_a_day_of_watching_takes_no_more_memory_than_its_first_hour(watched: Make) -> None:
    day = _Day()
    one = watched(day.look, cards=day.cards)
    hour, n_beats = int(3600 / BEAT_S), int(_DAY_S / BEAT_S)
    marks: list[tuple[int, int, int, int]] = []
    for beat in range(1, n_beats + 1):
        one.write(_requests(20))
        if beat % 500 == 250:
            os.truncate(one.log, one.log.stat().st_size + 12 * MIB)  # ... and much else, in a line without end
        one.beat()
        if beat in {2 * hour, n_beats}:
            gc.collect()
            process = psutil.Process()
            rss = process.memory_info().rss
            marks.append((len(gc.get_objects()), rss, descriptors(os.getpid()), process.num_threads()))
    early, late = marks
    assert late[0] - early[0] < 200
    assert late[1] - early[1] < 16 * MIB
    assert late[2:] == early[2:]
    assert day.n_looks >= n_beats - 1
    assert day.n_card_looks >= 0.99 * n_beats
    assert one.log.stat().st_size <= 64 * MIB
    _assert_no_byte_stays(one)
    (seen,) = launches()
    assert seen.record is not None
    assert seen.record.work.requests is not None
    assert seen.record.work.requests >= 20 * n_beats
    assert len(one.keeper.said) <= 50
    assert seen.record.state == "ready"


def _assert_no_byte_stays(one: _Watched) -> None:
    """Over two more hours, seen closely: that takes its time."""
    tracemalloc.start()
    try:
        sizes = []
        for beat in range(480):
            one.write(_requests(20))
            one.beat()
            if beat in {239, 479}:
                gc.collect()
                sizes.append(_traced_bytes())
    finally:
        tracemalloc.stop()
    assert sizes[1] - sizes[0] < 16 << 10


def _traced_bytes() -> int:
    """Without pathlib's: it interns names, in a table that grows by a jump when it happens to."""
    foreign = tracemalloc.Filter(inclusive=False, filename_pattern=pathlib.__file__)
    return sum(one.size for one in tracemalloc.take_snapshot().filter_traces([foreign]).statistics("filename"))


def test_an_idle_server_is_asked_for_a_token_now_and_then(watched: Make) -> None:
    """Not one that has just worked: a request would take somebody's cache."""
    asked: list[bool] = []

    def look(looking: Looking) -> Iterator[Look]:
        asked.append(looking.wants_token)
        yield Look(token="" if looking.wants_token else None)

    one = watched(look)
    for _ in range(int(4 * IDLE_S / BEAT_S)):
        one.beat()
    assert sum(asked) == 4
    asked.clear()
    for _ in range(int(4 * IDLE_S / BEAT_S)):
        one.write(_requests(1))
        one.beat()
    assert sum(asked) == 0


def test_one_that_does_not_get_well_is_a_failure_where_somebody_starts_it_again(watched: Make) -> None:
    def silent(looking: Looking) -> Iterator[Look]:
        yield Look(silent={"sleep": "no answer within 10 s"})

    patient = watched(silent)
    for _ in range(100):
        patient.beat()
    assert patient.entry.record.state == "unwell"
    strict = watched(silent, ends_unwell=True)
    for _ in range(9):
        strict.beat()  # 120 s after the first of them it may still get well
    with pytest.raises(RuntimeFailedError, match=r"not well for 1\d\d s: sleep: no answer within 10 s"):
        strict.beat()


# --- what is made of it ----------------------------------------------------------------------------------------------

_looks = st.builds(
    Look,
    silent=st.sampled_from([{}, {}, {"a": "no answer"}, {"b": "HTTP 500"}]),
    token=st.sampled_from([None, None, "", "gave no token"]),
)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(_looks, st.sampled_from([(), (_WELL,), (_BLIND,), (_LOST,)])), max_size=60))
def test_vitals_say_what_changes_and_nothing_twice(seen: list[tuple[Look, tuple[CardNow, ...]]]) -> None:
    vitals = Vitals("llama-server")
    told: list[str] = []
    ill = False
    bad = lost = 0
    for number, (one, cards) in enumerate(seen):
        before = vitals.lost
        vitals.see_cards(cards)
        told += vitals.see(one, 15.0 * number)
        bad = bad + 1 if one.silent or one.token else 0
        lost = lost + 1 if _LOST in cards else 0
        ill = bad >= 2
        assert (vitals.unwell_since is not None) == ill
        if ill:
            assert vitals.unwell_since == 15.0 * (number - bad + 1)
        assert vitals.lost is (_LOST.lost if lost >= 2 or before is not None else None)
    kinds = ["not" if line.startswith("not well: ") else "again" for line in told]
    assert kinds == ["not", "again"] * (len(kinds) // 2) + ["not"] * (len(kinds) % 2)
    assert (len(kinds) % 2 == 1) == ill


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([_WELL, _BLIND]), max_size=40))
def test_blindness_is_said_when_it_begins(cards: list[CardNow]) -> None:
    vitals = Vitals("llama-server")
    news = [bool(vitals.see_cards((card,))) for card in cards]
    begins = [card is _BLIND and (not at or cards[at - 1] is _WELL) for at, card in enumerate(cards)]
    assert news == begins


# --- who is told -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_systemd_is_told_once_it_is_ready(house: House) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0mgpu-test-{os.getpid()}")
        listener.settimeout(30)
        running = house.run(env={"NOTIFY_SOCKET": f"@mgpu-test-{os.getpid()}", "FAKE_SERVER": "--load-s 0.5"})
        wait_for(house.runtimes, "never started")
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.recv(100)
        listener.settimeout(30)
        assert listener.recv(100) == b"READY=1"
        assert "ready after" in running.said


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_a_manager_that_does_not_read_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgpu.launch.notify._PATIENCE_S", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        address = f"mgpu-test-{os.getpid()}-full"
        listener.bind(f"\0{address}")
        full = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + 2
        for _ in range(full):
            notify("STATUS=x", {"NOTIFY_SOCKET": f"@{address}"})
        assert listener.recv(100) == b"STATUS=x"


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/socket", "@nobody", "vsock:2:1234"])
def test_where_no_manager_listens_nothing_happens(address: str) -> None:
    notify("READY=1", {"NOTIFY_SOCKET": address})
