"""What `mgpu ps` shows, without launching anything."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mgpu.launch.records import Card, End, Record, Work
from mgpu.report.launches import age, launches_screen
from mgpu.units import GIB

SPILLED = "GPU 0 (RTX 4090) holds 14.0 GiB, 20.0 GiB was planned: 6.0 GiB is in system RAM, which is many times slower"


def _shown(record: Record | None, *, alive: bool = True, width: int = 100) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width)
    table, notes = launches_screen((("chat", alive, record),), now=1_000_000.0)
    console.print(table)
    for note in notes:
        console.print(note, soft_wrap=True)
    return out.getvalue()


def test_memory_by_card_speed_and_users() -> None:
    cards = (
        Card(key="a", gpu=0, name="NVIDIA GeForce RTX 3090", planned=20 * GIB, held=19 * GIB),
        Card(
            key="b", gpu=2, name="NVIDIA GeForce RTX 3060", planned=10 * GIB, reported=8 * GIB, reported_planned=9 * GIB
        ),
    )
    work = Work(requests=7, tok_s=41.0, lately=38.4, running=2, waiting=1)
    ready = 1_000_000 - 7200
    record = Record(name="chat", state="ready", runtime="llama.cpp", cards=cards, users=4, work=work, ready=ready)
    shown = _shown(record)
    for words in ("19.0 of 20.0 GiB", "8.0 of 9.0 GiB", "0 (RTX 3090) + 2", " 38 ", "2 of 4, 1 wait", "2 h"):
        assert words in shown, shown


def test_a_spill_is_shown_though_it_serves() -> None:
    assert f"chat: {SPILLED}" in _shown(Record(name="chat", state="ready", said=SPILLED))


def test_nothing_to_say_is_no_line() -> None:
    assert "chat:" not in _shown(Record(name="chat", state="ready"))


@pytest.mark.parametrize("field", ["said", "message"])
def test_nothing_but_letters_reaches_the_terminal(field: str) -> None:
    odd = "it said \x1b]0;title\x07\x1b[2J\nand more"
    record = Record(name="chat", state="ready", said=odd)
    if field == "message":
        record = Record(name="chat", state="failed", end=End(exit_code=7, message=odd))
    shown = _shown(record, alive=field == "said")
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "and more" in shown


def test_a_damaged_record_is_a_row() -> None:
    assert "its record is damaged" in _shown(None)
    assert "unknown" in _shown(None, alive=False)


@pytest.mark.parametrize(
    ("seconds", "words"), [(-5, "0 s"), (90, "90 s"), (180, "3 min"), (7300, "2 h"), (40 * 86400, "40 d")]
)
def test_ages(seconds: float, words: str) -> None:
    assert age(seconds) == words
