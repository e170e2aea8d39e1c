"""How fast the RAM is, by the firmware's list of its modules (SMBIOS 3.7, structure type 17); for root alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct

_TABLE: Final = "sys/firmware/dmi/tables/DMI"
_MOST: Final = 1 << 20
_MEMORY_DEVICE: Final = 17
_END: Final = 127

#: A channel in a locator: "ChannelA-DIMM0", "P0 CHANNEL B", "DIMM_A1", "DIMMB2"; a processor or controller beside it.
_CHANNELS: Final = (
    re.compile(r"channel[ _-]?([A-P]|[0-9]{1,2})", re.IGNORECASE),
    re.compile(r"DIMM[ _-]?([A-P])[ _-]?[0-9]?\b", re.IGNORECASE),
)
_BESIDE: Final = re.compile(r"(?:\bP|CPU|Proc|NODE|Controller)[ _-]?([0-9]{1,2})", re.IGNORECASE)


class Module(Struct, frozen=True, kw_only=True):
    """One module that is plugged in. `mega_transfers`: millions per second, as it is run; `width`: its data bits."""

    mega_transfers: int
    width: int
    locator: str


def ram_bandwidth(root: Path) -> int | None:
    """Bytes per second, theoretical; None where the firmware's list cannot be read or does not tell enough."""
    try:
        with (root / _TABLE).open("rb") as file:
            return bandwidth_of(tuple(read_modules(file.read(_MOST))))
    except OSError:
        return None


def bandwidth_of(modules: tuple[Module, ...]) -> int | None:
    """The sum over all channels: modules on one channel take turns."""
    if not modules or not all(module.mega_transfers and module.width for module in modules):
        return None
    channels = [_channel(module.locator) for module in modules]
    if len(modules) <= 2 and not all(channels):
        channels = [str(number) for number, _ in enumerate(modules)]  # two modules are put into two channels
    if not all(channels):
        return None
    speed = min(module.mega_transfers for module in modules) * 1_000_000
    bits = {channel: module.width for channel, module in zip(channels, modules, strict=True)}
    return speed * sum(bits.values()) // 8


def _channel(locator: str) -> str:
    """What tells one channel from another; empty where the locator does not."""
    match = next((match for pattern in _CHANNELS if (match := pattern.search(locator))), None)
    return "".join((*_BESIDE.findall(locator), "/", match[1].upper())) if match else ""


def read_modules(table: bytes) -> Iterator[Module]:
    """The modules in an SMBIOS table. Whatever is not one, or is cut off, is left out."""
    at = 0
    while at + 4 <= len(table):
        kind, length = table[at], table[at + 1]
        end = table.find(b"\0\0", at + length)
        if length < 4 or kind == _END or end < 0:
            return
        if kind == _MEMORY_DEVICE and length > 0x16:
            module = _module(table[at : at + length], table[at + length : end].split(b"\0"))
            if module is not None:
                yield module
        at = end + 2


def _module(fields: bytes, texts: list[bytes]) -> Module | None:
    """None for an empty socket."""
    if not _word(fields, 0x0C):
        return None
    speed = _word(fields, 0x20) or _word(fields, 0x15)
    if speed == 0xFFFF:  # more than 65 GT/s: told at full length
        speed = int.from_bytes(fields[0x58:0x5C], "little") or int.from_bytes(fields[0x54:0x58], "little")
    width = _word(fields, 0x0A)
    numbers = [number for number in (fields[0x10], fields[0x11]) if 0 < number <= len(texts)]
    locator = " ".join(texts[number - 1].decode("latin-1") for number in numbers)
    return Module(mega_transfers=speed, width=0 if width == 0xFFFF else width, locator=locator)


def _word(fields: bytes, offset: int) -> int:
    return int.from_bytes(fields[offset : offset + 2], "little")
