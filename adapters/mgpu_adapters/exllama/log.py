"""What TabbyAPI's log lines say: stages of loading, requests served, and why it fails.

Formats: TabbyAPI main e632af4 and exl2-checkpoint 79126f9 (`common/`, `backends/`, `endpoints/`), ExLlamaV2 0.3.2,
ExLlamaV3 1.4.1 and 1.6.5. Each line of its own begins "2026-08-13 20:55:45.123 INFO:     ".
"""

from __future__ import annotations

import re
from typing import Final

from mgpu.adapter import Cause, LogFact, Served, Stage
from mgpu_adapters.torch import read_shortage
from mgpu_adapters.words import clip

_STAGES: Final = (
    (r"INFO: +Loading model: ", "loading weights"),
    (r"INFO: +Loading with tensor parallel", "loading weights as tensor ranks"),
    (r"INFO: +Loading with autosplit", "loading weights, placed by ExLlama itself"),
    (r"INFO: +Loading with a manual GPU split", "loading weights as planned"),
    (r"INFO: +Model successfully loaded", "weights loaded"),
    (r"INFO: +Starting OAI API", "starting to serve"),
    (r"INFO: +Uvicorn running on", "serving"),
)

_REINSTALL: Final = "in TabbyAPI's folder: venv/bin/pip install --upgrade '.[cu12]'"

_SHORT: Final = Cause(
    text="the cards of the plan had no room for model and cache: something else has taken memory since",
    hint="use a smaller --ctx, fewer --users or --kv-type q8_0, or keep more free with --reserve",
    out_of_memory=True,
)
#: ExLlamaV2's and V3's own check, before CUDA would say it.
_NO_ROOM: Final = re.compile(
    r"Insufficient VRAM (?:in split )?for model and cache|Insufficient space in device allocation"
)

#: common/gen_logging.py: the seconds include the queue and the prompt; the speed is that of generation alone.
_SERVED: Final = re.compile(
    r"Metrics \(ID: \S{1,80}\): (\d{1,9}) tokens generated in (\d{1,9}(?:\.\d{1,9})?) seconds"
    r"(?:.{0,200}?Generate: (\d{1,9}(?:\.\d{1,9})?) T/s)?"
)

#: What is said (a regex), what it means, what to do, and whether its port was taken.
_CAUSES: Final = (
    (
        r"Port (\d+) is currently in use. Switching to (\d+)",
        "port {0} was taken, and TabbyAPI went to {1} of itself",
        "leave --port out to get a free one",
        True,
    ),
    (r"Ports (\d+) and (\d+) are in use", "ports {0} and {1} are in use", "leave --port out to get a free one", True),
    (r"error while attempting to bind on address|Address already in use", "the port is in use by another program",
     "leave --port out to get a free one", True),
    (
        r"Models quantized with '(exl2|gptq)' require the exllamav2 backend",
        "this TabbyAPI serves no {0}: main left ExLlamaV2 in July 2026",
        "name a clone of the branch exl2-checkpoint in MGPU_TABBYAPI",
        False,
    ),
    (
        r"Unable to run ExllamaV3 because an unsupported GPU|All GPUs must be ampere",
        "ExLlamaV3 needs NVIDIA cards of compute capability 8.0 (30 series) or newer",
        "leave older ones out with --gpus",
        False,
    ),
    (r"TabbyAPI requires (exllamav\d) ([\d.]+) or greater. Your current version is ([\d.]+)",
     "{0} {2} is too old for this TabbyAPI, which needs {1}", _REINSTALL, False),
    (r"Inference dependencies for TabbyAPI are not installed", "torch or ExLlama is not installed for TabbyAPI",
     _REINSTALL, False),
    (r"ModuleNotFoundError: No module named '([\w.]+)'", "the Python that runs TabbyAPI has no {0}", _REINSTALL, False),
    (r"CUDA_HOME environment variable is not set", "ExLlama wants to be compiled at first use, and there is no CUDA",
     f"install a wheel that is compiled: {_REINSTALL}", False),
    (r"Tensor-parallel is not (?:currently implemented|supported) for (\w+)",
     "ExLlama has no tensor parallelism for {0}", "use --split pipeline", False),
    (r"Could not find model architecture|Architecture (\w+) is not supported|unknown architecture",
     "this ExLlama does not know the model's architecture", f"update it: {_REINSTALL}", False),
    (r"CUDA driver version is insufficient|no NVIDIA driver on your system|No CUDA GPUs are available",
     "torch finds no CUDA driver it can use", "`mgpu rig show` says what the driver is", False),
    (r"validation errors? for TabbyConfigModel", "this TabbyAPI does not take the settings mgpu wrote",
     "look for the key it names in the log, above; an update of TabbyAPI may help", False),
)  # fmt: skip


def read_line(line: str) -> LogFact | None:
    """The fact in one line of the log, or None."""
    line = clip(line)
    if "tokens generated in" in line:
        return _served(line)
    if _NO_ROOM.search(line):
        return _SHORT
    short = read_shortage(line)
    if short is not None:
        return short
    for pattern, text, hint, port_taken in _CAUSES:
        match = re.search(pattern, line)
        if match is not None:
            return Cause(text=text.format(*match.groups()), hint=hint, port_taken=port_taken)
    for pattern, text in _STAGES:
        if re.search(pattern, line):
            return Stage(text=text)
    return None


def _served(line: str) -> Served | None:
    match = _SERVED.search(line)
    if match is None:
        return None
    n_tokens, speed = int(match[1]), float(match[3] or 0)
    return Served(n_tokens=n_tokens, seconds=n_tokens / speed if speed else float(match[2]))
