"""A rig profile as written: the tables and keys of the TOML, what each takes, and how a wrong one is refused.

Nothing is looked up or filled in here; that is `mgpu_profiles.rigs`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from mgpu.errors import ProfileError
from mgpu.request import RUNTIME_NAMES, KnownRuntime
from mgpu.rig import LinkKind, Vendor

_Text = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]*[^\x00-\x20\x7f][^\x00-\x1f\x7f]*\Z")]  # not blank, one line
_Word = Annotated[str, Meta(pattern=r"^[^\s\x00-\x1f\x7f]+\Z")]
_Name = Annotated[str, Meta(pattern=r"^(?!.*\.toml\Z)[A-Za-z0-9][A-Za-z0-9._+-]{0,63}\Z")]
_Mib = Annotated[int, Meta(ge=1, le=1 << 22)]  # 4 TiB: more is bytes written as MiB
_MibOrNone = Annotated[int, Meta(ge=0, le=1 << 22)]
_Gbs = Annotated[float, Meta(ge=0.001, le=100_000)]
_Watts = Annotated[int, Meta(ge=1, le=1_000_000)]
_Count = Annotated[int, Meta(ge=0, le=1 << 31)]
_Speed = Annotated[float, Meta(ge=1e-6, le=1e9)]


#: More cards are refused. The largest single machines have 16, or 8 in 7 slices each.
MAX_CARDS: Final = 128
_MAX_TABLES: Final = 8192

#: Lines that are refused before they are parsed: `a.a.a.…` takes tomllib the square of its length, and hexadecimal
#: numbers have no limit of their own.
_MAX_LINE: Final = 2000
_MAX_DOTS: Final = 200

LinkPath = Literal["PIX", "PXB", "PHB", "NODE", "SYS"]


class HostTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[host]`"""

    ram_gib: Annotated[float, Meta(ge=0, le=1 << 16)]
    ram_bandwidth_gbs: _Gbs | None = None
    cores: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None
    psu_watts: _Watts | None = None


class GpuTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[[gpu]]`. From `vendor` on: rarely written by hand; saved when the card's name does not say it."""

    name: _Text
    uuid: _Word | None = None
    vram_mib: _Mib
    free_mib: _MibOrNone | None = None
    bandwidth_gbs: _Gbs | None = None
    pcie: Annotated[str, Meta(pattern=r"^[1-9]\.0 x(1|2|4|8|12|16|32)\Z")] | None = None
    reserve_mib: _MibOrNone = 0
    enabled: bool = True
    vendor: Vendor | None = None
    compute_capability: Annotated[str, Meta(pattern=r"^([1-9]\d?\.\d|gfx[0-9a-f]{3,5})\Z")] | None = None
    power_watts: _Watts | None = None
    unified: bool | None = None
    integrated: bool | None = None
    display: bool | None = None
    numa_node: Annotated[int, Meta(ge=0, le=1 << 10)] | None = None
    device: _Word | None = None
    max_tensor_mib: _Mib | None = None


class LinkTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[[link]]`. `gpus` are positions in the file, from 0."""

    gpus: tuple[int, int]
    kind: LinkKind
    n_links: Annotated[int, Meta(ge=1, le=36)] | None = None  # NVML_NVLINK_MAX_LINKS
    path: LinkPath | None = None


class MeasuredTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[[measured]]`, written by `mgpu bench`. `gpus` are positions in the file, from 0; none: the CPU alone."""

    model: _Text
    architecture: _Text
    quantization: _Text
    weights_bytes: Annotated[int, Meta(ge=1, le=1 << 50)]
    runtime: KnownRuntime
    version: _Text
    mode: Literal["pipeline", "tensor"]
    gpus: tuple[int, ...] = ()
    counts: tuple[_Count, ...] = ()
    host_layers: _Count | None = None
    host_experts: _Count | None = None
    kv_type: _Word
    depth: _Count
    tok_s: _Speed
    prompt_tok_s: _Speed | None = None
    predicted: _Speed | None = None
    date: Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\d(T\d\d:\d\d(:\d\d)?(Z|[+-]\d\d:\d\d)?)?\Z")]


class Document(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. The order of the fields is the order of the keys in it."""

    schema: Literal[1] = 1
    name: _Name
    host: HostTable
    gpu: Annotated[tuple[GpuTable, ...], Meta(max_length=MAX_CARDS)] = ()
    link: Annotated[tuple[LinkTable, ...], Meta(max_length=_MAX_TABLES)] = ()
    measured: Annotated[tuple[MeasuredTable, ...], Meta(max_length=_MAX_TABLES)] = ()


class _Version(Struct):
    schema: Literal[1]


TABLES: Final[Mapping[str, type[Struct]]] = {
    "": Document,
    "host": HostTable,
    "gpu": GpuTable,
    "link": LinkTable,
    "measured": MeasuredTable,
}

#: What each key takes, in the words of an error.
FORMS: Final[Mapping[str, str]] = {
    "schema": "write schema = 1, the only one this version reads",
    "name": 'write it like name = "home": up to 64 letters, digits and . _ + -, a letter or digit first, no .toml',
    "host": "it is one table: [host], then ram_gib = 64 below it",
    "host.ram_gib": "write it like ram_gib = 64, in GiB",
    "host.ram_bandwidth_gbs": "write it like ram_bandwidth_gbs = 80, in GB/s",
    "host.cores": "write it like cores = 8, physical ones",
    "host.psu_watts": "write it like psu_watts = 1200",
    "gpu": f"each card is a table of its own: [[gpu]], then its keys below it; at most {MAX_CARDS} of them",
    "gpu.name": 'write it as the driver does, like name = "NVIDIA GeForce RTX 3090"',
    "gpu.uuid": "copy it from `nvidia-smi -L`, or leave it out",
    "gpu.vram_mib": "write it like vram_mib = 24576, whole MiB",
    "gpu.free_mib": "write it like free_mib = 24100, whole MiB and at most vram_mib, or leave it out",
    "gpu.bandwidth_gbs": "write it like bandwidth_gbs = 936, in GB/s, or leave it out",
    "gpu.pcie": 'write it like pcie = "4.0 x16"',
    "gpu.reserve_mib": "write it like reserve_mib = 512, whole MiB and at most vram_mib",
    "gpu.enabled": "write enabled = true or enabled = false",
    "gpu.vendor": "it is one of nvidia, amd, intel, apple, unknown",
    "gpu.compute_capability": 'write it like compute_capability = "8.6" or "gfx1100", in quotes',
    "gpu.power_watts": "write it like power_watts = 350",
    "gpu.unified": "write unified = true for a GPU that shares the host's RAM",
    "gpu.integrated": "write integrated = true for a GPU that is part of the processor",
    "gpu.display": "write display = true for a card that drives a screen",
    "gpu.numa_node": "write it like numa_node = 0, the processor (socket) its slot belongs to",
    "gpu.device": 'write it as the runtime lists it, like device = "Vulkan0"',
    "gpu.max_tensor_mib": "write it like max_tensor_mib = 4096, whole MiB",
    "link": "each link is a table of its own: [[link]], then gpus and kind below it",
    "link.gpus": "write it like gpus = [0, 1]: two different cards, counted from 0, each pair once",
    "link.kind": "it is one of nvlink, pcie-p2p, pcie",
    "link.path": "it is one of PIX, PXB, PHB, NODE, SYS, as in `nvidia-smi topo -m`",
    "link.n_links": "write it like n_links = 4, the NVLink bridges between the two",
    "measured": "each measured speed is a table of its own, as `mgpu bench` writes it: [[measured]], its keys below it",
    "measured.model": 'write it like model = "Llama 3.1 8B Instruct", one line',
    "measured.architecture": 'write it like architecture = "llama"',
    "measured.quantization": 'write it like quantization = "Q4_K_M"',
    "measured.weights_bytes": "write it like weights_bytes = 4920734272, in bytes",
    "measured.runtime": f"it is one of {', '.join(RUNTIME_NAMES)}",
    "measured.version": 'write it like version = "b11434"',
    "measured.mode": "it is one of pipeline, tensor",
    "measured.gpus": "write it like gpus = [0, 1]: different cards, counted from 0; leave it out for the CPU alone",
    "measured.counts": "write it like counts = [20, 13]: the layers on each of gpus, the output counted as one",
    "measured.host_layers": "write it like host_layers = 12, the layers on the CPU",
    "measured.host_experts": "write it like host_experts = 12, the layers whose experts are on the CPU",
    "measured.kv_type": 'write it like kv_type = "f16"',
    "measured.depth": "write it like depth = 576, the tokens in the cache on average",
    "measured.tok_s": "write it like tok_s = 111.7, tokens per second",
    "measured.prompt_tok_s": "write it like prompt_tok_s = 4100, tokens per second",
    "measured.predicted": "write it like predicted = 110.2, tokens per second",
    "measured.date": 'write it like date = "2026-11-23T17:33:41Z", in quotes',
}


def read_document(text: str, origin: str) -> Document:
    """The tables of a profile, every value checked. `origin`, the file, is named in errors. Raises `ProfileError`."""
    _check_lines(text, origin)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, arrays nested without end
        said = str(error).replace("\n", " ")
        raise ProfileError(f"{origin}: not TOML: {said}", hint=f"correct that line of {origin}") from None
    try:
        msgspec.convert(data, _Version)  # first: another schema has other keys
        document = msgspec.convert(data, Document)
    except msgspec.ValidationError as error:
        raise _explain(str(error), data, origin) from None
    _check_gpus(document, origin)
    _check_links(document, origin)
    _check_measured(document, origin)
    return document


def _check_lines(text: str, origin: str) -> None:
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > _MAX_LINE or (line.count(".") > _MAX_DOTS and not line.lstrip().startswith("#")):
            what = f"line {number} has more than {_MAX_LINE} characters or {_MAX_DOTS} dots"
            raise ProfileError(f"{origin}: not TOML: {what}", hint=f"correct that line of {origin}")


def write_document(document: Document) -> str:
    """The TOML of it: keys in the order of the fields, those that say nothing left out (TOML has no null)."""
    import tomli_w

    text = tomli_w.dumps(_said(msgspec.to_builtins(document)))
    # Numbers of cards and of layers read better on one line.
    return re.sub(r"\[\n(?: +\d+,\n)+\]", lambda found: f"[{', '.join(re.findall('[0-9]+', found[0]))}]", text)


def check_name(name: str) -> str:
    """`name`, when it is fit for a profile and its file. Raises `ProfileError`."""
    try:
        return msgspec.convert(name, _Name)
    except msgspec.ValidationError:
        raise ProfileError(f"not a profile name: {name!r}", hint=FORMS["name"]) from None


def _said(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _said(value) for key, value in data.items() if value is not None and value not in ([], ())}
    if isinstance(data, list | tuple):
        return [_said(item) for item in data]
    return data


def _check_gpus(document: Document, origin: str) -> None:
    owners: dict[str, int] = {}
    for index, gpu in enumerate(document.gpu):
        for key, size in (("free_mib", gpu.free_mib), ("reserve_mib", gpu.reserve_mib)):
            if size is not None and size > gpu.vram_mib:
                raise _wrong(origin, f"gpu[{index}].{key}", size, f"vram_mib is {gpu.vram_mib}")
        if gpu.uuid is not None and (owner := owners.setdefault(gpu.uuid, index)) != index:
            raise _wrong(origin, f"gpu[{index}].uuid", gpu.uuid, f"gpu[{owner}] has the same")


def _check_links(document: Document, origin: str) -> None:
    n_gpus = len(document.gpu)
    pairs: set[frozenset[int]] = set()
    for index, link in enumerate(document.link):
        pair = frozenset(link.gpus)
        key = f"link[{index}].gpus"
        if not all(0 <= gpu < n_gpus for gpu in pair):
            raise _wrong(origin, key, list(link.gpus), f"{n_gpus} cards are described")
        if len(pair) != 2:
            raise _wrong(origin, key, list(link.gpus), "a card and itself")
        if pair in pairs:
            raise _wrong(origin, key, list(link.gpus), "said twice")
        pairs.add(pair)


def _check_measured(document: Document, origin: str) -> None:
    n_gpus = len(document.gpu)
    for index, measured in enumerate(document.measured):
        key = f"measured[{index}]"
        if not all(0 <= gpu < n_gpus for gpu in measured.gpus):
            raise _wrong(origin, f"{key}.gpus", list(measured.gpus), f"{n_gpus} cards are described")
        if len(set(measured.gpus)) < len(measured.gpus):
            raise _wrong(origin, f"{key}.gpus", list(measured.gpus), "a card twice")
        if len(measured.counts) != len(measured.gpus):
            raise _wrong(origin, f"{key}.counts", list(measured.counts), f"gpus names {len(measured.gpus)}")


def _wrong(origin: str, key: str, value: object, why: str = "") -> ProfileError:
    """One line for one value. `key` is exact: "gpu[1].vram_mib"."""
    reason = f" ({why})" if why else ""
    return ProfileError(f"{origin}: {key} = {_shown(value)}{reason}: {_form(key)}", hint=f"correct {key} in {origin}")


def _form(key: str) -> str:
    return FORMS[re.sub(r"\[\d+\]", "", key)]


def _shown(value: object) -> str:
    """A value as TOML would have it, near enough, in one short line."""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = repr(value) if isinstance(value, str | Sequence | Mapping) else str(value)  # one line whatever is in it
    except RecursionError:
        text = "tables in tables without end"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _explain(said: str, data: Mapping[str, Any], origin: str) -> ProfileError:
    """What msgspec said, with the value it was about: "Expected `int`, got `str` - at `$.gpu[0].vram_mib`"."""
    what, at, where = said.rpartition(" - at `$")
    table = where.rstrip("`").lstrip(".") if at else ""
    what = what if at else said
    if match := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        return _unknown_key(origin, table, match[1])
    if match := re.fullmatch(r"Object missing required field `(.*)`", what):
        key = f"{table}.{match[1]}".lstrip(".")
        return ProfileError(f"{origin}: {key} is missing: {_form(key)}", hint=f"add {match[1]} to {origin}")
    value: Any = data
    for step in re.findall(r"\w+", table):
        value = value[int(step) if isinstance(value, list) else step]
    return _wrong(origin, table, value)


def _unknown_key(origin: str, table: str, name: str) -> ProfileError:
    import difflib

    accepted = TABLES[re.sub(r"\[\d+\]", "", table)].__struct_fields__
    close = difflib.get_close_matches(name, accepted, n=1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    key = name if re.fullmatch(r"[\w-]{1,60}", name) else _shown(name)
    where = f"{table}.{key}" if table else key
    keys = ", ".join(accepted)
    return ProfileError(f"{origin}: unknown key {where}{meant}: accepted are {keys}", hint=f"correct {key} in {origin}")
