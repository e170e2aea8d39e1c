"""What the documents say: links that lead somewhere, no gaps left to fill, and figures that the scripts still give."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.memory_accuracy import PARTS, Row, rows, sample
from benchmarks.memory_real_cuda import lines
from benchmarks.memory_real_cuda import markdown as cuda_markdown

from oracle import TABLES, Table, goldens

ROOT: Final = Path(__file__).parents[1]
MEMORY: Final = ROOT / "docs" / "memory.md"
DOCUMENTS: Final = tuple(sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/data/*.md")]))

#: Every n-th configuration of the golden tables is asked about again here.
STEP: Final = 37

_LINK: Final = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_GAP: Final = re.compile(r"\b[A-Z]{3,}_(?:SECTION|FIGURE|TABLE|HERE)\b|\b(?:TODO|FIXME|TBD|XXX)\b")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    broken = [target for target in _LINK.findall(text) if not _leads_somewhere(document, target)]
    assert broken == []


def _leads_somewhere(document: Path, target: str) -> bool:
    """Addresses are believed; files must be there, and headings be in them."""
    if re.match(r"[a-z]+:", target):
        return True
    name, _, heading = target.partition("#")
    path = document.parent / name if name else document
    if heading:
        return path.is_file() and heading in _headings(path.read_text(encoding="utf-8"))
    return path.exists()


def _headings(text: str) -> set[str]:
    """Headings as GitHub makes anchors of them."""
    titles = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_gaps_are_left_to_fill(document: Path) -> None:
    assert _GAP.findall(document.read_text(encoding="utf-8")) == []


class TestMemory:
    """docs/memory.md against what its scripts say now."""

    @pytest.mark.parametrize("table", TABLES)
    def test_errors_are_those_of_the_script(self, table: Table) -> None:
        written, said = _written()[TABLES.index(table)], rows(sample(table, STEP))[-1]
        assert int(written[0]) > len(goldens(table)) > said.n
        for part, cell in zip(PARTS, written[1:-1], strict=True):
            _agree(part, cell, said)
        assert said.exact == pytest.approx(float(written[-1].rstrip("%")) / 100, abs=0.02)

    def test_the_table_of_real_cards_is_the_script_s(self) -> None:
        said = "\n".join(cuda_markdown(list(lines()))).strip()
        assert said in MEMORY.read_text(encoding="utf-8")
        assert "agree in 117 of 117 rows" in said


def _written() -> list[list[str]]:
    """The cells of the rows over all architectures, one of each table."""
    found = re.findall(r"^\| all \| (.+) \|$", MEMORY.read_text(encoding="utf-8"), re.MULTILINE)
    return [row.split(" | ") for row in found]


def _agree(part: str, cell: str, said: Row) -> None:
    """The sample must not be worse than what is written of all."""
    errors = said.errors[PARTS.index(part)]
    if cell == "exact":
        assert errors.worst == 0
        return
    median, most, worst, under = (float(figure) / 100 for figure in cell.split(" / "))
    rounding = 0.00006
    assert errors.median == pytest.approx(median, abs=rounding)
    assert errors.most <= most + 0.001
    assert errors.worst <= worst + rounding
    assert errors.under >= under - rounding
