"""llama.cpp's tensor mode (`-sm tensor`): bytes of weights and cache on each card, exactly.

Every card is a rank that works on every block: attention is cut by KV heads, feed-forward blocks by columns and rows,
the output by rows of the vocabulary; the rest is on every card. Cuts are rounded down to whole heads and blocks, and
what that leaves over goes to another rank in every block. Source: llama.cpp b11434, src/llama-model.cpp
(llama_meta_device_get_split_state), ggml/src/ggml-backend-meta.cpp. Golden figures: tests/data/oracle/tensor.csv.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import accumulate

from msgspec import Struct

from mgpu.model import Tensor
from mgpu_adapters.llamacpp.architectures import BlockCache
from mgpu_adapters.llamacpp.assign import f32
from mgpu_adapters.llamacpp.blocks import Anatomy
from mgpu_adapters.llamacpp.cache import n_cells, row_bytes
from mgpu_adapters.llamacpp.cuts import WHOLE_STATE, Cut, Part, cut_of, heads_of, state_cuts, whole
from mgpu_adapters.llamacpp.settings import Settings
from mgpu_adapters.llamacpp.weights import Placed, Rules, Weights, pad

Shares = tuple[int, ...]  # elements (or bytes) on each rank


class Kept(Struct, frozen=True, kw_only=True):
    """What a block keeps between tokens: elements of a cell and of a sequence's state, on each rank."""

    block: BlockCache
    k: Shares
    v: Shares
    state_r: Shares
    state_s: Shares


class Alike(Struct, frozen=True, kw_only=True):
    """Blocks that are cut alike: the first of them, and how many blocks of their kind come before each."""

    il: int
    before: tuple[int, ...]


class Cuts:
    """One model for any number of ranks. `split`: proportions given by hand; without, all ranks get the same."""

    def __init__(self, anatomy: Anatomy, weights: Weights, split: tuple[float, ...] = ()) -> None:
        self.anatomy = anatomy
        self.split = split if any(split) else ()
        self.outside = tuple(
            item for item in weights.placed if item.place != "host" and (item.tensor.layer is None or item.copy)
        )
        self._ranks: dict[int, Ranks] = {}

    @cached_property
    def alike(self) -> tuple[Alike, ...]:
        """The blocks that run, by kind."""
        anatomy, hyper = self.anatomy, self.anatomy.hyper
        seen: Counter[tuple[bool, bool]] = Counter()
        kinds: dict[tuple[object, ...], list[tuple[int, int]]] = {}
        for il in range(anatomy.n_trunk):
            recurs, cache = anatomy.recurs[il], anatomy.caches[il]
            tensors = tuple((name, item.shape, item.type) for name, item in anatomy.blocks[il].items())
            kind = (tensors, recurs, cache, hyper.n_head[il], hyper.n_head_kv[il], hyper.n_ff[il])
            order = (recurs, cache.window > 0)
            kinds.setdefault(kind, []).append((il, seen[order]))
            seen[order] += 1
        return tuple(Alike(il=blocks[0][0], before=tuple(n for _, n in blocks)) for blocks in kinds.values())

    def ranks(self, n: int) -> Ranks:
        ranks = self._ranks.get(n)
        if ranks is None:
            ranks = self._ranks[n] = Ranks(self, n)
        return ranks


class Ranks:
    """One model on `n` ranks: bytes on each of them."""

    def __init__(self, cuts: Cuts, n: int) -> None:
        self.n = n
        self._cuts = cuts
        self._anatomy = cuts.anatomy
        given = (*cuts.split[:n], *(0.0,) * (n - len(cuts.split)))
        self._split = tuple(map(f32, given)) if any(given) else ()
        self._weights: dict[Rules, Shares] = {}
        self._kept: tuple[tuple[Kept, int], ...] | None = None

    def weights(self, rules: Rules) -> Shares:
        """Bytes of weights on each rank."""
        sizes = self._weights.get(rules)
        if sizes is None:
            rows = [self._block(il, rules, rotation, times) for il, rotation, times in self._turns()]
            rows += [self._outside(item, rules) for item in self._cuts.outside]
            sizes = self._weights[rules] = _sums(rows, self.n)
        return sizes

    def cache(self, settings: Settings, rules: Rules) -> Shares:
        """Bytes of KV cache and recurrent state on each rank."""
        if self._kept is None:
            self._kept = tuple((self._keep(il, rotation), times) for il, rotation, times in self._turns())
        return _sums((_kept_bytes(kept, times, settings, rules) for kept, times in self._kept), self.n)

    @property
    def alike(self) -> tuple[Alike, ...]:
        """The model's blocks by kind."""
        return self._cuts.alike

    def elements(self, il: int, name: str) -> Shares | None:
        """How much of the cut dimension of a weight of block `il` is on each rank; None: each holds all of it."""
        cut = cut_of(self._anatomy, il, name, self.n)
        return None if cut is None else self._shares(cut, 0)

    def _turns(self) -> Iterator[tuple[int, int, int]]:
        """Blocks that are alike to the byte on every rank: one of them, the rank that comes first, and their number."""
        for alike in self._cuts.alike:
            for rotation, times in Counter(before % self.n for before in alike.before).items():
                yield alike.il, rotation, times

    def _block(self, il: int, rules: Rules, rotation: int, times: int) -> Shares:
        rows = (
            self._sizes(tensor, cut_of(self._anatomy, il, name, self.n), rules, rotation)
            for name, tensor in self._anatomy.blocks[il].items()
        )
        return tuple(size * times for size in _sums(rows, self.n))

    def _outside(self, item: Placed, rules: Rules) -> Shares:
        """A tied embedding is no output to llama.cpp here: it is not cut."""
        tensor, cut = item.tensor, None
        if tensor.name in ("output.weight", "output.bias"):
            axis = len(tensor.shape) - 1
            cut = whole(tensor.shape[axis], 1, axis)
        return self._sizes(tensor, cut, rules, self._anatomy.n_trunk % self.n)

    def _sizes(self, tensor: Tensor, cut: Cut | None, rules: Rules, rotation: int) -> Shares:
        """Bytes of one tensor on each rank."""
        if rules.max_tensor_bytes is not None and tensor.n_bytes > rules.max_tensor_bytes:
            return (0,) * self.n  # it stays on the host
        columns = tensor.shape[0] if tensor.shape else 1
        if cut is None:
            return (rules.size(tensor.n_bytes, columns, tensor.type),) * self.n
        extent = tensor.shape[cut.axis]
        return tuple(
            rules.size(tensor.n_bytes * share // extent, columns if cut.axis else share, tensor.type)
            for share in self._shares(cut, rotation)
        )

    def _shares(self, cut: Cut, rotation: int) -> Shares:
        """Elements along the cut on each rank."""
        return _sums((self._part(part, rotation) for part in cut.parts), self.n)

    def _part(self, part: Part, rotation: int) -> Shares:
        order = [(rank + rotation) % self.n for rank in range(self.n)]
        split = list(accumulate((self._split[rank] for rank in order), lambda a, b: f32(a + b))) if self._split else []
        shares, low = [0] * self.n, 0
        for position, rank in enumerate(order):
            high = part.extent
            if position < self.n - 1:
                # In float32, as in C: the integer of the even split becomes one, too.
                even = part.extent * (position + 1) // self.n
                high = int(f32(f32(f32(part.extent) * split[position]) / split[-1]) if split else f32(even))
                high -= high % part.step
            shares[rank] = (high - low) * part.repeats
            low = high
        return tuple(shares)

    def _keep(self, il: int, rotation: int) -> Kept:
        anatomy = self._anatomy
        block, none = anatomy.caches[il], (0,) * self.n
        k, v, r, s = none, none, (block.state_r,) * self.n, (block.state_s,) * self.n
        if block.k:
            heads = heads_of(anatomy, il, self.n)
            k = self._shares(whole(block.k, heads.k), rotation)
            v = self._shares(whole(block.v, heads.v), rotation)
        if (block.state_r or block.state_s) and anatomy.model.architecture not in WHOLE_STATE:
            r, s = (self._shares(cut, rotation) for cut in state_cuts(anatomy, il))
        return Kept(block=block, k=k, v=v, state_r=r, state_s=s)


def _kept_bytes(kept: Kept, times: int, settings: Settings, rules: Rules) -> Shares:
    """Bytes on each rank of `times` such blocks' caches."""
    cells = n_cells(kept.block, settings) * settings.n_stream
    n_seqs = max(settings.n_parallel, 1)

    def size(k: int, v: int, r: int, s: int) -> int:
        total = sum(pad(4 * n * n_seqs, rules.alignment) for n in (r, s))
        for type_, n in ((settings.type_k, k), (settings.type_v, v)):
            total += rules.size(row_bytes(type_, n) * cells, n, type_) if n else 0
        return total * times

    return tuple(map(size, kept.k, kept.v, kept.state_r, kept.state_s))


def _sums(rows: Iterable[Shares], n: int) -> Shares:
    """Rank by rank."""
    totals = [0] * n
    for row in rows:
        for rank, size in enumerate(row):
            totals[rank] += size
    return tuple(totals)
