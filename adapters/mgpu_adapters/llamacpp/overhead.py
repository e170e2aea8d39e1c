"""Memory outside of llama.cpp's own buffers: the driver's context, and what grows once it works."""

from __future__ import annotations

from typing import Final

from mgpu.rig import Gpu
from mgpu.units import GIB, MIB
from mgpu_adapters.llamacpp.architectures import n_expert_used
from mgpu_adapters.llamacpp.backends import driver_of
from mgpu_adapters.llamacpp.blocks import Anatomy
from mgpu_adapters.llamacpp.settings import Settings

#: A CUDA context, by what a card of at most so much memory has in multiprocessors at worst. Measured: 107 MiB with 34
#: (RTX 4060 Ti, llama.cpp PR #23604), 555 MiB with 188 (RTX PRO 6000, same place), 120 to 550 MiB (PR #20595): 2.9 MiB
#: each and 8 MiB. The number itself is not known from a profile.
_CONTEXTS: Final = (
    (9 * GIB, 46 * 29 // 10 * MIB + 8 * MIB),  # RTX 4060, 3070
    (13 * GIB, 80 * 29 // 10 * MIB + 8 * MIB),  # RTX 3080 Ti
    (17 * GIB, 84 * 29 // 10 * MIB + 8 * MIB),  # RTX 5080
    (25 * GIB, 128 * 29 // 10 * MIB + 8 * MIB),  # RTX 4090
    (33 * GIB, 170 * 29 // 10 * MIB + 8 * MIB),  # RTX 5090
)
_LARGEST_CONTEXT: Final = 555 * MIB

#: cuBLAS handles and workspaces (32 MiB on Hopper, less elsewhere), CUDA graphs and modules loaded on first use.
_CUDA_GROWTH: Final = 128 * MIB

#: Pipelines, descriptor pools and staging buffers of Vulkan, SYCL and Metal; the connection's buffers of RPC.
_OTHER_GROWTH: Final = 128 * MIB

#: NCCL's communicator and its channels between tensor ranks: not measured with llama.cpp, assumed as for vLLM.
#: Without NCCL, two CUDA cards exchange through 32 MiB on each (ggml-cuda/allreduce.cu), less than this.
_NCCL: Final = 256 * MIB


def overhead(gpu: Gpu, scratch: int) -> int:
    """Bytes on `gpu` beside llama.cpp's buffers. `scratch`: the pool its kernels draw from, see `kernel_scratch`."""
    if driver_of(gpu).cuda:
        context = next((size for most, size in _CONTEXTS if gpu.total_bytes <= most), _LARGEST_CONTEXT)
        return context + _CUDA_GROWTH + scratch
    return _OTHER_GROWTH + scratch


def exchange(anatomy: Anatomy, settings: Settings, n_ranks: int, gpu: Gpu) -> int:
    """Bytes on `gpu` for what tensor ranks send each other: partial sums, one for each step of a butterfly.

    Source: ggml-backend-meta.cpp (max_tmp_size, n_reduce_steps), which makes room for them whether or not NCCL does
    the sums; with NCCL (ggml-cuda.cu) there is a copy in 16 bits in the pool beside it. Seen with real requests.
    """
    hyper = anatomy.hyper
    widest = hyper.n_embd * (n_expert_used(hyper) if hyper.n_expert else 1)
    sums = 4 * settings.u * widest * (n_ranks - 1).bit_length()
    return sums + (_NCCL + 2 * settings.u * widest if driver_of(gpu).cuda else 0)


def kernel_scratch(anatomy: Anatomy, settings: Settings) -> int:
    """The widest activation of one batch, in f32: what kernels put aside to quantise or convert their input.

    ggml-cuda's pool holds it once in q8_1 (mmq), or in f16 with an f16 result (cuBLAS): no more than this.
    """
    hyper = anatomy.hyper
    widest = max(*hyper.n_ff, hyper.n_embd, *(heads * hyper.head_dim_k for heads in hyper.n_head))
    routed = hyper.n_expert_used * max(hyper.n_ff_expert, hyper.n_embd) if hyper.n_expert else 0
    return 4 * settings.u * max(widest, routed)
