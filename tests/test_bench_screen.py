"""What a person sees of a bench: the table in 80 columns, the bar on a terminal, plain lines in a file."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import struct
import termios
from typing import Any

import pytest
from rich.console import Console

from mgpu.plan import Layout, Shape, Speed
from mgpu.report.benched import Bars, Outcome, Row, benched_object, benched_screen, needless_lines, unsteady_lines
from mgpu.rig import Measured


def row(*gpus: int, tok_s: float | None = None, expected: float | None = 100.0, **given: Any) -> Row:
    host_layers = given.pop("host_layers", 0)
    counts = given.pop("counts", tuple(33 // len(gpus) for _ in gpus))
    shape = Shape(n_devices=len(gpus), host_layers=host_layers, mode=given.pop("mode", "pipeline"))
    layout = Layout(gpus=gpus, counts=counts, shape=shape)
    predicted = None if expected is None else Speed(expected=expected, low=expected * 0.9, high=expected * 1.1)
    measured = None
    if tok_s is not None:
        measured = Measured(
            model="m", architecture="llama", quantization="Q4_K_M", weights_bytes=1, runtime="llama.cpp",
            version="b11434", mode=shape.mode, gpus=gpus, counts=counts, depth=576, tok_s=tok_s, prompt_tok_s=2048.0,
            date="2026-11-23",
        )  # fmt: skip
    facts: dict[str, Any] = {
        "depth": 576,
        "name": "plan",
        "needless": False,
        "samples": () if tok_s is None else (tok_s,),
    } | given
    return Row(layout=layout, predicted=predicted, measured=measured, **facts)


def shown(*rows: Row) -> str:
    outcome = Outcome(
        model="Llama 3.1 8B Instruct", rig="home", runtime="llama.cpp", version="b11434", kv_type="f16",
        n_prompt=512, n_gen=128, rows=rows,
    )  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=80, highlight=False).print(benched_screen(outcome))
    return out.getvalue()


def test_a_table_in_80_columns() -> None:
    eight = tuple(range(8))
    text = shown(
        row(0, tok_s=111.7),
        row(*eight, tok_s=98.2, name="needless split, all cards", needless=True, counts=(5, 4, 4, 4, 4, 4, 4, 4)),
        row(0, 1, expected=None, name="tensor", mode="tensor", cause="llama-server exited with status 1: no memory"),
    )
    assert all(len(line) <= 80 for line in text.splitlines())
    assert [line.split()[0] for line in text.splitlines()[3:5]] == ["case", "plan"]
    assert "90-110" in text
    assert "-10%" in text
    assert "unknown" in text
    assert "tensor, GPU 0+1: llama-server exited with status 1: no memory" in " ".join(text.split())
    assert "a needless split over GPU 0+1+2+3+4+5+6+7 costs 12.1% here: 98.2 instead of 111.7 tok/s" in " ".join(
        text.split()
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        pytest.param(row(), "the CPU", id="no card"),
        pytest.param(row(1), "GPU 1", id="one"),
        pytest.param(row(1, 0, counts=(20, 13)), "GPU 1+0 (20+13)", id="two"),
        pytest.param(row(0, 1, counts=(33, 33), mode="tensor"), "GPU 0+1", id="ranks"),
        pytest.param(row(0, host_layers=12), "GPU 0, 12 layers on the CPU", id="offload"),
    ],
)
def test_cards_in_words(given: Row, words: str) -> None:
    assert given.cards == words


class TestNeedless:
    def test_against_the_fastest_card_alone(self) -> None:
        rows = (row(1, tok_s=50), row(0, tok_s=100), row(0, 1, tok_s=96, needless=True))
        assert needless_lines(rows) == ("a needless split over GPU 0+1 costs 4.0% here: 96.0 instead of 100.0 tok/s",)
        assert benched_object(_outcome(rows))["needless_splits"] == [{"gpus": [0, 1], "cost": pytest.approx(0.04)}]

    def test_it_may_cost_nothing_or_gain(self) -> None:
        assert "costs nothing here" in needless_lines((row(0, tok_s=100), row(0, 1, tok_s=100.2, needless=True)))[0]
        assert "gains 3.0% here" in needless_lines((row(0, tok_s=100), row(0, 1, tok_s=103, needless=True)))[0]

    @pytest.mark.parametrize(
        "rows",
        [
            pytest.param((row(0, 1, tok_s=96, needless=True),), id="nothing to compare with"),
            pytest.param((row(0, tok_s=100), row(0, 1, needless=True)), id="failed"),
            pytest.param((row(0, tok_s=100), row(0, 1, tok_s=96)), id="needed"),
            pytest.param((row(0, tok_s=100), row(0, 1, tok_s=96, needless=True, mode="tensor")), id="ranks"),
            pytest.param((row(0, tok_s=100, depth=4096), row(0, 1, tok_s=96, needless=True)), id="at another depth"),
            pytest.param((row(0, tok_s=100, host_layers=3), row(0, 1, tok_s=96, needless=True)), id="with the CPU"),
        ],
    )
    def test_nothing_to_say(self, rows: tuple[Row, ...]) -> None:
        assert needless_lines(rows) == ()


def test_repetitions_that_disagree_are_said() -> None:
    steady, unsteady = row(0, tok_s=100, samples=(97.0, 100.0, 103.0)), row(1, tok_s=100, samples=(80.0, 100.0))
    assert [line.partition(":")[0] for line in unsteady_lines((steady, unsteady))] == ["plan, GPU 1"]


def _outcome(rows: tuple[Row, ...]) -> Outcome:
    return Outcome(
        model="m", rig="r", runtime="llama.cpp", version="b1", kv_type="f16", n_prompt=512, n_gen=128, rows=rows
    )  # fmt: skip


class TestBars:
    def test_a_file_gets_the_results_alone(self) -> None:
        stream = io.StringIO()
        with Bars(stream, steps=4) as bars:
            bars.tell("1/2 plan: loading")
            bars.advance()
            bars.say(f"  1/2 plan: [112] tok/s, {'and so on ' * 9}")
            bars.stream.write("stopping llama-server\n")
        said, stopping = stream.getvalue().splitlines()
        assert said.startswith("  1/2 plan: [112] tok/s, and so on")
        assert stopping == "stopping llama-server"

    def test_a_terminal_gets_a_bar_that_is_gone_afterwards(self) -> None:
        drawn = _on_terminal()
        assert "1/2 plan: loading" in drawn
        assert "1/4" in drawn
        assert "a result\r\n" in drawn
        assert drawn.index("a result") > drawn.index("1/2 plan: loading")
        erase = "\x1b[2K"
        assert "/4" not in drawn.rpartition(erase)[2]

    def test_a_closed_stream_is_no_reason_to_stop(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w")
        with Bars(stream, steps=4) as bars:
            bars.say("anybody there?")
            bars.advance()
        with contextlib.suppress(BrokenPipeError):
            stream.close()


def _on_terminal() -> str:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(theirs, "w") as stream, Bars(stream, steps=4) as bars:
        bars.tell("1/2 plan: loading")
        bars.advance()
        bars.say("a result")
        bars.advance(2)
    drawn = b""
    with contextlib.suppress(OSError):  # EIO is how a terminal without writers ends
        while piece := os.read(ours, 4096):
            drawn += piece
    os.close(ours)
    return drawn.decode()
