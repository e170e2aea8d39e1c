"""How each architecture wires its blocks, where the file's tensors do not tell.

Most of a graph follows from which tensors a block has. This is the rest. Source: llama.cpp b11434, src/models/*.cpp.
"""

from __future__ import annotations

from typing import Final, Literal

from msgspec import Struct

Parallel = Literal["", "feed+residual", "feed+attention", "attention+feed"]
Gating = Literal["softmax", "sigmoid", "softmax_weight", "by_key"]


class Traits(Struct, frozen=True, kw_only=True):
    """The wiring of one architecture; the defaults are those of a Llama."""

    norm: Literal["rms_norm", "norm"] = "rms_norm"
    parallel: Parallel = ""  # attention and feed-forward read the same norm; what is summed first then
    residual_first: bool = False  # the order in which a block's sums are written
    scaled_query: bool = False
    scaled_embedding: Literal["", "op", "rows"] = ""  # "rows": by a scale for each token, an input of its own
    rope: Literal["all", "windowed", "none"] = "all"
    rope_step: int = 0  # every n-th block does without
    norm_after_rope: bool = False
    late_rows: Literal["", "before_norm", "after_norm"] = ""  # where only the wanted tokens are picked, if at the end
    keeps_hidden: bool = False  # the last hidden state is an output too (for multi-token prediction)
    gating: Gating = "softmax"
    norm_weights: bool = True  # of the experts, when the file has no key for it
    relu_squared: bool = False
    softcap: bool = False  # attention scores squeezed by tanh
    n_pos: int = 1  # position numbers a token
    supported: bool = True  # the graph is built as llama.cpp builds it; otherwise as a Llama's, with a wider margin


_LLAMA_LIKE: Final = (
    "llama deci internlm2 qwen qwen2 qwen3 qwen3moe granite granitemoe minicpm seed_oss xverse arctic "
    "exaone ernie4_5 ernie4_5-moe mistral3 pangu-embedded openelm olmo2 phi3 phimoe glm4 chatglm gemma-embedding "
    "hunyuan_vl maincoder bailingmoe mellum granite_swa grovemoe muse-glimmer plamo3 "
    "falcon-h1 mamba mamba2 granitehybrid"
)
_KNOWN: Final = {name: Traits() for name in _LLAMA_LIKE.split()} | {
    "afmoe": Traits(scaled_embedding="op", rope_step=4, gating="by_key"),
    "arcee": Traits(relu_squared=True),
    "bailingmoe2": Traits(gating="by_key"),
    "cohere2": Traits(norm="norm", parallel="feed+residual", rope="windowed"),
    "cohere2moe": Traits(parallel="feed+residual", rope="windowed", gating="by_key", supported=False),
    "command-r": Traits(norm="norm", parallel="feed+residual"),
    "dbrx": Traits(norm="norm"),
    "deepseek": Traits(norm_weights=False),
    "deepseek2": Traits(gating="by_key", norm_weights=False),
    "dots1": Traits(gating="by_key"),
    "exaone-moe": Traits(gating="by_key", rope="windowed"),
    "exaone4": Traits(rope="windowed"),
    "bloom": Traits(norm="norm", rope="none", supported=False),
    "codeshell": Traits(norm="norm"),
    "falcon": Traits(norm="norm", parallel="feed+attention"),
    "gemma": Traits(scaled_query=True, scaled_embedding="op"),
    "gemma2": Traits(scaled_query=True, scaled_embedding="op", softcap=True),
    "gemma3": Traits(scaled_query=True, scaled_embedding="rows"),
    "gemma3n": Traits(scaled_embedding="rows"),
    "gemma4": Traits(scaled_embedding="rows", late_rows="after_norm", keeps_hidden=True),
    "glm4moe": Traits(gating="by_key", norm_weights=False),
    "gpt2": Traits(norm="norm", rope="none", supported=False),
    "gptneox": Traits(norm="norm", supported=False),
    "gpt-oss": Traits(gating="softmax_weight", norm_weights=False, late_rows="before_norm"),
    "hunyuan-dense": Traits(norm_after_rope=True),
    "hunyuan-moe": Traits(norm_after_rope=True),
    "jamba": Traits(residual_first=True, rope="none"),
    "hy_v3": Traits(gating="by_key", norm_weights=False),
    "jais2": Traits(norm="norm", relu_squared=True),
    "lfm2": Traits(residual_first=True),
    "lfm2moe": Traits(gating="by_key", residual_first=True),
    "llama4": Traits(gating="sigmoid", norm_weights=False, rope_step=4),
    "mimo2": Traits(gating="sigmoid"),
    "minimax-m2": Traits(gating="by_key"),
    "mpt": Traits(norm="norm", rope="none", supported=False),
    "nemotron": Traits(norm="norm", relu_squared=True),
    "nemotron_h": Traits(rope="none", relu_squared=True, gating="sigmoid", late_rows="after_norm", keeps_hidden=True),
    "olmo": Traits(norm="norm"),
    "olmoe": Traits(norm_weights=False),
    "orion": Traits(norm="norm"),
    "paddleocr": Traits(n_pos=4),
    "phi2": Traits(norm="norm", parallel="attention+feed", scaled_query=True),
    "plamo": Traits(parallel="feed+attention"),
    "qwen2moe": Traits(norm_weights=False),
    "qwen2vl": Traits(n_pos=4),
    "qwen35": Traits(n_pos=4, late_rows="after_norm", keeps_hidden=True),
    "qwen3next": Traits(late_rows="after_norm", keeps_hidden=True),
    "qwen3vl": Traits(n_pos=4),
    "refact": Traits(rope="none"),
    "smallthinker": Traits(gating="by_key"),
    "smollm3": Traits(rope_step=4),
    "stablelm": Traits(norm="norm"),
    "starcoder": Traits(norm="norm", rope="none", supported=False),
    "step35": Traits(gating="by_key", late_rows="before_norm"),
    "starcoder2": Traits(norm="norm"),
}
_SAME: Final = {"qwen35moe": "qwen35", "qwen3vlmoe": "qwen3vl", "nemotron_h_moe": "nemotron_h", "mistral4": "deepseek2"}

_SCALED_QUERY: Final = frozenset({"phi3", "gemma-embedding"})


def traits_of(architecture: str) -> Traits:
    """How `architecture` wires its blocks; as a Llama, but not `supported`, when it is not known here."""
    name = _SAME.get(architecture, architecture)
    if name in _SCALED_QUERY:
        return Traits(scaled_query=True)
    return _KNOWN.get(name, Traits(supported=False))
