"""For tests of whole runs: a folder as TabbyAPI's clone is, with the fake one inside."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Final, Literal

Branch = Literal["main", "exl2"]

FAKE: Final = Path(__file__).parent / "fake_tabby.py"

_CHECKS: Final = {
    "main": {"exllamav3": "1.4.1"},
    "exl2": {"exllamav2": "0.3.1", "exllamav3": "0.0.7"},
}
_PINNED: Final = {"main": {"exllamav3": "1.4.2"}, "exl2": {"exllamav2": "0.3.2", "exllamav3": "0.0.43"}}


def write_clone(
    folder: Path, branch: Branch, *, venv: str | None = "venv", versions: dict[str, str] | None = None
) -> Path:
    """A clone of `branch` with the packages it pins, or `versions`; `venv` None: none in the folder."""
    for library, least in _CHECKS[branch].items():
        backend = folder / "backends" / library / "model.py"
        backend.parent.mkdir(parents=True)
        backend.write_text(f'class Container:\n    check_package_version("{library}", "{least}")\n')
    (folder / "common").mkdir()
    (folder / "common" / "tabby_config.py").write_text("")
    if branch == "main":
        marker = folder / "endpoints" / "OAI" / "utils" / "stream_parser.py"
        marker.parent.mkdir(parents=True)
        marker.write_text("")
    (folder / "main.py").write_text(f"import runpy\nrunpy.run_path({str(FAKE)!r}, run_name='__main__')\n")
    if venv is not None:
        python = folder / venv / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)
        for library, version in (_PINNED[branch] if versions is None else versions).items():
            name = f"{library}-{version}+cu128.torch2.9.0.dist-info"
            (folder / venv / "lib" / "python3.12" / "site-packages" / name).mkdir(parents=True)
    return folder
