"""Writes what is generated and committed: the completion scripts, and the pictures of `mgpu plan`."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from pathlib import Path

from mgpu.cli import cli
from mgpu.shells import FILES, script

ROOT = Path(__file__).parents[1]
HEADERS = ROOT / "tests" / "data" / "headers"

#: Pictures: name, model, arguments of `mgpu plan`.
PICTURES = (
    ("plan-32b-2x3090", "Qwen2.5-32B-Instruct-Q4_K_M", ("--rig", "2x3090")),
    ("plan-70b-2x3090", "Llama-3.3-70B-Instruct-Q4_K_M", ("--rig", "2x3090")),
)


def main() -> None:
    for shell, name in FILES.items():
        (ROOT / "completions" / name).write_text(script(shell, cli), encoding="utf-8")
    sizes = dict(line.split(",") for line in (HEADERS / "sizes.csv").read_text(encoding="utf-8").splitlines()[1:])
    os.environ["COLUMNS"] = "96"
    for name, model, arguments in PICTURES:
        path = Path(tempfile.gettempdir()) / "models" / f"{model}.gguf"  # the picture shows it: the same each time
        path.parent.mkdir(exist_ok=True)
        with gzip.open(HEADERS / f"{model}.gguf.header.gz") as packed, path.open("wb") as out:
            shutil.copyfileobj(packed, out)
        os.truncate(path, int(sizes[model]))
        picture = str(ROOT / "docs" / f"{name}.svg")
        cli.main(["plan", str(path), *arguments, "--svg", picture], prog_name="mgpu", standalone_mode=False)
        path.unlink()


if __name__ == "__main__":
    main()
