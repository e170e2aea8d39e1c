"""Looking after a launch must not end it: drivers that hang, looks that fail, servers that are busy, and what is kept.

Time and most looks are the test's; processes, threads and sockets are real.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest

from mgpu.adapter import Buffer, Command, Served, Stats
from mgpu.detect.live import CardNow
from mgpu.errors import RuntimeFailedError
from mgpu.launch.background import Background
from mgpu.launch.client import Client, LateError
from mgpu.launch.health import (
    BEAT_S,
    IDLE_S,
    TOKEN_S,
    Asked,
    CardLooker,
    Effort,
    Look,
    Looker,
    Lookers,
    Looking,
    Vitals,
    look,
)
from mgpu.launch.keeper import Keeper, Kept, planned_cards
from mgpu.launch.lookout import Lookout
from mgpu.launch.process import Child
from mgpu.launch.records import Card, Record, Work
from mgpu.launch.signals import StopSignals
from mgpu.launch.store import enter
from mgpu.launch.watch import Watch
from mgpu.rig import Gpu
from mgpu.units import GIB
from mgpu_adapters.llamacpp.adapter import LlamaCpp
from planning import decide, rig_named

_WELL: Final = CardNow(index=0, free_bytes=1, used_bytes=1)
_LATE: Final = Look(token="sent nothing of the first token for 120 s", late=True)


def _well(_: Looking) -> Iterator[Look]:
    yield Look()


def _cards_well(_: tuple[Gpu, ...]) -> Iterator[tuple[CardNow, ...]]:
    yield (_WELL,)


class _House:
    """A runtime that does nothing (`sleep`), and what is known of it. `keeper(...)`: who looks after it."""

    def __init__(self, folder: Path, model: Path, stack: ExitStack) -> None:
        self.now = 0.0
        self.said = io.StringIO()
        plan = decide(model, "3090")
        self.gpus = rig_named("3090").gpus
        self.child = Child.start(("sleep", "600"), os.environ, folder / "runtime.log")
        stack.callback(self.child.stop, grace_s=0.1)
        self.kept = Kept(plan=plan, parts=(plan,), gpus=self.gpus, adapter=LlamaCpp(), ends_unwell=True)
        cards = planned_cards(plan, {0: "GPU-0"})
        self.entry = stack.enter_context(enter(Record(name="chat", cards=cards)))
        self.watch = stack.enter_context(Watch(self.child, LlamaCpp()))
        url = "http://127.0.0.1:1"
        self.command = Command(
            argv=("sleep", "600"), devices=("CUDA0",), env={}, scrub=(), files={}, ready_url=url, endpoint=url
        )
        self.stop = stack.enter_context(StopSignals())

    def keeper(self, health: Looker = _well, cards: CardLooker = _cards_well, earlier: Keeper | None = None) -> Keeper:
        lookers = Lookers(health=health, cards=cards)
        return Keeper(self.entry, self.kept, self.said, earlier=earlier, lookers=lookers, clock=lambda: self.now)

    def ready(self, health: Looker = _well, cards: CardLooker = _cards_well) -> Keeper:
        keeper = self.keeper(health, cards)
        keeper.started(self.child)
        keeper.ready("http://127.0.0.1:1/v1", str(self.child.log_path))
        return keeper

    def beat(self, keeper: Keeper, seconds: float = BEAT_S) -> None:
        """Time goes on, looks are begun, and taken in where they have come to an end."""
        self.now += seconds
        self.tend(keeper)
        keeper._health.join(5)
        keeper.cards.join(0.05)
        self.tend(keeper)

    def tend(self, keeper: Keeper) -> None:
        keeper.tend([(self.watch, self.command)], self.stop)
        self.stop.wait(0)

    def load(self, keeper: Keeper, seconds: float = 3.0) -> int:
        """Bytes of its card that are taken, some seconds later."""
        for _ in range(2):
            keeper.loading([(self.watch, self.command)])
            keeper.cards.join(5)
        keeper.loading([(self.watch, self.command)])
        self.now += seconds
        return self.card.taken

    @property
    def card(self) -> Card:
        return self.entry.record.cards[0]


@pytest.fixture
def house(tmp_path: Path, header: Callable[[str], Path]) -> Iterator[_House]:
    with ExitStack() as stack:
        yield _House(tmp_path, header("Qwen2.5-0.5B-Instruct-Q4_K_M"), stack)


# --- looks that hang or fail -----------------------------------------------------------------------------------------


class _Hanging:
    """A driver that does not answer, until it is let go."""

    def __init__(self) -> None:
        self.n_begun = 0
        self.let_go = threading.Event()

    def __call__(self, _: tuple[Gpu, ...]) -> Iterator[tuple[CardNow, ...]]:
        self.n_begun += 1
        self.let_go.wait(60)
        yield (_WELL,)


class TestADriverThatHangs:
    @pytest.fixture
    def driver(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Hanging]:
        monkeypatch.setattr("mgpu.launch.keeper._DRIVER_S", 0.05)
        hanging = _Hanging()
        yield hanging
        hanging.let_go.set()

    def test_hides_nothing_of_the_server(self, house: _House, driver: _Hanging) -> None:
        n_looks = 0

        def silent(_: Looking) -> Iterator[Look]:
            nonlocal n_looks
            n_looks += 1
            yield Look(silent={"sleep": "no answer within 10 s"})

        keeper = house.ready(silent, driver)
        for _ in range(9):
            house.beat(keeper)
        assert n_looks == 9
        assert house.entry.record.state == "unwell"
        with pytest.raises(RuntimeFailedError, match=r"not well for 1\d\d s: sleep: no answer within 10 s"):
            house.beat(keeper)

    def test_is_said_once_and_not_asked_again(self, house: _House, driver: _Hanging) -> None:
        keeper = house.ready(cards=driver)
        n_threads = threading.active_count()
        for _ in range(100):
            house.beat(keeper)
        assert driver.n_begun == 1
        assert threading.active_count() <= n_threads + 1
        assert house.said.getvalue().count("cannot see the cards: the driver does not answer (") == 1
        assert "does not answer" in house.entry.record.said
        assert house.entry.record.state == "ready"
        driver.let_go.set()
        keeper.cards.join(5)
        house.beat(keeper)
        assert house.entry.record.said == "can see the cards again"
        house.beat(keeper)
        assert driver.n_begun in {2, 3}

    def test_is_not_asked_again_by_the_next_try(self, house: _House, driver: _Hanging) -> None:
        keeper: Keeper | None = None
        for _ in range(5):
            keeper = house.keeper(cards=driver, earlier=keeper)
            keeper.port("127.0.0.1", None)
            house.now += 60
        assert driver.n_begun == 1


def test_a_lookout_never_takes_two_looks_at_a_time() -> None:
    let_go = threading.Event()
    begun: list[int] = []

    def hang(number: int) -> Iterator[int]:
        begun.append(number)
        let_go.wait(60)
        yield number

    lookout = Lookout[int]("it")
    lookout.begin(hang(1), 0.0)
    lookout.begin(hang(2), 100.0)
    assert lookout.take() is None
    let_go.set()
    lookout.join(5)
    assert (lookout.take(), begun) == (1, [1])


def test_a_look_that_takes_longer_than_a_beat_is_judged(house: _House) -> None:
    """Eight replicas that are silent, 10 s each: the next look begins as soon as this one has ended."""

    def silent(_: Looking) -> Iterator[Look]:
        yield Look(silent={"sleep": "no answer within 10 s"})

    def go_on(keeper: Keeper) -> None:
        for _ in range(8):
            house.now += 2 * BEAT_S
            house.tend(keeper)
            keeper._health.join(5)

    keeper = house.ready(silent)
    with pytest.raises(RuntimeFailedError, match=r"not well for 1\d\d s"):
        go_on(keeper)


def test_a_health_look_that_hangs_is_said_once_and_not_begun_again(house: _House) -> None:
    begun: list[int] = []
    let_go = threading.Event()

    def hang(_: Looking) -> Iterator[Look]:
        begun.append(1)
        let_go.wait(60)
        yield Look()

    keeper = house.ready(hang)
    for _ in range(100):  # 25 minutes
        house.now += BEAT_S
        house.tend(keeper)
    assert begun == [1]
    assert house.said.getvalue().count("cannot see how it is: looking takes too long (") == 1
    let_go.set()
    keeper._health.join(5)
    house.tend(keeper)
    house.beat(keeper)
    assert len(begun) in {2, 3}
    assert "can see how it is again" in house.said.getvalue()


def test_a_look_that_raises_is_said_once_and_ends_nothing(house: _House) -> None:
    def fail(_: Any) -> Iterator[Any]:
        raise ZeroDivisionError("a third party's")
        yield

    keeper = house.ready(fail, fail)
    for _ in range(20):
        house.beat(keeper)
    said = house.said.getvalue()
    assert said.count("cannot see how it is: ZeroDivisionError: a third party's") == 1
    assert said.count("cannot see the cards: ZeroDivisionError: a third party's") == 1


def test_without_a_thread_to_be_had_nothing_ends(house: _House, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    keeper = house.keeper()
    monkeypatch.setattr("mgpu.launch.lookout.Background", none)
    keeper.port("127.0.0.1", None)
    keeper.started(house.child)
    house.load(keeper)
    keeper.ready("http://127.0.0.1:1/v1", "", (house.child.pid,))
    for _ in range(20):
        house.beat(keeper)
    assert house.said.getvalue().count("cannot see how it is: RuntimeError: can't start new thread") == 1
    assert house.said.getvalue().count("cannot see the cards: RuntimeError: can't start new thread") == 1
    monkeypatch.setattr("mgpu.launch.lookout.Background", Background)
    house.beat(keeper)
    assert house.said.getvalue().count("can see how it is again") == 1


def test_what_cannot_be_made_of_a_look_ends_nothing(house: _House, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = house.ready()
    monkeypatch.setattr(house.child, "family", lambda: 1 // 0)
    for _ in range(20):
        house.beat(keeper)
    assert house.said.getvalue().count("cannot see how it is: ZeroDivisionError") == 1


# --- busy, or hung ---------------------------------------------------------------------------------------------------


class TestTheRule:
    def test_a_token_that_is_late_is_no_complaint(self) -> None:
        vitals = Vitals("vllm")
        assert [vitals.see(_LATE, 135.0 * beat) for beat in range(50)] == [()] * 50
        assert vitals.unwell_since is None

    def test_one_that_is_refused_is(self) -> None:
        vitals = Vitals("vllm")
        refused = Look(token="answered the first request with HTTP 500: no")
        told = [vitals.see(refused, 15.0 * beat) for beat in range(3)]
        assert told == [(), ("not well: vllm answered the first request with HTTP 500: no",), ()]

    def test_a_server_that_rests_while_all_wait_is_unwell_after_ten_minutes(self) -> None:
        vitals = Vitals("vllm")
        since = None
        for beat in range(1, 8):
            vitals.see(_LATE, 135.0 * beat, rests=True)
            assert vitals.is_waiting
            since = since or (135.0 * beat if vitals.unwell_since is not None else None)
        assert since is not None
        assert 600 + TOKEN_S <= since <= 900
        assert vitals.why == "vllm sent nothing of the first token for 120 s, and does nothing"

    def test_work_in_between_begins_the_ten_minutes_anew(self) -> None:
        vitals = Vitals("vllm")
        for beat in range(100):
            vitals.see(_LATE, 135.0 * beat, rests=beat % 4 != 0)
        assert vitals.unwell_since is None

    def test_a_late_token_makes_nobody_well_who_does_nothing(self) -> None:
        vitals = Vitals("vllm")
        for beat in range(2):
            vitals.see(Look(silent={"vllm": "no answer"}), 15.0 * beat)
        vitals.see(_LATE, 150.0, rests=True)
        assert vitals.unwell_since is not None
        vitals.see(_LATE, 285.0)  # it works for somebody
        assert vitals.unwell_since is None


class _Asking:
    """Health that answers, whose tokens do not come in time."""

    def __init__(self, stats: Stats | None = None) -> None:
        self.n_asked = 0
        self.stats: Mapping[str, Stats] = {} if stats is None else {"sleep": stats}

    def __call__(self, looking: Looking) -> Iterator[Look]:
        self.n_asked += looking.wants_token
        late = looking.wants_token
        yield Look(stats=self.stats, token=_LATE.token if late else None, late=late)


def test_a_server_at_work_is_asked_for_no_token(house: _House, monkeypatch: pytest.MonkeyPatch) -> None:
    """TabbyAPI tells nothing of a request before its end: processor time does."""
    asking = _Asking()
    keeper = house.ready(asking)
    monkeypatch.setattr("mgpu.launch.tree.cpu_seconds", lambda _: house.now / 2)
    for _ in range(int(4 * IDLE_S / BEAT_S)):
        house.beat(keeper)
    assert asking.n_asked == 0
    assert house.entry.record.state == "ready"


@pytest.mark.parametrize("stats", [None, Stats(running=1, waiting=3, generated=70)])
def test_a_server_whose_requests_all_hang_is_found_out(house: _House, stats: Stats | None) -> None:
    """`sleep` uses no processor time: idle for long, it is asked, does nothing about it, and is ended."""
    asking = _Asking(stats)
    keeper = house.ready(asking)

    def go_on() -> None:
        for _ in range(int(3 * IDLE_S / BEAT_S)):
            house.beat(keeper)

    with pytest.raises(RuntimeFailedError, match=r"not well for .* and does nothing"):
        go_on()
    assert IDLE_S + 600 < house.now < 2 * IDLE_S
    assert asking.n_asked > 5


def test_one_whose_processes_cannot_be_seen_has_the_benefit_of_the_doubt(house: _House) -> None:
    from msgspec.structs import replace

    house.command = replace(house.command, elsewhere=True)
    asking = _Asking()
    keeper = house.ready(asking)
    for _ in range(int(4 * IDLE_S / BEAT_S)):
        house.beat(keeper)
    assert house.entry.record.state == "ready"
    assert asking.n_asked == 4


def test_nobody_is_ended_while_the_answer_may_still_come(house: _House) -> None:
    """Silent for a moment, it says that it is there, and a token is asked of it."""
    let_go = threading.Event()
    seen: list[Looking] = []

    def recovering(looking: Looking) -> Iterator[Look]:
        seen.append(looking)
        if len(seen) > 2:
            let_go.wait(60)
            yield Look(token="")
        else:
            yield Look(silent={"sleep": "no answer"})

    keeper = house.ready(recovering)
    house.beat(keeper)
    house.beat(keeper)
    assert keeper._vitals.unwell_since is not None
    for _ in range(9):
        house.now += BEAT_S
        house.tend(keeper)  # the third look is under way for two minutes
    assert len(seen) == 3
    let_go.set()
    keeper._health.join(5)
    house.tend(keeper)
    assert house.entry.record.state == "ready"


def test_an_attached_service_is_asked_for_nothing(house: _House) -> None:
    keeper = house.keeper(look)
    keeper.ready("http://127.0.0.1:11434/v1", "")
    for _ in range(int(2 * IDLE_S / BEAT_S)):
        house.now += BEAT_S
        keeper.tend((), house.stop)
        keeper._health.join(5)
        keeper.tend((), house.stop)
        house.stop.wait(0)
    assert house.said.getvalue() == ""


def test_effort() -> None:
    effort = Effort()
    assert effort.is_work({1: 5.0}, 0.0) is None  # since when?
    assert effort.is_work({1: 5.1}, 15.0) is False
    assert effort.is_work({1: 5.1, 2: 9.0}, 30.0) is True  # a new process
    assert effort.is_work({1: 5.1}, 45.0) is False  # which has gone
    assert effort.is_work({}, 60.0) is None
    assert effort.is_work({1: 9.0}, 75.0) is None


# --- over HTTP -------------------------------------------------------------------------------------------------------


@contextmanager
def _serving(completion: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[Command]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def do_POST(self) -> None:
            completion(self)

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    yield Command(
        argv=("x",),
        env={},
        scrub=(),
        files={},
        ready_url=f"{url}/health",
        endpoint=f"{url}/v1",
        metrics_url=f"{url}/metrics",
    )
    server.shutdown()
    server.server_close()
    thread.join(5)


def _wait(over: threading.Event) -> None:
    over.wait(10)


def _looking(command: Command, adapter: LlamaCpp) -> Looking:
    asked = (Asked(name="x", command=command),)
    return Looking(asked=asked, adapter=adapter, api_key=None, wants_token=True)


def test_late_and_refused_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgpu.launch.health.TOKEN_S", 0.3)
    over = threading.Event()
    with _serving(lambda _: _wait(over)) as command:
        (seen,) = look(_looking(command, LlamaCpp()))
        over.set()
    assert (seen.late, seen.silent) == (True, {})
    for refuse in (lambda one: one.send_error(500), lambda one: one.connection.close()):
        with _serving(refuse) as command:
            (seen,) = look(_looking(command, LlamaCpp()))
        assert not seen.late
        assert seen.token


def test_the_words_have_the_seconds_that_were_waited() -> None:
    over = threading.Event()
    with _serving(lambda _: _wait(over)) as command:
        with pytest.raises(LateError, match="sent nothing of the first token for 1 s"):
            Client(command, None).generate_one(timeout_s=1.0)
        over.set()


def test_metrics_that_an_adapter_cannot_read_hide_nothing_else() -> None:
    class Broken(LlamaCpp):
        def read_metrics(self, text: str) -> Stats | None:
            raise KeyError(text)

    with _serving(lambda one: one.send_error(500)) as command:
        (seen,) = look(_looking(command, Broken()))
    assert seen.token
    vitals = Vitals("x")
    told = [line for beat in range(5) for line in vitals.see(seen, 15.0 * beat)]
    assert told == [
        "cannot read the metrics of x: KeyError: 'ok'",
        f"not well: x {seen.token}",
    ]


# --- what is taken, tallied and kept ---------------------------------------------------------------------------------


def _holding(*sizes: Mapping[int, int]) -> CardLooker:
    """A driver that says this of the processes on the card, look by look."""
    told = iter(sizes)

    def cards(_: tuple[Gpu, ...]) -> Iterator[tuple[CardNow, ...]]:
        yield (CardNow(index=0, by_pid=next(told, sizes[-1])),)

    return cards


def test_what_the_driver_sees_of_a_loading_runtime_is_promised_no_longer(house: _House) -> None:
    pid = house.child.pid
    keeper = house.keeper(cards=_holding({}, {pid: 100, 1: GIB}, {pid: 300}, {pid: 1 << 60}))
    taken = [house.load(keeper) for _ in range(4)]
    assert taken == sorted(taken)
    assert {0, 100, 300} <= {0, *taken}
    assert taken[-1] == house.card.planned


def test_while_it_loads_the_driver_is_asked_every_few_seconds_alone(house: _House) -> None:
    n_looks = 0

    def cards(_: tuple[Gpu, ...]) -> Iterator[tuple[CardNow, ...]]:
        nonlocal n_looks
        n_looks += 1
        yield (_WELL,)

    keeper = house.keeper(cards=cards)
    for _ in range(100):  # 10 s
        house.load(keeper, seconds=0.1)
    assert 3 <= n_looks <= 5
    house.watch.buffers.append(Buffer(device="CUDA0", kind="weights", n_bytes=7))
    house.load(keeper, seconds=100.0)
    asked = n_looks
    assert house.load(keeper, seconds=100.0) == 7
    assert n_looks == asked


def test_our_own_tokens_are_not_tallied(house: _House) -> None:
    keeper = house.ready()
    house.watch.served.append(Served(n_tokens=1, seconds=0.0))  # by which it was found to be ready
    house.beat(keeper)
    assert house.entry.record.work == Work()
    house.watch.served.extend(Served(n_tokens=20, seconds=1.0) for _ in range(3))
    house.beat(keeper)
    assert house.entry.record.work.requests == 3
    house.beat(keeper, IDLE_S + BEAT_S)  # it is asked for one now
    house.watch.served.append(Served(n_tokens=1, seconds=0.0))
    house.beat(keeper)
    assert house.entry.record.work.requests == 3


def test_what_was_said_is_kept_over_restarts(house: _House) -> None:
    first = house.keeper()
    first._say(("not well: no answer",))
    second = house.keeper(earlier=first)
    second._say(("well again after 20 s",))
    third = house.keeper(earlier=second)
    assert [line.split(" ", 2)[2] for line in third.said] == ["not well: no answer", "well again after 20 s"]
