"""Where llama.cpp puts each tensor, and what it takes there.

Source: llama.cpp b11434, src/llama-arch.cpp (LLM_TENSOR_INFOS), src/llama-model-loader.cpp (create_tensor),
ggml/src/ggml-cuda/ggml-cuda.cu (get_alloc_size). Checked to the byte against every golden row in tests/data/oracle.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import accumulate
from typing import Final, Literal

from msgspec import Struct

from mgpu.model import Model, Tensor
from mgpu_adapters.llamacpp.architectures import n_trunk

HOST_ALIGNMENT: Final = 32
CUDA_ALIGNMENT: Final = 128

#: CUDA reads quantised rows in steps of this many elements, and pads a tensor's end to it (MATRIX_ROW_PADDING).
CUDA_ROW_PADDING: Final = 512

#: Elements in a block, and its bytes. Types not listed are not quantised (ggml/src/ggml.c, type_traits).
BLOCKS: Final = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q8_1": (32, 36),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "Q8_K": (256, 292), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ3_XXS": (256, 98), "IQ1_S": (256, 50),
    "IQ4_NL": (32, 18), "IQ3_S": (256, 110), "IQ2_S": (256, 82), "IQ4_XS": (256, 136), "IQ1_M": (256, 56),
    "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36), "Q1_0": (128, 18), "Q2_0": (64, 18),
}  # fmt: skip

#: What `--n-cpu-moe` keeps on the host (common/arg.cpp: LLM_FFN_EXPS_REGEX).
EXPERTS: Final = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps")

Patterns = tuple[tuple[re.Pattern[str], bool], ...]
Place = Literal["host", "block", "output", "every"]

#: Tensors outside of the blocks, by the start of their names. Anything else follows the output.
_INPUTS: Final = ("token_embd.", "position_embd.", "token_types.", "per_layer_token_embd.")
_EVERYWHERE: Final = ("rope_freqs.", "rope_factors_long.", "rope_factors_short.")
_FIRST_BLOCK: Final = ("per_layer_model_proj.", "per_layer_proj_norm.", "token_embd_norm.", "hrm.", "nextn.pre_")
_UNUSED: Final = ("masked_embd_",)
_NORM_IS_OUTPUT: Final = frozenset({"lfm2", "lfm2moe"})  # their output norm is named token_embd_norm


#: They create the output before the embedding, and so hold it twice even when both are on the host.
_TWICE: Final = frozenset({"gemma3n", "gemma4"})


def pad(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment


def row_padding(type_: str, n_columns: int) -> int:
    """Bytes CUDA adds behind a quantised tensor so that its last row can be read in whole steps."""
    block = BLOCKS.get(type_.upper())
    short = n_columns % CUDA_ROW_PADDING
    return 0 if block is None or not short else (CUDA_ROW_PADDING - short) // block[0] * block[1]


class Rules(Struct, frozen=True, kw_only=True):
    """How one kind of device stores tensors."""

    alignment: int = HOST_ALIGNMENT
    pad_rows: bool = False  # CUDA and ROCm: quantised rows are padded to 512 elements
    max_tensor_bytes: int | None = None

    def size(self, n_bytes: int, n_columns: int, type_: str) -> int:
        """Bytes a tensor takes, its padding included. `n_columns` is its fastest dimension."""
        if self.pad_rows:
            n_bytes += row_padding(type_, n_columns)
        return pad(n_bytes, self.alignment)


HOST_RULES: Final = Rules()


class Placed(Struct, frozen=True, kw_only=True):
    """One tensor and where it goes when nothing is overridden."""

    tensor: Tensor
    place: Place
    unit: int  # of "block" and "output"; 0 otherwise
    routed: bool  # a routed expert: what --n-cpu-moe moves
    copy: bool = False  # the token embedding a second time, as the output of a model without one


class Table(Struct, frozen=True, kw_only=True):
    """Prefix sums over the units: `fixed[i]` is what units 0 … i-1 take, routed experts aside."""

    fixed: tuple[int, ...]
    experts: tuple[int, ...]
    kept: tuple[int, ...]  # host bytes of what stays there all the same: overridden, or too large for the device
    every: int  # on each device with a block
    host: int  # on the host, wherever the layers are

    def span(self, span: range, host_experts: int) -> int:
        """Bytes of the units in `span`, with the experts of the first `host_experts` blocks elsewhere."""
        start, stop = span.start, span.stop
        first = min(max(start, host_experts), stop)
        return self.fixed[stop] - self.fixed[start] + self.experts[stop] - self.experts[first]


class Weights:
    """All tensors of a model, placed. Depends on the model alone; tables are built when first asked for."""

    def __init__(self, model: Model) -> None:
        self.n_units = model.hyper.n_layer + 1
        self.model = model
        self.placed = tuple(_place(model))
        copies = () if model.architecture in _TWICE else (item for item in self.placed if item.copy)
        self.copied_bytes = sum(pad(item.tensor.n_bytes, HOST_ALIGNMENT) for item in copies)
        self._tables: dict[tuple[Rules, tuple[tuple[str, str], ...]], Table] = {}

    def table(self, rules: Rules, overrides: tuple[tuple[str, str], ...] = ()) -> Table:
        """What the units take on a device with these rules. `overrides`: `--override-tensor`, first match wins."""
        key = (rules, overrides)
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = self._build(rules, overrides)
        return table

    def kept(self, rules: Rules, overrides: tuple[tuple[str, str], ...] = ()) -> frozenset[str]:
        """Names of the tensors outside of the host's share that stay on the host all the same."""
        patterns = _patterns(overrides)
        if rules.max_tensor_bytes is None and not patterns:
            return frozenset()
        placed = (item.tensor for item in self.placed if item.place in ("block", "output"))
        return frozenset(tensor.name for tensor in placed if _stays_on_host(tensor, rules, patterns))

    def _build(self, rules: Rules, overrides: tuple[tuple[str, str], ...]) -> Table:
        patterns = _patterns(overrides)
        fixed, experts, kept = [0] * self.n_units, [0] * self.n_units, [0] * self.n_units
        every = host = 0
        for item in self.placed:
            tensor = item.tensor
            columns = tensor.shape[0] if tensor.shape else 1
            size = rules.size(tensor.n_bytes, columns, tensor.type)
            if item.place == "every":
                every += size
            elif item.place == "host":
                host += pad(tensor.n_bytes, HOST_ALIGNMENT)
            elif _stays_on_host(tensor, rules, patterns):
                kept[item.unit] += 0 if item.copy else pad(tensor.n_bytes, HOST_ALIGNMENT)
            elif item.routed:
                experts[item.unit] += size
            else:
                fixed[item.unit] += size
        return Table(
            fixed=tuple(accumulate(fixed, initial=0)),
            experts=tuple(accumulate(experts, initial=0)),
            kept=tuple(accumulate(kept, initial=0)),
            every=every,
            host=host,
        )


def _patterns(overrides: tuple[tuple[str, str], ...]) -> Patterns:
    return tuple((re.compile(regex), target.upper() == "CPU") for regex, target in overrides)


def _stays_on_host(tensor: Tensor, rules: Rules, patterns: Patterns) -> bool:
    if rules.max_tensor_bytes is not None and tensor.n_bytes > rules.max_tensor_bytes:
        return True
    return next((on_cpu for pattern, on_cpu in patterns if pattern.search(tensor.name)), False)


def _place(model: Model) -> Iterable[Placed]:
    n_layer, trunk = model.hyper.n_layer, n_trunk(model)
    has_output = False
    embedding: Tensor | None = None
    for tensor in model.tensors:
        name = tensor.name
        has_output = has_output or name == "output.weight"
        if name == "token_embd.weight":
            embedding = tensor
        if tensor.layer is not None:
            if tensor.layer < trunk:
                routed = EXPERTS.search(name) is not None
                yield Placed(tensor=tensor, place="block", unit=tensor.layer, routed=routed)
        elif not name.startswith(_UNUSED):
            place, unit = _outside(name, model.architecture, n_layer)
            yield Placed(tensor=tensor, place=place, unit=unit, routed=False)
    if embedding is not None and not has_output:
        yield Placed(tensor=embedding, place="output", unit=n_layer, routed=False, copy=True)


def _outside(name: str, architecture: str, n_layer: int) -> tuple[Place, int]:
    """Where a tensor outside of the blocks goes."""
    if name.startswith(_INPUTS):
        return "host", 0
    if name.startswith(_EVERYWHERE):
        return "every", 0
    if name.startswith(_FIRST_BLOCK) and architecture not in _NORM_IS_OUTPUT:
        return "block", 0
    return "output", n_layer
