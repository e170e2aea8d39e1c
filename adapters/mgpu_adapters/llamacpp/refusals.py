"""What keeps llama.cpp's tensor mode (`-sm tensor`) from running a model: its own refusals, and where it would abort.

Source: llama.cpp b11434, src/llama-arch.cpp (llm_arch_supports_sm_tensor), src/llama-context.cpp,
ggml/src/ggml-backend-meta.cpp. Aborts were seen with real loads and requests of that build.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from mgpu.adapter import Installed
from mgpu.rig import Gpu
from mgpu_adapters.llamacpp.backends import driver_of
from mgpu_adapters.llamacpp.blocks import Anatomy
from mgpu_adapters.llamacpp.cards import device_names
from mgpu_adapters.llamacpp.cuts import WHOLE_STATE, cut_of, head_sizes
from mgpu_adapters.llamacpp.flags import Given
from mgpu_adapters.llamacpp.memory import Footprint
from mgpu_adapters.llamacpp.scheduler import can_attend
from mgpu_adapters.llamacpp.settings import Settings
from mgpu_adapters.llamacpp.tensor import Ranks

#: Among a build's flags when its `--split-mode` takes `tensor`.
TENSOR: Final = "--split-mode tensor"

#: GGML_BACKEND_META_MAX_DEVICES.
_MOST_RANKS: Final = 16

#: llama.cpp refuses these at load.
_REFUSED: Final = frozenset({
    "bailingmoe3", "bitnet", "deepseek2", "deepseek32", "dots3note", "falcon-h1", "gemma3n", "glm-dsa", "glm5-next",
    "granitehybrid", "grok", "hy_v4", "jamba", "kimi-k3", "kimi-linear", "mamba", "mamba2", "minicpm3", "minimax-01",
    "minimax-m2", "minimax-m3", "mistral4", "mpt", "nemotron_h", "nemotron_h_moe", "olmo2", "olmoe", "plamo2",
    "qwen3tts", "t5",
})  # fmt: skip
#: Cut by rules of their own, or not at all, which this package does not follow.
_UNPLANNED: Final = frozenset({"deepseek4", "dflash", "hrm_text"})

#: Cache types with kernels on every backend; others fall to the CPU, which is no rank (llama.cpp #27116).
_KV_TYPES: Final = frozenset({"f32", "f16", "bf16", "q8_0", "q4_0"})


def why_not_tensor(need: Footprint, gpus: Sequence[Gpu], installed: Installed, given: Given) -> str | None:
    """The first thing that keeps this model from running as tensor ranks on `gpus`, in a few words; None: nothing."""
    reasons = (
        *_cards(gpus, installed),
        *_flags(need, given),
        *_attention(need.settings, need.anatomy, gpus),
        *_stays_behind(need, gpus),
    )
    return next(iter(reasons), None) or need.tensor_flaw(len(gpus), flaw_of)


def _cards(gpus: Sequence[Gpu], installed: Installed) -> Iterator[str]:
    if TENSOR not in installed.flags:
        yield f"llama.cpp {installed.version} has no --split-mode tensor"
    if len(gpus) < 2:
        yield f"tensor ranks need two cards, not {len(gpus)}"
    if len(gpus) > _MOST_RANKS:
        yield f"llama.cpp takes {_MOST_RANKS} tensor ranks at the most, not {len(gpus)}"
    backends = sorted({name.rstrip("0123456789") for name in device_names(gpus)})
    if len(backends) > 1:
        yield f"ranks need one backend, not {' and '.join(backends)} (llama.cpp #25594)"


def _flags(need: Footprint, given: Given) -> Iterator[str]:
    """What flags after `--` leave to other modes."""
    settings = need.settings
    if settings.split_mode not in (None, "tensor"):
        yield f"--split-mode {settings.split_mode} after `--`"
    if settings.tensor_split is not None and settings.split_mode is None:
        yield "--tensor-split after `--` splits by layers"
    layers = settings.n_gpu_layers
    if layers is not None and 0 <= layers < need.n_units:
        yield f"--gpu-layers {layers} after `--` leaves {need.n_units - layers} of {need.n_units} layers to the CPU"
    if settings.n_cpu_moe:
        yield "--cpu-moe or --n-cpu-moe after `--` keeps experts on the host"
    if settings.override_tensor:
        yield "--override-tensor after `--`"
    if not settings.kv_offload:
        yield "--no-kv-offload after `--` keeps the cache on the host"
    if not settings.flash_attn and given.values.get("flash-attn") in {"off", "0"}:
        yield "--flash-attn off after `--`: tensor mode needs it"


def _attention(settings: Settings, anatomy: Anatomy, gpus: Sequence[Gpu]) -> Iterator[str]:
    architecture = anatomy.model.architecture
    if architecture in _REFUSED:
        yield f"llama.cpp has no tensor mode for {architecture}"
    if architecture in _UNPLANNED:
        yield f"mgpu does not plan tensor mode for {architecture}"
    if any(anatomy.recurs) and architecture not in WHOLE_STATE and any(map(_is_remote, device_names(gpus))):
        yield "cut recurrent states abort in ggml-rpc-server"
    cuda = any(driver_of(gpu).cuda for gpu in gpus)
    k, v = anatomy.hyper.head_dim_k, anatomy.hyper.head_dim_v
    if not settings.flash_attn or (cuda and not can_attend(k, v)):
        yield f"tensor mode needs flash attention, which has no kernel for heads of {k if k == v else f'{k} and {v}'}"
    types = (settings.type_k, settings.type_v)
    for type_ in types:
        if type_ not in _KV_TYPES:
            yield f"a {type_} cache aborts in tensor mode (llama.cpp #27116)"
    if cuda and types[0] != types[1]:
        yield f"caches of {types[0]} and {types[1]} abort in tensor mode on CUDA, which attends to pairs of a type"


def _is_remote(device: str) -> bool:
    return device.startswith("RPC")


def _stays_behind(need: Footprint, gpus: Sequence[Gpu]) -> Iterator[str]:
    """Weights of blocks that no device takes, where the CPU would have to work on a cut activation."""
    for gpu in gpus:
        most = driver_of(gpu).rules.max_tensor_bytes
        if most is None:
            continue
        name = next(
            (tensor.name for tensor in need.model.tensors if tensor.layer is not None and tensor.n_bytes > most), ""
        )
        if name:
            yield f"{name} is larger than a tensor may be on GPU {gpu.index}"


def flaw_of(anatomy: Anatomy, ranks: Ranks) -> str | None:
    """What in the model's own tensors llama.cpp aborts over in tensor mode; None: nothing."""
    flaws = (_block_flaw(anatomy, ranks, alike.il) for alike in ranks.alike)
    return next((flaw for flaw in flaws if flaw is not None), None)


def _block_flaw(anatomy: Anatomy, ranks: Ranks, il: int) -> str | None:
    block, n_head_kv = anatomy.blocks[il], anatomy.hyper.n_head_kv[il]
    if any(name.startswith("attn_kv_a") for name in block):
        return "llama.cpp does not cut latent attention into ranks"
    if anatomy.recurs[il]:
        whole = "ssm_out.weight" in block or anatomy.model.architecture in WHOLE_STATE
        return None if whole else f"llama.cpp cannot cut the state of block {il} into ranks"
    if not n_head_kv:
        return f"llama.cpp cannot cut block {il}, which has no attention, into ranks"
    odd = next((name for name in block if not _adds_up(anatomy, il, name, ranks.n)), None)
    if odd is not None:
        return f"llama.cpp cannot cut {block[odd].name}: its rows are not those of its heads"
    flaws = (_norm_flaw(anatomy, ranks, il, f"attn_{which}") for which in ("q", "k"))
    return next((flaw for flaw in flaws if flaw is not None), None)


def _adds_up(anatomy: Anatomy, il: int, name: str, n: int) -> bool:
    """Whether the parts a weight is cut in are all of it; llama.cpp asserts as much (Qwen 1 with fewer KV heads)."""
    cut = cut_of(anatomy, il, name, n)
    return (
        cut is None or sum(part.extent * part.repeats for part in cut.parts) == anatomy.blocks[il][name].shape[cut.axis]
    )


def _norm_flaw(anatomy: Anatomy, ranks: Ranks, il: int, stem: str) -> str | None:
    """Norms of queries or keys work on whole rows; what is cut within a row aborts, at the first token at last."""
    norm, weight = (anatomy.blocks[il].get(name) for name in (f"{stem}_norm.weight", f"{stem}.weight"))
    if norm is None or weight is None:
        return None
    dim = head_sizes(anatomy, il)[0]
    n_heads = weight.shape[1] // dim
    by_head = ranks.elements(il, f"{stem}_norm.weight")
    if by_head is not None:
        heads = tuple(share // dim for share in ranks.elements(il, f"{stem}.weight") or ())
        same = by_head == heads
        return None if same else f"llama.cpp cuts {n_heads} heads and their norms differently for {ranks.n} ranks"
    if norm.shape[0] != dim:
        return f"llama.cpp cannot norm the cut rows of {weight.name}"
    if n_heads == 1:
        return "one KV head with a norm of its keys: llama.cpp's tensor mode aborts at the first token"
    return None
