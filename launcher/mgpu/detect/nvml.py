"""Talking to NVML, NVIDIA's management library, without surprises: answers, or a return code in words.

The binding is handed in: `mgpu.detect.nvidia` is the one module that imports it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any, Final, Self

from mgpu.rig import Finding

# Return codes of nvml.h.
INVALID_ARGUMENT: Final = 2
NOT_SUPPORTED: Final = 3
NOT_FOUND: Final = 6
DRIVER_NOT_LOADED: Final = 9
LIBRARY_NOT_FOUND: Final = 12
FUNCTION_NOT_FOUND: Final = 13
GPU_IS_LOST: Final = 15
RESET_REQUIRED: Final = 16
LIB_RM_VERSION_MISMATCH: Final = 18
GPU_NOT_FOUND: Final = 28
UNKNOWN: Final = 999

# Other constants of nvml.h: bindings of some versions lack or misspell them.
MEMORY_V2: Final = 0x02000028
CLOCK_MEM: Final = 2
NVLINK_MAX_LINKS: Final = 36
NVLINK_DEVICE_TYPE_SWITCH: Final = 2
P2P_CAPS_INDEX_READ: Final = 0  # nvidia-ml-py 11 to 13 has the tuple (0,): a stray comma
P2P_CAPS_INDEX_NVLINK: Final = 2
P2P_STATUS_OK: Final = 0

WSL_LIBRARY: Final = "/usr/lib/wsl/lib/libnvidia-ml.so.1"

_GONE: Final = "reboot; if it happens again, check the riser and the power supply"

_REASONS: Final = {
    4: ("no permission to use it", "check the owner of /dev/nvidia*; SELinux: setsebool -P container_use_devices on"),
    NOT_FOUND: ("the driver knows it no longer", _GONE),
    8: ("its power cable is not connected", "connect the auxiliary power, then reboot"),
    DRIVER_NOT_LOADED: (
        "the driver is installed, but its kernel module is not loaded",
        "sudo modprobe nvidia; with Secure Boot the module must be signed",
    ),
    LIBRARY_NOT_FOUND: (
        "no driver found (libnvidia-ml.so.1)",
        "install the driver if there is an NVIDIA card; start a container with --gpus all",
    ),
    GPU_IS_LOST: ("it has fallen off the bus", _GONE),
    RESET_REQUIRED: ("it must be reset", "sudo nvidia-smi --gpu-reset, or reboot"),
    LIB_RM_VERSION_MISMATCH: (
        "driver and library versions differ",
        "reboot or reload the nvidia module; in a container, restart it",
    ),
    GPU_NOT_FOUND: ("the driver knows it no longer", _GONE),
    UNKNOWN: (
        "the driver says Unknown Error",
        "run nvidia-smi; a container that lost its devices (systemctl daemon-reload) must be restarted",
    ),
}


class NoAnswerError(Exception):
    """The driver, or the binding, did not answer. `code` is NVML's return code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"NVML error {code}")
        self.code = code

    def finding(self, subject: str) -> Finding:
        """What a person should know and do: `"GPU 1: it has fallen off the bus"`."""
        unknown = (f"the driver answers with error {self.code}", "run nvidia-smi and see what it says")
        reason, hint = _REASONS.get(self.code, unknown)
        return Finding(text=f"{subject}: {reason}", hint=hint)


class Nvml:
    """NVML, by the binding's names less their `nvml` prefix. `with` opens it (raises `NoAnswerError`) and closes it."""

    def __init__(self, binding: Any) -> None:
        self._binding = binding

    def __enter__(self) -> Self:
        try:
            self.call("Init")
        except NoAnswerError as error:
            if error.code != LIBRARY_NOT_FOUND or not _load_wsl_library():
                raise
            self.call("Init")
        return self

    def __exit__(self, *_: object) -> None:
        self.ask("Shutdown")

    def call(self, name: str, *args: object) -> Any:
        """The driver's answer; bytes (early bindings) as text. Raises `NoAnswerError`."""
        try:
            answer = getattr(self._binding, f"nvml{name}")(*args)
        except self._binding.NVMLError as error:
            raise NoAnswerError(error.value) from None
        except Exception:  # noqa: BLE001  seen: UnicodeDecodeError, ArgumentError, NVMLLibraryMismatchError, TypeError
            raise NoAnswerError(FUNCTION_NOT_FOUND) from None
        return decode(answer)

    def ask(self, name: str, *args: object) -> Any:
        """The driver's answer, or None."""
        try:
            return self.call(name, *args)
        except NoAnswerError:
            return None


def decode(value: Any) -> Any:
    """Bytes as text; anything else as it is."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _load_wsl_library() -> bool:
    """WSL 2 keeps the library where the loader may not look. Once loaded, it is found again by its name (SONAME)."""
    if sys.platform != "linux" or "microsoft" not in os.uname().release.lower():
        return False
    try:
        ctypes.CDLL(WSL_LIBRARY)
    except OSError:
        return False
    return True
