"""What the person asked for: the options of `run` and `plan`, typed. Contract: the options table of the README."""

from __future__ import annotations

from typing import Final, Literal, get_args

from msgspec import Struct

KnownRuntime = Literal["llama.cpp", "ollama", "vllm", "exllamav2", "exllamav3", "aikit", "exo", "mycoswarm"]
RuntimeName = str  # a known one, or what a third party's adapter is called
SplitChoice = Literal["auto", "none", "pipeline", "tensor"]
OffloadChoice = Literal["auto", "never", "allow"]

RUNTIME_NAMES: Final[tuple[KnownRuntime, ...]] = get_args(KnownRuntime)
SPLIT_CHOICES: Final[tuple[SplitChoice, ...]] = get_args(SplitChoice)
OFFLOAD_CHOICES: Final[tuple[OffloadChoice, ...]] = get_args(OffloadChoice)

#: Tokens of context per user when none is asked for, at most (the trained context if that is smaller).
DEFAULT_CTX: Final = 8192

#: Where clients' key is read from, if nobody gives --api-key. Ours alone: no runtime sees it.
KEY_VARIABLE: Final = "MGPU_API_KEY"

#: Stands for a key that is nothing to print: one that mgpu made up, or that came by `KEY_VARIABLE`.
KEY_PLACEHOLDER: Final = "<api-key>"


class Request(Struct, frozen=True, kw_only=True):
    """One `run` or `plan`. `ctx` is tokens per user; None means the default, "max" the largest that fits."""

    runtime: RuntimeName = "auto"
    ctx: int | Literal["max"] | None = None
    users: int = 1
    kv_type: str = "f16"
    gpus: tuple[str, ...] = ()  # indices, names or UUIDs to consider; empty: all
    split: SplitChoice = "auto"
    offload: OffloadChoice = "auto"
    reserve: tuple[tuple[str, int], ...] = ()  # (card as in `gpus`, or "" for every card; bytes kept free on it)
    force: bool = False
    host: str = "127.0.0.1"
    port: int | None = None  # None: a free one from 8080 up
    api_key: str | None = None
    no_auth: bool = False  # open to whoever reaches `host`
    key_file: str = ""  # where `api_key` is kept, if mgpu made it up
    exposed: bool = False  # `host` can be reached from other machines, as far as is known
    runtime_args: tuple[str, ...] = ()  # everything after `--`, unchanged
