"""The program of a fake llama-server build: it answers mgpu's probes; started with a model, it does as a test says."""

from __future__ import annotations

from pathlib import Path
from typing import Final

#: What a started build becomes, once it has written down how it was started.
SERVER: Final = str(Path(__file__).parent / "fake_llama_server.py")

CUDA: Final = "\n".join(f"  CUDA{i}: NVIDIA GeForce RTX 3090 (24124 MiB, 23800 MiB free)" for i in range(2))

_HELP: Final = """\
-m,    --model FNAME                    model path to load
-dev,  --device <dev1,dev2,..>          devices to use for offloading
-ngl,  --gpu-layers, --n-gpu-layers N   layers to store in VRAM
-sm,   --split-mode {MODES}
-ts,   --tensor-split N0,N1,N2,...
-fit,  --fit [on|off]
-fa,   --flash-attn [on|off|auto]
-c,    --ctx-size N
-lv,   --verbosity, --log-verbosity N
"""

_PROBES: Final = """\
import json, os, sys
words = sys.argv[1:]
answers = {answers!r}
if " ".join(words) in answers:
    sys.exit(print(answers[" ".join(words)]))
"""


def build_program(started: str, *, devices: str = CUDA, split_modes: str = "none,layer,row,tensor") -> str:
    """Its code. `started`: what runs after the probes, with `words` for its arguments and json, os, sys at hand."""
    answers = {
        "--version": "version: 0.6.0-dev (build 11434, commit 0123abc)",
        "--help": _HELP.replace("MODES", split_modes),
        "--list-devices": f"Available devices:\n{devices}",
    }
    return _PROBES.format(answers=answers) + started
