"""What ExLlamaV2 and ExLlamaV3 hold on each card, from a model's headers alone. A prediction: nothing here is measured.

Both keep the token embedding in system RAM and allocate the whole cache when they load; weights are stored as in the
files. The units of a plan are the blocks and, as the last unit, the final norm with the head.

V2: ExLlamaV2 0.3.2 (da07fac, its last) `exllamav2/{model,attn,mlp,moe_mlp,linear,cache,config,ext}.py`.
V3: ExLlamaV3 1.4.1 (4f8ad01) and 1.6.5 `exllamav3/{cache,modules,model}/`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Final, Literal

from msgspec import Struct

from mgpu.errors import UsageError
from mgpu.model import Model
from mgpu.plan import DeviceBytes
from mgpu.units import MIB
from mgpu_adapters.exllama.modules import ModuleKind, modules, n_blocks, widths

V2Cache = Literal["FP16", "FP8", "Q8", "Q6", "Q4"]

#: Tokens in a page of the cache. V3: `constants.PAGE_SIZE`. V2: TabbyAPI rounds cache_size and chunk_size up to it.
PAGE: Final = 256

#: A CUDA context with torch. No figure in ExLlama's sources; Ollama sets this aside (`ml/device.go` MinimumMemory).
CUDA_CONTEXT: Final = 457 * MIB

#: V2: weights dequantised at once, in elements of 2 B (`config.max_dq_size`).
MAX_DQ_ELEMENTS: Final = 512 << 20
#: V3: columns of a weight matrix reconstructed to 2 B at once (`modules/quant/exl3.py` MAX_RECONSTRUCT_SLICE_N).
RECONSTRUCT_COLUMNS: Final = 32768
#: V3 1.6.5: must stay free beyond the largest transient, where layers are split (EXL3_AUTOSPLIT_MARGIN_MB).
V3_MARGIN: Final = 256 * MIB
#: V3: rows of logits in the largest forward pass (`Model.load_gen` max_output_size).
V3_LOGIT_ROWS: Final = 32
#: V3: tokens beyond the window that a sliding layer's ring holds (`modules/sliding_attn.py` sliding_window_overp).
WINDOW_MARGIN: Final = 2 * PAGE

#: V2 cache: bits of an element of K and of V. The quantised ones have a 2 B scale for 32 elements (`cache.py`).
V2_CACHE_BITS: Final[dict[V2Cache, tuple[float, float]]] = {
    "FP16": (16, 16),
    "FP8": (8, 8),
    "Q8": (8.5, 8.5),
    "Q6": (8.5, 4.5),
    "Q4": (4.5, 4.5),
}
#: V2: one module for attention and feed-forward (`architecture.py` parallel_decoder_blocks).
_PARALLEL: Final = frozenset({"cohere", "cohere2"})
#: V3: every second layer, from the first, keeps only its window (`SlidingAttention`). Gemma 2 and 3 keep all of it.
_ALTERNATING: Final = frozenset({"gpt_oss"})


class V2Settings(Struct, frozen=True, kw_only=True):
    """How V2 is asked to run. `cache_tokens` (TabbyAPI's cache_size) is for all users together."""

    max_seq_len: int
    cache_tokens: int | None = None  # None: max_seq_len
    cache: V2Cache = "FP16"
    chunk: int = 2048  # config.max_input_len; TabbyAPI: chunk_size
    max_output_len: int | None = 16  # as TabbyAPI sets it; None: as many logits as the chunk has tokens
    flash_attn: bool = True  # or xformers

    @property
    def tokens(self) -> int:
        return pages(self.cache_tokens or self.max_seq_len)


class V3Settings(Struct, frozen=True, kw_only=True):
    """How V3 is asked to run. Bits of the cache: 16 (no quantisation), or 2 to 8 for K and for V."""

    cache_tokens: int
    k_bits: int = 16
    v_bits: int = 16
    chunk: int = 2048  # max_chunk_size; 4096 in the command line of 1.6.5
    slots: int = 4  # sequences with a state of their own, where layers keep one (TabbyAPI: 4)

    @property
    def tokens(self) -> int:
        return pages(self.cache_tokens)


def pages(tokens: int) -> int:
    """Tokens rounded up to whole pages."""
    return -(-tokens // PAGE) * PAGE


class Scratch(Struct, frozen=True, kw_only=True):
    """A V2 module's temporary bytes: `fixed` is allocated, `counted` and `scores` are what the manual split reckons."""

    fixed: int = 0
    counted: int = 0
    scores: int = 0


class FootprintV2:
    """ExLlamaV2 with these settings. Immutable."""

    def __init__(self, model: Model, settings: V2Settings) -> None:
        self.model = model
        self.settings = settings
        self.widths = widths(model)
        self.modules = modules(model, "exl2", halves=model.architecture not in _PARALLEL)
        self.n_units = n_blocks(model) + 1

    @cached_property
    def kv_layer(self) -> int:
        """Cache bytes of one layer; every layer has as many, sliding or not."""
        return sum(
            int(self.settings.tokens * self.widths.kv * bits) // 8 for bits in V2_CACHE_BITS[self.settings.cache]
        )

    @property
    def kv_copy(self) -> int:
        """One layer of K and V in 2 B, on each device with layers of a cache that is not FP16 (`touch_device`)."""
        return 0 if self.settings.cache == "FP16" else 4 * self.settings.tokens * self.widths.kv

    @property
    def counted_once(self) -> int:
        """What the manual split subtracts from every device first: sin and cos, hidden state, mask (batch of 1)."""
        rows = self.settings.chunk
        return self._sin_cos + 2 * rows * self.widths.hidden + 2 * rows * rows

    @property
    def _sin_cos(self) -> int:
        return 4 * self.widths.head_dim * self.settings.max_seq_len

    def scratch(self, kind: ModuleKind) -> Scratch:
        """Temporary bytes of one module (`scratch_space_fixed`, `scratch_space`, `temp_attn_size`)."""
        if kind == "attention":
            return self._attention_scratch()
        if kind == "ffn":
            fixed = self._ffn_scratch()
            return Scratch(fixed=fixed, counted=fixed)
        if kind == "block":  # its attention's scores are not asked for: the loader looks at attention modules only
            attention, ffn = self._attention_scratch(), self._ffn_scratch()
            return Scratch(fixed=max(attention.fixed, ffn), counted=max(attention.counted, ffn))
        if kind == "head":
            fixed = _dq(self.widths.hidden, self.widths.vocab)
            return Scratch(fixed=fixed, counted=fixed)
        return Scratch()

    def _attention_scratch(self) -> Scratch:
        w, rows = self.widths, self.settings.chunk
        fixed = _rows(rows, max(w.q, w.hidden)) + _dq(w.hidden, w.q)
        # Repeated K and V are reckoned with the whole context, though flash attention never makes them.
        repeated = 0 if w.n_head_kv == w.n_head else 4 * self.settings.max_seq_len * w.q + 128
        counted = fixed + _rows(rows, w.q) + 2 * _rows(rows, w.kv) + repeated
        scores = min(rows, self.settings.max_seq_len) ** 2
        if self.settings.flash_attn:
            scores = int(scores // (rows / 190))
        return Scratch(fixed=fixed, counted=counted, scores=4 * scores * w.n_head + 128)

    def _ffn_scratch(self) -> int:
        w, rows = self.widths, self.settings.chunk
        dq = _dq(w.hidden, w.ffn)
        if w.n_expert:
            return 2 * _rows(rows, w.hidden) + 2 * _rows(rows, w.ffn) + _rows(rows, w.n_expert) + dq
        return _rows(rows, w.hidden) + 2 * _rows(rows, max(w.hidden, w.ffn)) + dq

    def live(self, *, has_head: bool) -> int:
        """A forward pass outside of the scratch: hidden state twice, q, k, v, result; logits in 2 and in 4 B."""
        w, rows = self.widths, self.settings.chunk
        logits = 6 * min(rows, self.settings.max_output_len or rows) * w.vocab if has_head else 0
        return max(2 * rows * (2 * w.hidden + 2 * w.q + 2 * w.kv), logits)

    def device(self, span: range) -> DeviceBytes:
        """Bytes on a device with the units of `span` (non-empty), loaded by a manual split."""
        own = [module for module in self.modules if module.unit in span]
        n_layers = len(span) - (self.n_units - 1 in span)
        fixed = max(self.scratch(module.kind).fixed for module in own)
        compute = fixed + self._sin_cos + self.live(has_head=self.n_units - 1 in span)
        return DeviceBytes(
            weights=sum(module.stored + module.made for module in own),
            kv=n_layers * self.kv_layer,
            compute=compute + (self.kv_copy if n_layers else 0),
            overhead=CUDA_CONTEXT + sum(module.slack for module in own),
        )


def _rows(rows: int, width: int) -> int:
    """A temporary of 2 B elements, as V2 reckons it."""
    return 2 * rows * width + 128


def _dq(n_in: int, n_out: int) -> int:
    return 2 * min(n_in * n_out, MAX_DQ_ELEMENTS)


class FootprintV3:
    """ExLlamaV3 with these settings. Immutable. The transient sizes bound torch's own: an estimate."""

    def __init__(self, model: Model, settings: V3Settings) -> None:
        bits = (settings.k_bits, settings.v_bits)
        if bits != (16, 16) and not all(2 <= each <= 8 for each in bits):
            raise UsageError(
                f"ExLlamaV3 has no cache of {bits[0]},{bits[1]} bits", hint="use 2 to 8 for both, or 16,16"
            )
        self.model = model
        self.settings = settings
        self.widths = widths(model)
        self.modules = modules(model, "exl3", halves=False)
        self.n_units = n_blocks(model) + 1

    @cached_property
    def kv(self) -> tuple[int, ...]:
        """Cache bytes of each block: paged cache, latent cache, window, or recurrent state."""
        return tuple(self._kv(block) for block in range(self.n_units - 1))

    def _kv(self, block: int) -> int:
        n_head_kv = self.model.hyper.n_head_kv[block]
        rank = self._number("kv_lora_rank")
        tokens = self.settings.tokens
        if rank:  # MLA: the latent as K, the shared rope key never quantised
            return tokens * (_row(rank, self.settings.k_bits) + 2 * self._number("qk_rope_head_dim"))
        if not n_head_kv:
            return self._recurrent()
        width = n_head_kv * self.widths.head_dim
        window = self._window(block)
        if window:
            return 4 * self.settings.slots * pages(window + WINDOW_MARGIN) * width
        return tokens * (_row(width, self.settings.k_bits) + _row(width, self.settings.v_bits))

    def kv_read(self, block: int, depth: int) -> float:
        """Bytes a token of one user reads in a block's cache when `depth` tokens are in it; its whole state, twice."""
        held = self.kv[block]
        if not self.model.hyper.n_head_kv[block]:
            return 2 * held / self.settings.slots
        window = self._window(block)
        if window:
            return held / self.settings.slots * min(depth / pages(window + WINDOW_MARGIN), 1.0)
        return held * min(depth / self.settings.tokens, 1.0)

    def _window(self, block: int) -> int:
        """Tokens that a sliding layer's ring is for; 0 for a layer that keeps all, or a latent."""
        window = self._number("sliding_window")
        slides = self.model.architecture in _ALTERNATING and block % 2 == 0 and not self._number("kv_lora_rank")
        return window if slides else 0

    def _recurrent(self) -> int:
        """Gated delta net: its state in 4 B (1.6: 2 B), the convolution's in 2 B (`modules/gated_delta_net.py`)."""
        k_dim, v_dim = self._number("linear_key_head_dim"), self._number("linear_value_head_dim")
        n_k, n_v = self._number("linear_num_key_heads"), self._number("linear_num_value_heads")
        conv = (2 * n_k * k_dim + n_v * v_dim) * self._number("linear_conv_kernel_dim")
        return self.settings.slots * (4 * n_v * k_dim * v_dim + 2 * conv)

    def _number(self, key: str) -> int:
        value = self.model.metadata.get(key)
        return value if isinstance(value, int) else 0

    def transient(self, kind: ModuleKind) -> int:
        """What a forward pass of one chunk adds at most: residual (4 B), activations, and one reconstructed matrix."""
        w, rows = self.widths, self.settings.chunk
        stream = rows * (4 * w.hidden + 2 * w.hidden + 4 * w.hidden)  # residual, normed input, result
        if kind == "block":
            attention = 2 * rows * (2 * w.q + 2 * w.kv) + _reconstructed(w.hidden, w.q)
            ffn = rows * 6 * w.ffn + max(_reconstructed(w.hidden, w.ffn), _reconstructed(w.ffn, w.hidden))
            routed = 2 * rows * w.n_used * w.hidden
            return stream + max(attention, ffn + routed)
        if kind == "head":
            logits = min(rows, V3_LOGIT_ROWS) * (6 * w.vocab + 8 * w.hidden)
            return logits + _reconstructed(w.hidden, w.vocab)
        return stream

    def device(self, span: range) -> DeviceBytes:
        """Bytes on a device with the units of `span` (non-empty). One that has them all is loaded without a margin."""
        own = [module for module in self.modules if module.unit in span]
        margin = V3_MARGIN if len(span) < self.n_units else 0
        return DeviceBytes(
            weights=sum(module.stored for module in own),
            kv=sum(self.kv[span.start : span.stop]),
            compute=max(self.transient(module.kind) for module in own),
            overhead=CUDA_CONTEXT + margin + sum(module.slack for module in own),
        )


def _row(width: int, bits: int) -> int:
    """Bytes of one token's row: 2 B elements, or `bits` each and a 2 B scale for 32 of them (`cache/quant.py`)."""
    return 2 * width if bits == 16 else width // 32 * (4 * bits + 2)


def _reconstructed(n_in: int, n_out: int) -> int:
    return 2 * n_in * min(n_out, RECONSTRUCT_COLUMNS)
