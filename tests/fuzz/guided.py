"""`python -m fuzz.guided TARGET [RUNS [CORPUS]]`: as `python -m fuzz`, guided by what code an input reaches.

Needs atheris (libFuzzer for Python), which is no dependency: pip install atheris. What it finds, and reaches anew, it
leaves in the directory CORPUS.
"""

from __future__ import annotations

import importlib
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

from fuzz.target import MIB, Target

_DICTIONARY = "words"


def main() -> None:
    name, *rest = sys.argv[1:]
    runs = int(rest[0]) if rest else 100_000
    corpus = Path(rest[1] if len(rest) > 1 else tempfile.mkdtemp(prefix="mgpu-fuzz-")).absolute()
    corpus.mkdir(parents=True, exist_ok=True)
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["mgpu", "mgpu_adapters", "mgpu_profiles"]):
        from fuzz.targets import TARGETS
    target = next(each for each in TARGETS if each.name == name)
    _prepare(target, corpus)
    arguments = [
        f"-runs={runs}",
        f"-timeout={target.alone_s}",
        f"-max_len={target.most}",
        f"-artifact_prefix={corpus}/",
    ]
    if target.tokens:
        arguments.append(f"-dict={_DICTIONARY}")
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + 2 * target.memory, resource.RLIM_INFINITY))
    atheris.Setup([sys.argv[0], *arguments, "-rss_limit_mb=0", str(corpus)], target.run)
    atheris.Fuzz()


def _prepare(target: Target, corpus: Path) -> None:
    """What it begins with, in a directory of its own, where it works."""
    folder = tempfile.mkdtemp(prefix="mgpu-fuzz-")
    os.environ["MGPU_FUZZ_SCRATCH"] = folder
    os.chdir(folder)
    for number, data in enumerate(target.pool()):
        (corpus / f"seed-{number}").write_bytes(data[: target.most])
    lines = ("".join(f"\\x{byte:02x}" for byte in token) for token in target.tokens if 0 < len(token) < 60)
    Path(_DICTIONARY).write_text("".join(f'"{line}"\n' for line in lines), encoding="ascii")


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize() + 256 * MIB  # libFuzzer's own


if __name__ == "__main__":
    main()
