"""What llama.cpp knows of an architecture beyond the file: which blocks attend to a window, recur, or share a cache.

Source: llama.cpp b11434, src/models/*.cpp (load_arch_hparams), src/llama-hparams.cpp, src/llama-model.cpp
(create_memory).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from msgspec import Struct

from mgpu.model import Hyperparameters, MetadataValue, Model


class Window(Struct, frozen=True, kw_only=True):
    """Sliding-window attention of an architecture, where the file does not say: block il is windowed iff
    `il % period < period - 1`, or `il % period != 0` with `dense_first`. Period 0: all blocks."""

    period: int
    size: int = 0  # tokens, when the key is absent; 0: no window then
    dense_first: bool = False
    forced: bool = False  # `size` holds whatever the file says (when it has the key, or always with `always`)
    always: bool = False  # windowed also when the key is absent


_WINDOWS: Final = {
    "afmoe": Window(period=4),
    "cohere2": Window(period=4),
    "cohere2moe": Window(period=4, dense_first=True),
    "dots3note": Window(period=1),
    "exaone-moe": Window(period=4, size=128),
    "exaone4": Window(period=4, size=4096),
    "gemma2": Window(period=2, size=4096),
    "gemma3": Window(period=6),
    "gemma3n": Window(period=5),
    "gemma4": Window(period=1),
    "gpt-oss": Window(period=2),
    "granite_swa": Window(period=1),
    "laguna": Window(period=4, dense_first=True),
    "lfm2": Window(period=0),
    "llama4": Window(period=4, size=8192, forced=True, always=True),
    "maple": Window(period=1),
    "mellum": Window(period=4),
    "mimo2": Window(period=1),
    "muse-glimmer": Window(period=4),
    "olmo2": Window(period=4),
    "plamo3": Window(period=8),
    "smallthinker": Window(period=4, size=4096, dense_first=True, forced=True),
    "spark2_5": Window(period=1),
    "step35": Window(period=1),
}

#: Encoders and diffusion models: no cache at all (create_memory).
_CACHELESS: Final = frozenset({
    "bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert", "modern-bert",
    "wavtokenizer-dec", "gemma-embedding", "dream", "llada", "llada-moe", "rnd1", "clef",
})  # fmt: skip

#: Every block recurs (llm_arch_is_recurrent).
_RECURRENT: Final = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})

#: Recurrent blocks are those without KV heads.
_HYBRID_BY_HEADS: Final = frozenset({
    "jamba", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "kimi-linear", "bailingmoe3", "kimi-k3", "glm5-next",
})  # fmt: skip

#: Every n-th block attends, the others recur: the default n, when `full_attention_interval` is absent.
_HYBRID_BY_INTERVAL: Final = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4, "minimax-01": 8}

_NEMOTRON_H: Final = frozenset({"nemotron_h", "nemotron_h_moe"})

#: Flash attention is switched off for them whatever is asked (src/llama-context.cpp).
NO_FLASH_ATTENTION: Final = frozenset({"grok"})

#: gemma3n: blocks from here on read the cache of earlier ones (src/models/gemma3n.cpp).
_GEMMA3N_KV_BLOCKS: Final = 20


class BlockCache(Struct, frozen=True, kw_only=True):
    """What one block keeps between tokens: `k` and `v` elements a cell (0: nothing), and f32 state a sequence."""

    k: int = 0
    v: int = 0
    window: int = 0  # tokens a windowed block can look back; 0: all of them
    state_r: int = 0  # elements: convolution state
    state_s: int = 0  # elements: recurrent state


class Keys:
    """The header's keys of this architecture, by the names llama.cpp gives them without the prefix."""

    def __init__(self, model: Model) -> None:
        self._metadata = model.metadata
        self._prefix = model.architecture + "."
        self._n_layer = model.hyper.n_layer

    def get(self, key: str) -> MetadataValue | None:
        return self._metadata.get(self._prefix + key)

    def number(self, key: str, default: int = 0) -> int:
        """A scalar; of an array, its largest element."""
        value = self.get(key)
        if isinstance(value, tuple):
            return int(max(value, default=default))
        return default if value is None or isinstance(value, str) else int(value)

    def per_layer(self, key: str) -> tuple[int, ...] | None:
        """An array of one value a block, or None when the key is absent or a scalar."""
        value = self.get(key)
        if not isinstance(value, tuple) or len(value) < self._n_layer:
            return None
        return tuple(int(item) for item in value[: self._n_layer])


def is_mla(model: Model) -> bool:
    """Multi-head latent attention: the cache holds one compressed K row a token, and no V."""
    keys = Keys(model)
    return keys.number("attention.key_length_mla") > 0 and keys.number("attention.value_length_mla") > 0


def is_periodic(model: Model) -> bool:
    """Whether recurrent and attention blocks follow each other in a fixed short period."""
    return model.architecture in _HYBRID_BY_INTERVAL


def n_trunk(model: Model) -> int:
    """Blocks that run: without those of multi-token prediction, which llama.cpp neither loads nor caches by default."""
    trunk = model.hyper.n_layer - model.hyper.n_layer_nextn
    return trunk if trunk > 0 else model.hyper.n_layer


def windows(model: Model) -> tuple[int, ...]:
    """Tokens each block can look back, 0 for all: sliding-window attention by key or by the architecture's pattern."""
    n_layer = model.hyper.n_layer
    size = _window_size(model)
    if not size:
        return (0,) * n_layer
    keys, window = Keys(model), _WINDOWS[model.architecture]
    listed = keys.per_layer("attention.sliding_window_pattern")
    if listed is not None:
        return tuple(size if flag else 0 for flag in listed)
    period = keys.number("attention.sliding_window_pattern", window.period)
    trunk = n_trunk(model)
    return tuple(size if il < trunk and _is_windowed(il, period, window.dense_first) else 0 for il in range(n_layer))


def _is_windowed(il: int, period: int, dense_first: bool) -> bool:  # noqa: FBT001  # llama.cpp's own argument
    if period == 0:
        return True
    return il % period != 0 if dense_first else il % period < period - 1


def _window_size(model: Model) -> int:
    window = _WINDOWS.get(model.architecture)
    if window is None or (model.architecture == "exaone4" and n_trunk(model) != 64):
        return 0
    stored = Keys(model).get("attention.sliding_window")
    if stored is None:
        return window.size if window.always or not window.forced else 0
    tokens = Keys(model).number("attention.sliding_window")
    return window.size if window.forced and tokens else tokens


def recurrent(model: Model) -> tuple[bool, ...]:
    """Which blocks keep a recurrent state instead of, or (Falcon-H1) beside, a cache."""
    hyper, arch = model.hyper, model.architecture
    trunk = n_trunk(model)
    if arch in _RECURRENT or arch == "falcon-h1":
        return (True,) * hyper.n_layer
    if arch in _HYBRID_BY_HEADS:
        return tuple(il < trunk and n_head_kv == 0 for il, n_head_kv in enumerate(hyper.n_head_kv))
    if arch in _NEMOTRON_H:
        return tuple(il < trunk and hyper.n_head_kv[il] == 0 and hyper.n_ff[il] == 0 for il in range(hyper.n_layer))
    if arch in _HYBRID_BY_INTERVAL:
        keys = Keys(model)
        listed = keys.per_layer("attention.recurrent_layers")
        if listed is not None:
            return tuple(bool(flag) for flag in listed)
        interval = keys.number("full_attention_interval", _HYBRID_BY_INTERVAL[arch]) or 1
        return tuple(il < trunk and (il + 1) % interval != 0 for il in range(hyper.n_layer))
    return (False,) * hyper.n_layer


def block_caches(model: Model) -> tuple[BlockCache, ...]:
    """What each block of the file keeps between tokens."""
    hyper, arch = model.hyper, model.architecture
    if arch in _CACHELESS:
        return (BlockCache(),) * hyper.n_layer
    recurs = recurrent(model)
    state_r, state_s = _state_sizes(model) if any(recurs) else (0, 0)
    has_cache = _cached_blocks(model, recurs)
    sizes = _head_sizes(model)
    window = windows(model)
    blocks: list[BlockCache] = []
    for il in range(hyper.n_layer):
        k, v = sizes(window[il]) if has_cache(il) else (0, 0)
        n_head_kv = hyper.n_head_kv[il]
        blocks.append(
            BlockCache(
                k=k * n_head_kv,
                v=v * n_head_kv,
                window=window[il],
                state_r=state_r if recurs[il] else 0,
                state_s=state_s if recurs[il] else 0,
            )
        )
    return tuple(blocks)


def _cached_blocks(model: Model, recurs: tuple[bool, ...]) -> Callable[[int], bool]:
    """Which blocks own a K/V cache, as a predicate of the block number."""
    hyper, arch = model.hyper, model.architecture
    trunk = n_trunk(model)
    if arch == "gemma3n":
        trunk = min(trunk, _GEMMA3N_KV_BLOCKS)
    elif arch == "gemma4":
        trunk = min(trunk, hyper.n_layer - Keys(model).number("attention.shared_kv_layers"))
    if arch == "falcon-h1":
        return lambda _: True
    if arch in _NEMOTRON_H:
        return lambda il: not recurs[il] and hyper.n_ff[il] == 0
    return lambda il: il < trunk and not recurs[il]


def _head_sizes(model: Model) -> Callable[[int], tuple[int, int]]:
    """Head dimensions of K and V, as a function of the block's window."""
    keys, hyper = Keys(model), model.hyper
    full = (hyper.head_dim_k, 0 if is_mla(model) else hyper.head_dim_v)
    swa = (
        keys.number("attention.key_length_swa", full[0]),
        0 if is_mla(model) else keys.number("attention.value_length_swa", full[1]),
    )
    return lambda window: swa if window else full


def _state_sizes(model: Model) -> tuple[int, int]:
    """Elements of convolution and of recurrent state a block keeps for a sequence (n_embd_r and n_embd_s)."""
    keys, hyper = Keys(model), model.hyper
    n_head = max(hyper.n_head, default=0)
    wkv = keys.number("wkv.head_size")
    if wkv:
        return keys.number("token_shift_count", 2) * hyper.n_embd, hyper.n_embd * wkv
    l_cache = keys.number("shortconv.l_cache")
    if l_cache:
        return hyper.n_embd * (l_cache - 1), 0
    kernel = keys.number("ssm.conv_kernel")
    kda = keys.number("kda.head_dim")
    if kda:
        return 3 * ((kernel or 4) - 1) * n_head * kda, kda * kda * n_head
    if model.architecture == "minimax-01":
        return 0, hyper.head_dim_k * hyper.head_dim_k * n_head
    inner, state = keys.number("ssm.inner_size"), keys.number("ssm.state_size")
    return max(kernel - 1, 0) * (inner + 2 * keys.number("ssm.group_count") * state), state * inner


def n_expert_used(hyper: Hyperparameters) -> int:
    """Routed experts that work on one token."""
    return max(hyper.n_expert_used, 1)
