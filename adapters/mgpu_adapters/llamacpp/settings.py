"""llama-server's flags that change memory or placement, resolved to what the server will really use."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

SplitMode = Literal["none", "layer", "tensor"]  # `row` is refused


class Settings(Struct, frozen=True, kw_only=True):
    """`-c -np -kvu -b -ub -fa -ctk -ctv -nkvo --swa-full -ncmoe -ngl -ts -sm`, by llama.cpp's own names and defaults.

    `n_ctx` is the whole context as passed with `-c` (for all slots); see `n_ctx_seq` for what one slot gets.
    """

    n_ctx: int
    n_parallel: int = 1
    kv_unified: bool = False
    n_batch: int = 2048
    n_ubatch: int = 512
    flash_attn: bool = True
    type_k: str = "f16"
    type_v: str = "f16"
    kv_offload: bool = True
    swa_full: bool = False
    n_cpu_moe: int = 0
    n_gpu_layers: int | None = None  # None: mgpu decides
    tensor_split: tuple[float, ...] | None = None  # None: mgpu decides
    split_mode: SplitMode | None = None  # None: mgpu decides
    override_tensor: tuple[tuple[str, str], ...] = ()  # (regex, buffer type), first match wins
    n_outputs: int | None = None  # tokens of a batch that have logits; None: one of each slot, as llama-server

    @property
    def n_ctx_seq(self) -> int:
        """Cells one sequence gets: llama.cpp pads to 256 (src/llama-context.cpp, b11434)."""
        total = _pad256(self.n_ctx)
        return total if self.kv_unified else _pad256(total // self.n_parallel)

    @property
    def n_stream(self) -> int:
        """Independent caches: one per slot unless unified."""
        return 1 if self.kv_unified else self.n_parallel

    @property
    def u(self) -> int:
        """Tokens in one physical batch: `min(n_ubatch, n_batch, n_ctx)`."""
        return min(self.n_ubatch, self.n_batch, self.n_ctx_seq * self.n_stream)


def _pad256(n: int) -> int:
    return -(-n // 256) * 256
