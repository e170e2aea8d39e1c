"""`gpu_split` lists: which layers a loader will put where, and the list that makes it put them where they are planned.

Every loader fills the devices in order with what comes next, and never goes back. What it counts differs:

| loader     | list in | weights | cache | temporary | sees other processes                             |
|------------|---------|---------|-------|-----------|--------------------------------------------------|
| V2 manual  | GiB     | yes     | no    | its own reckoning | no: the list is all it looks at           |
| V2 auto    | (bytes reserved) | yes | yes | measured | yes: until memory runs out                        |
| V3 manual  | GiB     | yes     | yes   | measured  | 1.4.1: no (a cap on torch alone); 1.6.5: yes       |
| V3 auto    | (GiB reserved)   | yes | yes | measured | yes                                               |
| V2 tensor  | GiB     | yes     | yes   | no        | no                                                 |
| V3 tensor  | GiB     | yes     | yes   | yes       | no: a target, grown by tenths when it is too small |

Sources: ExLlamaV2 0.3.2 `model.py` (set_device_map, load_autosplit_gen), `tensor_p.py`; ExLlamaV3 1.4.1 and 1.6.5
`model/model.py`, `model/model_ls.py`, `model/model_tp.py`, `util/memory.py`. "GB" in their help is GiB in their code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Literal

from msgspec import Struct

from mgpu.errors import DoesNotFitError, UsageError
from mgpu.units import GIB, MIB, gib
from mgpu_adapters.exllama.memory import CUDA_CONTEXT, V2_CACHE_BITS, V3_MARGIN, FootprintV2, FootprintV3

V3Release = Literal["1.4.1", "1.6.5"]

#: V2 auto: kept free on the first device and on the others, and beside that while it probes (`load_autosplit_gen`).
V2_RESERVES: Final = (192 * MIB, 64 * MIB)
V2_PROBE_RESERVE: Final = 256 * MIB
#: V3 auto: kept free on each device (`Model.load_gen` reserve_per_device). TabbyAPI: 96 MB on the first, its default.
V3_RESERVE: Final = GIB // 2

#: Steps of a list entry: 1 MiB is as fine as a person would write.
_STEP: Final = MIB
#: What the last device of a list is given beyond what its units take.
_LAST_ROOM: Final = GIB
#: Without tensor parallelism in V2 (`architecture.py` supports_tp). Unknown ones are loaded as Llama, and have it.
_V2_NO_TENSOR: Final = frozenset({
    "cohere", "cohere2", "dbrx", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_bigcode", "granite",
    "index", "internlm2", "llava", "minicpm", "mistral3", "mixtral", "orion", "phi3", "qwen2_5_vl", "qwen2_vl",
    "starcoder2", "yi",
})  # fmt: skip


class Part(Struct, frozen=True, kw_only=True):
    """What is placed as a whole. `held` bytes stay; of `scratch`, and of `scores`, a device needs the largest."""

    unit: int
    held: int
    scratch: int = 0
    scores: int = 0
    floats: bool = False  # so small that it may stay with the unit before


class Loader(Struct, frozen=True, kw_only=True):
    """A loader and a model: `once` bytes on every device beside the parts.

    `keeps_largest`: the largest temporary of any part on the device must fit; else only that of the part just placed.
    """

    parts: tuple[Part, ...]
    once: int = 0
    keeps_largest: bool = True
    complaint: str  # the loader's own words when the devices do not suffice


def v2_manual(footprint: FootprintV2) -> Loader:
    """V2's `load`, with a list. The cache comes afterwards, and is not in it."""
    parts: list[Part] = []
    for module in footprint.modules:
        scratch = footprint.scratch(module.kind)
        # RMSNorm and LayerNorm of the model itself are reckoned by hidden size; the bytes in the file are as many.
        parts.append(
            Part(
                unit=module.unit,
                held=module.stored,
                scratch=scratch.counted,
                scores=scratch.scores,
                floats=module.kind == "norm",
            )
        )
    return Loader(parts=tuple(parts), once=footprint.counted_once, complaint="Insufficient space in device allocation")


def v2_auto(footprint: FootprintV2) -> Loader:
    """V2's `load_autosplit`: the cache comes with the layers; the largest fixed scratch goes to every device."""
    fixed = max(footprint.scratch(module.kind).fixed for module in footprint.modules)
    parts = tuple(
        Part(
            unit=module.unit,
            held=module.held + (footprint.kv_layer if module.kind in {"attention", "block"} else 0),
            scratch=footprint.live(has_head=module.kind == "head"),
            floats=module.kind == "norm",
        )
        for module in footprint.modules
    )
    once = fixed + footprint.counted_once + footprint.kv_copy
    return Loader(parts=parts, once=once, complaint="Insufficient VRAM for model and cache")


def v3_layers(footprint: FootprintV3, release: V3Release = "1.6.5") -> Loader:
    """V3's layer split, with either list: each module is loaded with its cache, and run once."""
    parts = tuple(
        Part(
            unit=module.unit,
            held=module.held + (footprint.kv[module.unit] if module.kind == "block" else 0),
            scratch=footprint.transient(module.kind),
            floats=module.kind == "norm",
        )
        for module in footprint.modules
    )
    complaint = "Insufficient VRAM in split for model and cache"
    return Loader(parts=parts, keeps_largest=release != "1.4.1", complaint=complaint)


def v2_auto_budgets(free: Sequence[int], reserve: Sequence[int] | None = None) -> tuple[int, ...]:
    """What V2's autosplit can fill on each device. `free` is the driver's, before the process has a context."""
    if reserve is None:
        reserve = (V2_RESERVES[0], *[V2_RESERVES[1]] * (len(free) - 1))
    return tuple(each - CUDA_CONTEXT - V2_PROBE_RESERVE - kept for each, kept in zip(free, reserve, strict=True))


def v3_use_budgets(use: Sequence[float], free: Sequence[int], release: V3Release = "1.6.5") -> tuple[int, ...]:
    """What V3 may fill with `use_per_device` (GiB). Devices that are not listed, or with 0, are not used."""
    listed = [*use, *[0.0] * (len(free) - len(use))]
    budgets = [int(each * GIB) for each in listed]
    if release == "1.4.1":
        return tuple(budgets)  # blind: more than what is free is an error later
    return tuple(
        min(budget, each - CUDA_CONTEXT - V3_MARGIN) if budget > 0 else 0
        for budget, each in zip(budgets, free, strict=True)
    )


def v3_reserve_budgets(
    free: Sequence[int], reserve: Sequence[float] = (), release: V3Release = "1.6.5"
) -> tuple[int, ...]:
    """What V3 may fill with `reserve_per_device` (GiB): 0.5 where not listed; a negative one excludes the device."""
    margin = 0 if release == "1.4.1" else V3_MARGIN
    budgets: list[int] = []
    for index, each in enumerate(free):
        kept = int(reserve[index] * GIB) if index < len(reserve) else V3_RESERVE
        budgets.append(0 if kept < 0 else each - CUDA_CONTEXT - max(kept, margin))
    return tuple(budgets)


def _peak(loader: Loader, parts: Sequence[Part]) -> int:
    """Bytes a device must have for the loader to place the last of `parts` after the others."""
    if not parts:
        return 0
    looked_at = parts if loader.keeps_largest else parts[-1:]
    temporary = max(part.scratch for part in looked_at) + max(part.scores for part in looked_at)
    return loader.once + sum(part.held for part in parts) + temporary


def fill(loader: Loader, budgets: Sequence[float]) -> tuple[int, ...]:
    """The device of each part, as the loader will place it. Raises `DoesNotFitError`."""
    device, first = 0, 0
    placed: list[int] = []
    for index in range(len(loader.parts)):
        while device < len(budgets) and _peak(loader, loader.parts[first : index + 1]) > budgets[device]:
            device, first = device + 1, index
        if device == len(budgets):
            part = loader.parts[index]
            raise DoesNotFitError(
                f"the loader will stop at unit {part.unit}: {loader.complaint}",
                hint="give it more memory in the split, or use a smaller cache",
            )
        placed.append(device)
    return tuple(placed)


def unit_counts(loader: Loader, placed: Sequence[int], n_devices: int) -> tuple[int, ...]:
    """Units on each device. A unit is where its last part is: the head, or a block's feed-forward."""
    where = {part.unit: device for part, device in zip(loader.parts, placed, strict=True)}
    counts = [0] * n_devices
    for device in where.values():
        counts[device] += 1
    return tuple(counts)


def gpu_split(loader: Loader, counts: Sequence[int], limits: Sequence[int] | None = None) -> tuple[float, ...]:
    """The list, in GiB, with which the loader places `counts` units on the devices. Raises `DoesNotFitError`.

    Each entry is in the middle between what its units take and what one part more would: an error of half a part in
    the estimate changes nothing. The last has room to spare. `limits` are bytes at most for each device; V2's manual
    list needs none, it is a reckoning of its own and not what is allocated.
    """
    used = [device for device, count in enumerate(counts) if count]
    split = [0.0] * len(counts)
    start = 0
    for device in used:
        stop = start + _n_parts(loader.parts[start:], counts[device])
        limit = None if limits is None else limits[device]
        split[device] = _entry(loader, range(start, stop), device, limit, last=device == used[-1]) / GIB
        start = stop
    return tuple(split)


def _entry(loader: Loader, span: range, device: int, limit: int | None, *, last: bool) -> int:
    """Bytes for a device that is to hold the parts of `span` and no other."""
    low = _most(loader, loader.parts[span.start : span.stop])
    if limit is not None and low > limit:
        raise DoesNotFitError(
            f"device {device} of the split needs {gib(low)}, it may have {gib(limit)}",
            hint="plan fewer layers on it, or a smaller cache",
        )
    if last:
        return -(-(low + _LAST_ROOM) // _STEP) * _STEP if limit is None else limit
    high = _next(loader, span)
    if high <= low:
        raise DoesNotFitError(
            f"the loader cannot be kept from placing unit {loader.parts[span.stop].unit} on device {device} too",
            hint="plan it there",
        )
    return min(_between(low, high), high if limit is None else limit)


def _n_parts(parts: Sequence[Part], n_units: int) -> int:
    """How many of `parts` make the next `n_units` units."""
    if not parts:
        return 0
    end = parts[0].unit + n_units
    return sum(part.unit < end for part in parts)


def _most(loader: Loader, parts: Sequence[Part]) -> int:
    """Bytes with which all of `parts` can be placed. Later parts may ask for less, where only the last is looked at."""
    return max(_peak(loader, parts[: index + 1]) for index in range(len(parts)))


def _next(loader: Loader, span: range) -> int:
    """Bytes with which the part after `span` would fit too. One that floats does not count: the next one does."""
    stop = span.stop
    while loader.parts[stop].floats:
        stop += 1
    return _peak(loader, loader.parts[span.start : stop + 1])


def _between(low: int, high: int) -> int:
    """The middle of `low <= x < high`, in whole steps if there is one."""
    middle = (low + high) // 2
    stepped = middle // _STEP * _STEP
    return stepped if stepped >= low else middle


class Shares(Struct, frozen=True, kw_only=True):
    """What each device has of a tensor-parallel model: heads of K and V, and columns."""

    kv_heads: tuple[int, ...]
    ffn: tuple[int, ...]
    hidden: tuple[int, ...]
    vocab: tuple[int, ...]


def v2_tensor_shares(footprint: FootprintV2, gpu_split_gib: Sequence[float]) -> Shares:
    """How V2 shares a model out by a list (GiB, cache included) (`TPContext.define_split`). Raises `UsageError`."""
    w, architecture = footprint.widths, footprint.model.architecture
    pipeline = "use --split pipeline"
    if architecture in _V2_NO_TENSOR:
        raise UsageError(f"ExLlamaV2 has no tensor parallelism for {architecture}", hint=pipeline)
    if w.ffn % 128:
        raise UsageError(
            f"ExLlamaV2 cannot share out a feed-forward width of {w.ffn}: no multiple of 128", hint=pipeline
        )
    mib = [each * 1024 for each in gpu_split_gib]
    if min(mib, default=0) < 0 or not sum(mib):
        raise UsageError(f"not a split of memory: {list(gpu_split_gib)}", hint="give each card's GiB, in order")
    heads = _apportion(w.n_head_kv, mib)
    bits = sum(V2_CACHE_BITS[footprint.settings.cache])
    cache = bits / 8 * w.kv * (footprint.n_units - 1) * footprint.settings.tokens
    taken = [cache, *(module.stored for module in footprint.modules if module.kind == "attention")]
    ratio = [each / w.n_head_kv for each in heads]
    for n_bytes in taken:
        mib = [max(0, each - int(n_bytes * part / MIB)) for each, part in zip(mib, ratio, strict=True)]
    if not sum(mib):
        raise DoesNotFitError(
            "the split has no room beside cache and attention", hint="give it more memory in the split"
        )
    return Shares(
        kv_heads=heads,
        ffn=_times(128, _apportion(w.ffn // 128, mib, least=2)),
        hidden=_times(32, _apportion(w.hidden // 32, mib, least=8)),
        vocab=_times(32, _apportion(w.vocab // 32, mib, least=16)),
    )


def v3_tensor_targets(usable: Sequence[int]) -> tuple[float, ...]:
    """V3's list for tensor parallelism, GiB: what each device may be given, context and margin apart.

    The loader shares every layer out in proportion to what is left of these, and goes over them if it must.
    """
    return tuple(max(each - CUDA_CONTEXT - V3_MARGIN, 0) // _STEP * _STEP / GIB for each in usable)


def _times(unit: int, shares: Iterable[int]) -> tuple[int, ...]:
    return tuple(unit * share for share in shares)


def _apportion(total: int, weights: Sequence[float], least: int = 0) -> tuple[int, ...]:
    """`total` by largest remainder. Shares below `least` go, one by one, to the then smallest of the others."""
    ideal = [total * weight / sum(weights) for weight in weights]
    shares = [int(each) for each in ideal]
    by_remainder = sorted(range(len(shares)), key=lambda index: (shares[index] - ideal[index], index))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    homeless = sum(share for share in shares if share < least)
    shares = [share if share >= least else 0 for share in shares]
    for _ in range(homeless):
        smallest = min((index for index, share in enumerate(shares) if share), key=shares.__getitem__, default=-1)
        shares[smallest] += 1
    return tuple(shares)
