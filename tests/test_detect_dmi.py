"""The firmware's list of memory modules, as bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.detect.dmi import Module, bandwidth_of, ram_bandwidth, read_modules
from mgpu.detect.host import read_host


def structure(kind: int, fields: bytes, *texts: str) -> bytes:
    """One SMBIOS structure: type, length, handle, fields, then its texts."""
    strings = b"".join(text.encode("latin-1") + b"\0" for text in texts)
    return bytes((kind, len(fields) + 4, 0, 0)) + fields + (strings or b"\0") + b"\0"


def module(
    locator: str,
    bank: str = "",
    *,
    mib: int = 16384,
    speed: int = 3200,
    configured: int = 3200,
    width: int = 64,
    extended: int | None = None,
) -> bytes:
    """A memory device (type 17) of SMBIOS 3.2; with `extended`, of 3.3."""
    fields = bytearray(0x54 - 4 if extended is None else 0x5C - 4)

    def put(offset: int, value: int, size: int = 2) -> None:
        fields[offset - 4 : offset - 4 + size] = value.to_bytes(size, "little")

    put(0x08, 72)  # with ECC
    put(0x0A, width)
    put(0x0C, mib)
    put(0x10, 1, 1)
    put(0x11, 2 if bank else 0, 1)
    put(0x15, speed)
    put(0x20, configured)
    if extended is not None:
        put(0x58, extended, 4)
    return structure(17, bytes(fields), locator, *([bank] if bank else []))


END = structure(127, b"")
BIOS = structure(0, bytes(20), "Vendor", "1.0")


def table(*structures: bytes) -> bytes:
    return b"".join((BIOS, *structures, END))


def gbs(data: bytes) -> float | None:
    found = bandwidth_of(tuple(read_modules(data)))
    return None if found is None else found / 10**9


def test_modules_as_they_are_written() -> None:
    assert tuple(read_modules(table(module("DIMM_A2", "BANK 0"), module("DIMM_B2", mib=0)))) == (
        Module(mega_transfers=3200, width=64, locator="DIMM_A2 BANK 0"),
    )


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ((module("DIMM_A2"), module("DIMM_B2")), 51.2),
        ((module("ChannelA-DIMM0"), module("ChannelA-DIMM1")), 25.6),  # two on one channel
        ((module("DIMM_A1"), module("DIMM_A2"), module("DIMM_B1"), module("DIMM_B2")), 51.2),
        ((module("DIMM 0", "P0 CHANNEL A"), module("DIMM 1", "P0 CHANNEL A")), 25.6),
        ((module("DIMM 0", "P0 CHANNEL A", configured=6000), module("DIMM 0", "P0 CHANNEL B", configured=6000)), 96.0),
        (tuple(module("DIMM 0", f"P{p} CHANNEL {c}", configured=4800) for p in range(2) for c in "ABCDEFGH"), 614.4),
        (tuple(module(f"DIMM_{c}{n}") for c in "ABCDEFGH" for n in (1, 2)), 204.8),
        (tuple(module(f"Controller{c}-Channel{n}", width=16, configured=6400) for c in (0, 1) for n in "ABCD"), 102.4),
        ((module("DIMM_A1"), module("DIMM_B1", configured=2400)), 38.4),  # all run as the slowest
        ((module("SODIMM 1"), module("SODIMM 2")), 51.2),  # no channels told: two modules have two
        ((module("Top"),), 25.6),
        (tuple(module(f"DIMM {number}") for number in range(4)), None),  # two channels, or four?
        ((module("DIMM_A1", configured=0), module("DIMM_B1", configured=0, speed=2666)), 42.656),
        ((module("DIMM_A1", configured=0, speed=0),), None),
        ((module("DIMM_A1", width=0xFFFF),), None),
        ((module("DIMM_A1", configured=0xFFFF, extended=70_000),), 560.0),
        ((module("DIMM_A1", mib=0),), None),
        ((), None),
    ],
)
def test_bandwidth(modules: tuple[bytes, ...], expected: float | None) -> None:
    found = gbs(table(*modules))
    assert found == (None if expected is None else pytest.approx(expected, rel=0.01))


def test_what_follows_the_end_is_not_read() -> None:
    assert gbs(table() + module("DIMM_A1")) is None


def test_a_host_that_tells(tmp_path: Path) -> None:
    path = tmp_path / "sys/firmware/dmi/tables/DMI"
    assert ram_bandwidth(tmp_path) is None
    path.parent.mkdir(parents=True)
    path.write_bytes(table(module("DIMM_A1"), module("DIMM_B1")))
    assert ram_bandwidth(tmp_path) == 51_200_000_000
    assert read_host(tmp_path).ram_bandwidth_bytes_per_s == 51_200_000_000


@given(st.binary(max_size=300), st.integers(0, 400))
def test_any_bytes_are_read(noise: bytes, cut: int) -> None:
    whole = table(module("DIMM_A1"), module("DIMM_B1", "P0 CHANNEL B"))
    for data in (noise, noise + whole, whole[:cut] + noise):
        assert all(found.mega_transfers >= 0 and found.width >= 0 for found in read_modules(data))
        assert (bandwidth_of(tuple(read_modules(data))) or 1) > 0


@given(st.lists(st.tuples(st.sampled_from("ABCDEFGH"), st.integers(1, 2)), min_size=1, unique=True))
def test_channels_add_up_and_modules_on_one_do_not(places: list[tuple[str, int]]) -> None:
    data = table(*(module(f"DIMM_{channel}{slot}") for channel, slot in places))
    channels = len({channel for channel, _ in places})
    assert gbs(data) == pytest.approx(25.6 * channels)
