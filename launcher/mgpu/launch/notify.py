"""What systemd is told of a launch that it has started (sd_notify(3), Type=notify)."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

VARIABLE: Final = "NOTIFY_SOCKET"

_PATIENCE_S: Final = 1.0


def notify(state: str, environ: Mapping[str, str] = os.environ) -> None:
    """Send `state` ("READY=1", "STATUS=…"); nothing happens where no service manager listens."""
    address = environ.get(VARIABLE, "")
    if not address.startswith(("/", "@")):
        return
    name = f"\0{address[1:]}" if address.startswith("@") else address
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(_PATIENCE_S)  # its queue may be full
        sender.sendto(state.encode("utf-8", "replace"), name)
