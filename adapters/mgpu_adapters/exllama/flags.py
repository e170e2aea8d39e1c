"""TabbyAPI's own options after `--`, and where each belongs in its configuration file.

TabbyAPI ignores every other option beside `--config`, so they are written into that file. Names: TabbyAPI
`common/config_models.py` (main e632af4, 2026-08-13; branch exl2-checkpoint 79126f9, 2026-06-27).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from mgpu.errors import UsageError

#: Sections and what may be set in them beside what mgpu writes itself.
_SECTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "network": ("disable-fetch-requests", "send-tracebacks", "api-servers", "sse-ping-interval"),
    "logging": ("log-prompt", "log-generation-params", "log-requests", "log-chat-completion-requests"),
    "model": (
        "max-seq-len", "cache-size", "cache-mode", "chunk-size", "max-batch-size", "tensor-parallel",
        "tensor-parallel-backend", "cpu-moe-offload-layers", "rope-scale", "rope-alpha", "output-chunking",
        "prompt-template", "vision", "reasoning", "reasoning-start-token", "reasoning-end-token", "start-in-reasoning",
        "force-enable-thinking", "tool-format", "tool-calls-in-reasoning", "harmony", "muse-glimmer",
        "inline-model-loading", "use-dummy-models", "dummy-model-names", "reasoning-budget-tokens",
    ),
    "draft_model": (
        "draft-mode", "draft-model-dir", "draft-model-name", "draft-cache-mode", "draft-num-tokens", "dynamic-draft",
        "draft-rope-scale", "draft-rope-alpha", "draft-gpu-split", "ngram-match-min",
    ),
    "memory": ("sysmem-recurrent-cache", "sysmem-kv-cache", "cuda-malloc-async"),
    "developer": ("unsafe-launch", "disable-request-streaming", "realtime-process-priority"),
}  # fmt: skip
_SECTION_OF: Final = {name: section for section, names in _SECTIONS.items() for name in names}
_LISTS: Final = frozenset({"api-servers", "dummy-model-names", "draft-gpu-split"})

#: What mgpu writes from the plan, and how to tell mgpu.
_OURS: Final = {
    "model-dir": "give MODEL before `--`",
    "model-name": "give MODEL before `--`",
    "host": "give --host to mgpu itself, before `--`",
    "port": "give --port to mgpu itself, before `--`",
    "disable-auth": "give --api-key to mgpu itself, before `--`",
    "config": "give the settings one by one, after `--`",
    "backend": "choose it with --runtime",
    "gpu-split": "it follows from the plan: say which cards with --gpus, what to keep free with --reserve",
    "gpu-split-auto": "it follows from the plan: use --split",
    "autosplit-reserve": "give --reserve to mgpu itself, before `--`",
}
_TRUE: Final = {"true": True, "false": False}


class Given(Struct, frozen=True, kw_only=True):
    """The options found after `--`: their words, the last of each kind."""

    values: Mapping[str, tuple[str, ...]]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def word(self, name: str) -> str | None:
        """The one word of an option; None without it."""
        words = self.values.get(name)
        return None if words is None else words[0]

    def number(self, name: str) -> int | None:
        """Raises `UsageError` for anything but a number of 1 or more."""
        word = self.word(name)
        if word is None:
            return None
        if not re.fullmatch(r"[0-9]{1,9}", word) or not int(word):
            raise UsageError(f"--{name} {word!r} is no number of 1 or more", hint=f"write it like --{name} 4096")
        return int(word)

    def truth(self, name: str) -> bool | None:
        """Raises `UsageError` for anything but true and false."""
        word = self.word(name)
        if word is None:
            return None
        if word.lower() not in _TRUE:
            raise UsageError(
                f"--{name} {word!r} is neither true nor false", hint=f"write --{name} true, or leave it out"
            )
        return _TRUE[word.lower()]

    def in_section(self, section: str) -> dict[str, str | tuple[str, ...]]:
        """Keys as in the file (`max_seq_len`) to words; lists stay lists."""
        return {
            name.replace("-", "_"): words if name in _LISTS else words[0]
            for name, words in self.values.items()
            if _SECTION_OF[name] == section
        }


def read_flags(arguments: tuple[str, ...]) -> Given:
    """The options among `arguments`. Raises `UsageError` for unknown ones, and those that mgpu must be told."""
    values: dict[str, tuple[str, ...]] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, joined, value = argument.partition("=")
        name = _name(flag, argument)
        words = [value] if joined else []
        while not joined and rest and not rest[0].startswith("--"):
            words.append(rest.pop(0))
        if not words:
            raise UsageError(f"{flag} after `--` lacks its value", hint=f"write {flag} VALUE (true or false, too)")
        if len(words) > 1 and name not in _LISTS:
            raise UsageError(f"{flag} after `--` takes one value, not {' '.join(words)!r}", hint="write it once")
        values[name] = tuple(words)
    return Given(values=values)


def _name(flag: str, argument: str) -> str:
    name = flag.removeprefix("--").replace("_", "-")
    if not flag.startswith("--"):
        raise UsageError(
            f"{argument!r} after `--` is no option of TabbyAPI's", hint="write them like --max-seq-len 4096"
        )
    if name in _OURS:
        raise UsageError(f"{flag} after `--` would bypass mgpu", hint=_OURS[name])
    if name not in _SECTION_OF:
        raise UsageError(
            f"{flag} after `--` is no option of TabbyAPI's that mgpu knows",
            hint="config_sample.yml of TabbyAPI lists them; with dashes, like --max-seq-len 4096",
        )
    return name
