"""Writes what is generated and committed: completion scripts, pictures of `mgpu plan`, the table of decisions."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from decision_cases import table
from headers import write_model
from mgpu.cli import cli
from mgpu.shells import FILES, script

ROOT = Path(__file__).parents[1]

#: Pictures: name, model, arguments of `mgpu plan`.
PICTURES = (
    ("plan-32b-2x3090", "Qwen2.5-32B-Instruct-Q4_K_M", ("--rig", "2x3090")),
    ("plan-70b-2x3090", "Llama-3.3-70B-Instruct-Q4_K_M", ("--rig", "2x3090")),
)


def main() -> None:
    for shell, name in FILES.items():
        (ROOT / "completions" / name).write_text(script(shell, cli), encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        decisions = ROOT / "tests" / "data" / "decisions.md"
        decisions.write_text(table(Path(scratch)), encoding="utf-8")
    os.environ["COLUMNS"] = "96"
    for name, model, arguments in PICTURES:
        directory = Path(tempfile.gettempdir()) / "models"  # the picture shows it: the same each time
        directory.mkdir(exist_ok=True)
        path = write_model(model, directory)
        picture = str(ROOT / "docs" / f"{name}.svg")
        cli.main(["plan", str(path), *arguments, "--svg", picture], prog_name="mgpu", standalone_mode=False)
        path.unlink()


if __name__ == "__main__":
    main()
