"""Rig profiles, the name of the default, and the words a person types."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from fuzz.target import Target, scratch
from mgpu.errors import ProfileError, UsageError
from mgpu.rig import Rig
from mgpu.units import parse_size
from mgpu_profiles.document import FORMS, TABLES
from mgpu_profiles.gpus import find_spec
from mgpu_profiles.rigs import format_rig, parse_rig, with_measured
from mgpu_profiles.store import BUNDLED, Store

_MEASURED: Final = b"""schema = 1
name = "m"
[host]
ram_gib = 64
ram_bandwidth_gbs = 80.5
[[gpu]]
name = "NVIDIA GeForce RTX 3090"
uuid = "GPU-1"
vram_mib = 24576
free_mib = 24100
pcie = "4.0 x16"
[[gpu]]
name = "RTX 3060"
vram_mib = 12288
enabled = false
[[link]]
gpus = [0, 1]
kind = "pcie-p2p"
path = "PHB"
[[measured]]
model = "Llama 3.1 8B"
architecture = "llama"
quantization = "Q4_K_M"
weights_bytes = 4920734272
runtime = "llama.cpp"
version = "b11434"
mode = "pipeline"
gpus = [0, 1]
counts = [20, 13]
kv_type = "f16"
depth = 576
tok_s = 111.7
date = "2026-11-23T17:33:41Z"
"""


def _profile(data: bytes) -> None:
    """From the file, through the store: bytes that are no text, too. What was read is written as it was read."""
    path = scratch() / "rig.toml"
    path.write_bytes(data)
    store = Store(scratch())
    rig: Rig = store.load(str(path))
    assert parse_rig(format_rig(rig), "again") == rig, "not the same when it is written"
    with_measured(path.read_bytes().decode("utf-8-sig"), rig.measured, "again")


def _default(data: bytes) -> None:
    """`default-rig`."""
    (scratch() / "rigs").mkdir(exist_ok=True)
    (scratch() / "default-rig").write_bytes(data)
    name = Store(scratch()).default()
    assert name is None or name in {path.stem for path in BUNDLED.iterdir()}


def _name(data: bytes) -> None:
    """A profile's name, as it is typed."""
    store = Store(scratch())
    text = os.fsdecode(data.replace(b"\0", b""))
    rig = store.load(text)
    assert isinstance(rig, Rig)


def _bundled() -> Iterator[bytes]:
    yield _MEASURED
    for name in ("2x3090-nvlink", "cpu-only", "m3-max-64"):
        yield (BUNDLED / f"{name}.toml").read_bytes()


_KEYS: Final = (
    *(key.rpartition(".")[2].encode() for key in FORMS),
    *(f"[[{name}]]\n".encode() for name in TABLES),
    b"[host]\n",
    b"0x" + b"f" * 6000,
    b"0b1" + b"0" * 20000,
    b"1979-05-27T07:32:00Z",
    b"inf",
    b"nan",
    b'"""',
    b"'''",
    b"name.a.b.c = 1\n",
    b'"a\\nb"',
    b'"\\u0000"',
    b'"\\U0010ffff"',
    b"{a={a={a=1}}}",
    b"[0, 0]",
    b"[-1, 1]",
)

TARGETS: Final = (
    Target(
        name="profile", check=_profile, refuses=(ProfileError,), seeds=_bundled, tokens=_KEYS, batch=500, weight=0.5
    ),
    Target(
        name="default-rig", check=_default, refuses=(ProfileError,), seeds=lambda: (b"2x3090\n", b"4090"), weight=0.1
    ),
    Target(
        name="profile-name", check=_name, refuses=(ProfileError,), seeds=lambda: (b"2x3090", b"x/y.toml"), weight=0.1
    ),
    Target(
        name="card-name",
        check=lambda data: find_spec(data.decode("utf-8", "replace"), 24 << 30),
        seeds=lambda: (b"NVIDIA GeForce RTX 3090", b"AMD Radeon RX 7900 XTX", b"Apple M3 Max"),
    ),
    Target(
        name="size",
        check=lambda data: parse_size(data.decode("utf-8", "replace")),
        refuses=(UsageError,),
        seeds=lambda: (b"2G", b"1.5 GiB", b"800MB"),
    ),
)
