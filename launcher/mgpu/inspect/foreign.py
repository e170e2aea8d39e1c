"""What a file is that should be a GGUF and is not; and names from outside, made fit to print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mgpu.errors import BadModelError

_MAX_LISTED: Final = 8  # names in one message

#: First bytes of what is given for a GGUF by mistake -> what it is, what to do. The first match counts.
_FOREIGN: Final = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file: git lfs pull"),
    (b"<", "an HTML or XML page", "download the file itself; on huggingface.co, use the /resolve/ address, not /blob/"),
    (b"PK\x03\x04", "a zip archive (PyTorch weights?)", "convert the model with llama.cpp's convert_hf_to_gguf.py"),
    (b"\x1f\x8b", "a gzip archive", "unpack it with gunzip"),
    (b"lmgg", "a GGML file, the format before GGUF", "download a GGUF of the model"),
    (b"tjgg", "a GGJT file, the format before GGUF", "download a GGUF of the model"),
    (b"fmgg", "a GGMF file, the format before GGUF", "download a GGUF of the model"),
    (b"Entry not found", "the text of a failed download", "check the address and download it again"),
    (b"Repository not found", "the text of a failed download", "check the address and download it again"),
    (b"Invalid username or password", "the text of a failed download", "log in and download it again"),
    (b"{", "a JSON text", "give the .gguf file itself"),
    (b"\0\0\0\0", "zeros: a download that was never filled in", "download the file again"),
)


def shown(text: str) -> str:
    """A path, name or key from outside as it can stand in one line of a message."""
    if len(text) > 200:
        text = f"{text[:120]}…{text[-60:]}"
    return text if text.isprintable() else ascii(text)


def check_magic(head: bytes, origin: str) -> None:
    """Raise `BadModelError` that says what the file is instead, unless `head` starts like a GGUF."""
    if head[:4] == b"GGUF":
        return
    if not head:
        raise BadModelError(f"{shown(origin)} is empty (0 bytes)", hint="download the file again")
    if head[8:9] == b"{" and len(head) > 8:  # u64 length, then JSON
        what, hint = (
            "a safetensors file",
            "give a GGUF of the model, or convert it with llama.cpp's convert_hf_to_gguf.py",
        )
    else:
        text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
        unknown = (f"it starts with {ascii(head[:4])[1:]}, not with 'GGUF'", "give the path of a .gguf file")
        what, hint = next((row[1:] for row in _FOREIGN if text.startswith(row[0])), unknown)
    raise BadModelError(f"{shown(origin)} is not a GGUF file: {what}", hint=hint)


def listed_names(names: Sequence[str]) -> str:
    """At most eight of the names, and how many more there are."""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(shown(name) for name in names[:_MAX_LISTED]) + more
