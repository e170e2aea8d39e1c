"""Room on disks, and how fast models come from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mgpu.doctor.facts import Disk, Facts
from mgpu.doctor.finding import Finding, Severity, ok
from mgpu.units import GIB, MIB, gib

#: For records, logs and drafts of ours.
_NO_ROOM: Final = 16 * MIB
_LITTLE_ROOM: Final = 256 * MIB

#: For a model to be downloaded.
_ROOM_FOR_A_MODEL: Final = 5 * GIB

_NETWORK: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "lustre", "afs", "fuse.sshfs"})
_NETWORK_FUSE: Final = ("fuse.gluster", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse", "fuse.juicefs", "fuse.davfs")


def writable(facts: Facts) -> Iterator[Finding]:
    """Where mgpu itself writes."""
    for disk in facts.disks:
        if disk.ours and disk.read_only:
            yield _finding("error", disk, "read-only", f"is on a read-only file system ({disk.kind})", "mount it rw")
        elif disk.ours and disk.files_left == 0:
            fix = "remove files: df -i shows what is full"
            yield _finding("error", disk, "full", "is on a file system that can hold no more files", fix)


def room(facts: Facts) -> Iterator[Finding]:
    """Free space, of ours and for models."""
    known = [disk for disk in facts.disks if disk.free is not None]
    found = [finding for disk in known if (finding := _little_room(disk, disk.free or 0)) is not None]
    yield from found
    if known and not found:
        least = min(disk.free or 0 for disk in known)
        yield ok("disks", "full", f"{gib(least)} or more free where launches and models are kept")


def _little_room(disk: Disk, free: int) -> Finding | None:
    if disk.ours and free < _LITTLE_ROOM:
        severity: Severity = "error" if free < _NO_ROOM else "warning"
        fix = "free some: du -xh --max-depth 1 | sort -h"
        return _finding(severity, disk, "full", f"has {gib(free)} of free space", fix)
    if not disk.ours and disk.exists and not disk.read_only and free < _ROOM_FOR_A_MODEL:
        fix = "remove models nobody asks for, or keep them on another disk"
        return _finding("note", disk, "full", f"has {gib(free)} of free space: less than a model takes", fix)
    return None


def network(facts: Facts) -> Iterator[Finding]:
    """A model on another machine is read over the network at each start, and stalls with it when mapped."""
    for disk in facts.disks:
        far = disk.kind in _NETWORK or disk.kind.startswith(_NETWORK_FUSE)
        if not far or (disk.ours and "launches" not in disk.purpose):
            continue
        if disk.ours:
            fix = "XDG_STATE_HOME names a directory on a disk of this machine"
            yield _finding("warning", disk, "network", f"is on the network ({disk.kind}): locks may not hold", fix)
        elif disk.exists:
            fix = "copy models to a disk of this machine"
            yield _finding("note", disk, "network", f"is on the network ({disk.kind}): 10 GB take 90 s at 1 Gb/s", fix)


def spinning(facts: Facts) -> Iterator[Finding]:
    """A hard disk gives some 200 MB/s."""
    for disk in facts.disks:
        if disk.spinning and disk.exists and not disk.ours:
            fix = "keep models on an SSD"
            yield _finding("note", disk, "spinning", "is on a hard disk: 10 GB take about a minute", fix)


def _finding(severity: Severity, disk: Disk, name: str, what: str, fix: str) -> Finding:
    return Finding(severity=severity, area="disks", id=name, text=f"{disk.path} ({disk.purpose}) {what}", fix=fix)


CHECKS: Final = (writable, room, network, spinning)
