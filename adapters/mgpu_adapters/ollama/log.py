"""What Ollama says of memory that is not there: in its own log, and in its answers to a request to load.

Formats: ollama fb30760 (v0.33.0-rc2) llm/, server/sched.go, and back to 0.6. A child's lines are llama.cpp's.
"""

from __future__ import annotations

import re
from typing import Final

from mgpu.adapter import Cause, LogFact, Stage
from mgpu_adapters.llamacpp.log import read_line as read_llamacpp
from mgpu_adapters.words import clip, shortage, shortage_of_ram, size

#: Before 0.30: "model requires more system memory (9.9 GiB) than is available (7.6 GiB)".
_NO_RAM: Final = re.compile(
    r"requires more (?:system )?memory(?: \(([0-9]{1,9}(?:\.[0-9]{1,3})?) ([KMG]iB)\))? "
    r"than is (?:currently )?available"
)
_NO_LAYOUT: Final = re.compile(r"memory layout cannot be allocated|insufficient (?:VRAM|memory) to load")
#: The runner; since 0.30 llama-server itself.
_KILLED: Final = re.compile(
    r"(?:runner|llama-server) process (?:has terminated|no longer running)[:,]? .{0,40}?\bkilled\b"
)


def read_line(line: str) -> LogFact | None:
    """The fact in one line of its log, with a child's lines in it; or None.

    Without buffers and requests: a model that is loaded anew, or beside another, would have them twice.
    """
    cause = read_shortage(line)
    if cause is not None:
        return cause
    fact = read_llamacpp(line)
    if isinstance(fact, Stage | Cause):
        return fact
    if "address already in use" in line:
        return Cause(text="its port is in use by another program", hint="leave --port out to get a free one")
    return None


def read_refusal(reason: str) -> Cause | None:
    """The cause that an answer of its API gives: its own words, or a child's last ones."""
    fact = read_shortage(reason) or read_llamacpp(reason)
    return fact if isinstance(fact, Cause) else None


def read_shortage(text: str) -> Cause | None:
    """Its own words for too little memory."""
    text = clip(text)
    match = _NO_RAM.search(text)
    if match is not None:
        return shortage_of_ram(size(match[1], match[2]))
    if _NO_LAYOUT.search(text):
        return shortage("the cards", (), 0)
    return shortage_of_ram(0) if _KILLED.search(text) else None
