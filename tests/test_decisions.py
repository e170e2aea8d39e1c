"""Every row of tests/data/decisions.md is what mgpu decides today."""

from __future__ import annotations

from pathlib import Path

import pytest

from decision_cases import SECTIONS, Case, row

GOLDEN = Path(__file__).parent / "data" / "decisions.md"
CASES = [one for cases in SECTIONS.values() for one in cases]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decisions")


@pytest.fixture(scope="session")
def golden() -> list[str]:
    lines = GOLDEN.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("| ") and not line.startswith("| rig |")]


def test_the_table_is_whole(golden: list[str]) -> None:
    assert len(golden) == len(CASES) >= 60


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{one.rig}-{one.model}" for one in CASES])
def test_row(index: int, models: Path, golden: list[str]) -> None:
    one: Case = CASES[index]
    assert row(one, models) == golden[index], "`make docs` writes the table anew"
