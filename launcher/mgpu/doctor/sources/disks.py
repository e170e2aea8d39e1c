"""The directories that matter, and the file systems they are on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from mgpu.detect.sysfs import read_number, read_text
from mgpu.doctor.facts import Disk

_MOST_MOUNTS: Final = 1 << 20  # bytes of /proc/self/mountinfo
_VIRTUAL: Final = ("vd", "xvd", "nbd", "loop", "zram")
_VIRTUAL_MODEL: Final = re.compile(r"QEMU|VBOX|VMware|Virtual", re.IGNORECASE)
_OCTAL: Final = re.compile(r"\\([0-7]{3})")


def directories(environ: Mapping[str, str]) -> tuple[tuple[str, Path, bool], ...]:
    """(what for, where, whether mgpu writes there) of each directory that launches, profiles and models are in."""
    import platformdirs

    from mgpu.launch.places import usual_state_dir

    home = Path(environ.get("HOME") or "/")
    hugging_face = Path(environ.get("HF_HOME") or home / ".cache/huggingface")
    return (
        ("launches", usual_state_dir(), True),
        ("profiles", Path(platformdirs.user_config_dir("mgpu")), True),
        ("answers of runtimes", Path(platformdirs.user_cache_dir("mgpu")), True),
        ("models of Hugging Face", hugging_face, False),
        ("models of Ollama", Path(environ.get("OLLAMA_MODELS") or home / ".ollama/models"), False),
        ("models of llama.cpp", Path(environ.get("LLAMA_CACHE") or home / ".cache/llama.cpp"), False),
        *_current(),
    )


def _current() -> Iterator[tuple[str, Path, bool]]:
    with suppress(OSError):  # removed meanwhile
        yield "the current directory", Path.cwd(), False


def look_at_disk(purpose: str, path: Path, *, ours: bool, root: Path) -> Disk:
    """A directory, or the nearest one above it that exists; a network mount may never answer."""
    existing = next((part for part in (path, *path.parents) if part.exists()), Path("/"))
    kind, read_only = _mount(Path(os.path.realpath(existing)), root)
    told = Disk(path=str(path), purpose=purpose, exists=existing == path, kind=kind, read_only=read_only, ours=ours)
    try:
        status, device = os.statvfs(existing), existing.stat().st_dev
    except OSError:
        return told
    return replace(
        told,
        free=status.f_bavail * status.f_frsize,
        files_left=status.f_favail if status.f_files else None,
        spinning=_is_spinning(device, root),
    )


def _mount(path: Path, root: Path) -> tuple[str, bool]:
    """The kind of the file system that `path` is on, and whether it is read-only. The last of equal mounts counts."""
    best, kind, read_only = -1, "", False
    for point, a_kind, options in _mounts(root):
        if (path == point or point in path.parents) and len(point.parts) >= best:
            best, kind, read_only = len(point.parts), a_kind, "ro" in options
    return kind, read_only


def _mounts(root: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """(mount point, kind, options) by proc(5): "36 35 98:0 /a /mnt rw,noatime master:1 - ext3 /dev/root rw"."""
    text = ""
    with suppress(OSError), (root / "proc/self/mountinfo").open(encoding="utf-8", errors="replace") as file:
        text = file.read(_MOST_MOUNTS)
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        words, kinds = before.split(), after.split()
        if len(words) >= 6 and kinds:
            yield Path(_OCTAL.sub(lambda match: chr(int(match[1], 8)), words[4])), kinds[0], words[5].split(",")


def _is_spinning(device: int, root: Path) -> bool:
    """Of a disk or a partition. What is made of several (btrfs, overlay, network) has no device of its own, and a
    virtual machine's disks say that they spin whatever they are."""
    block = Path(os.path.realpath(root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"))
    disk = block if (block / "queue").exists() else block.parent
    virtual = disk.name.startswith(_VIRTUAL) or _VIRTUAL_MODEL.search(read_text(disk / "device/model"))
    return not virtual and read_number(disk / "queue/rotational") == 1
