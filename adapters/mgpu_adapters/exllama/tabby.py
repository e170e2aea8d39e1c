"""TabbyAPI, ExLlama's HTTP server: a folder of source. Which of its branches it is, and which Python runs it.

main (e632af4, 2026-08-13) serves EXL3 alone since 2026-07-14 (c8b9a8f); the branch exl2-checkpoint (79126f9) is the
last to serve EXL2. Neither can be installed as a package: it runs where it was cloned, with the Python of its venv.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from mgpu.adapter import Folder, Installed, Probe, Search
from mgpu.errors import RuntimeMissingError

_URL: Final = "https://github.com/theroyallab/tabbyAPI"
_SETUP: Final = "python3 -m venv venv && venv/bin/pip install '.[cu12]'"
INSTALL_V3: Final = f"git clone {_URL} ~/tabbyAPI && cd ~/tabbyAPI && {_SETUP}"
INSTALL_V2: Final = f"git clone --branch exl2-checkpoint {_URL} ~/tabbyAPI-exl2 && cd ~/tabbyAPI-exl2 && {_SETUP}"
_UPDATE: Final = "git pull && venv/bin/pip install --upgrade '.[cu12]'"

_PYTHONS: Final = ("venv/bin/python", ".venv/bin/python")
#: TabbyAPI asks for these itself when it loads a model (`check_package_version`).
_OLDEST: Final = {"exllamav2": (0, 3, 1), "exllamav3": (1, 4, 1)}
_CHECK: Final = re.compile(r"check_package_version\(\s*[\"'](exllamav[23])[\"']\s*,\s*[\"']([0-9.]{1,40})[\"']")
_METADATA: Final = re.compile(r"(?:^|/)(exllamav[23])-([0-9]{1,9}(?:\.[0-9]{1,9}){1,8})[^/]*\.dist-info$")


class Clone(Installed, frozen=True, kw_only=True):
    """TabbyAPI where it lies: `executable` is its main.py, `python` what runs it, `library` the version of ExLlama
    found there; empty where only main.py's own check tells (no venv of its own)."""

    python: str
    library: tuple[int, ...] = ()


def search_for(version: int) -> Search:
    """Both versions look in the same places; each takes the folder with its own backend first."""
    places = ("~/tabbyAPI", "~/TabbyAPI", "~/tabbyapi", "~/tabbyAPI-exl2", "~/src/tabbyAPI", "/opt/tabbyAPI")
    return Search(
        variable="MGPU_TABBYAPI",
        executables=("TabbyAPI",),
        package_files=(),
        install=INSTALL_V3 if version == 3 else INSTALL_V2,
        folder=Folder(
            places=places if version == 3 else (places[3], *places[:3], *places[4:]),
            program="main.py",
            wanted="endpoints/OAI/utils/stream_parser.py" if version == 3 else _backend(2),
            texts=(
                "backends/exllamav[23]/model.py",
                "common/tabby_config.py",
                *_PYTHONS,
                "*venv/lib/python3*/site-packages/exllamav[23]-*.dist-info",
                ".venv/lib/python3*/site-packages/exllamav[23]-*.dist-info",
            ),
        ),
    )


def read_clone(probe: Probe, version: int) -> Clone:
    """Raises `RuntimeMissingError` for a folder that is no TabbyAPI, of the other branch, or without its packages."""
    folder, texts, name = probe.executable.rpartition("/")[0], probe.outputs, _library(version)
    _check_branch(folder, texts, version)
    python = next((path for path in _PYTHONS if path in texts), None)
    library = _installed_library(texts, name, python)
    if python is not None and not library:
        raise RuntimeMissingError(
            f"the Python of {folder} ({python}) has no {name}",
            hint=f"install it: cd {folder} && {python.removesuffix('python')}pip install '.[cu12]'",
        )
    needs = _needed(texts, name)
    if library and library < needs:
        raise RuntimeMissingError(
            f"{name} {_dotted(library)} of {folder} is too old: TabbyAPI needs {_dotted(needs)}",
            hint=f"update it: cd {folder} && {_UPDATE}",
        )
    return Clone(
        runtime="exllamav3" if version == 3 else "exllamav2",
        executable=probe.executable,
        origin=probe.origin,
        version=f"TabbyAPI with {name} {_dotted(library) or f'{_dotted(needs)} or newer'}",
        flags=frozenset(),
        python=f"{folder}/{python}" if python else "python3",
        library=library,
    )


def assumed_clone(version: int) -> Clone:
    """The newest known, in one of the usual places; for plans that need none."""
    folder = "/opt/tabbyAPI" if version == 3 else "/opt/tabbyAPI-exl2"
    return Clone(
        runtime="exllamav3" if version == 3 else "exllamav2",
        executable=f"{folder}/main.py",
        origin="assumed",
        version="TabbyAPI with exllamav3 1.4.2" if version == 3 else "TabbyAPI with exllamav2 0.3.2",
        flags=frozenset(),
        python=f"{folder}/{_PYTHONS[0]}",
        library=(1, 4, 2) if version == 3 else (0, 3, 2),
    )


def _check_branch(folder: str, texts: Mapping[str, str], version: int) -> None:
    if "common/tabby_config.py" not in texts and not any(path.startswith("backends/") for path in texts):
        raise RuntimeMissingError(
            f"{folder} has a main.py, but is no TabbyAPI",
            hint=f"name its folder in MGPU_TABBYAPI, or install it: {INSTALL_V3 if version == 3 else INSTALL_V2}",
        )
    if _backend(version) in texts:
        if version == 2 or _backend(2) not in texts or _needed(texts, "exllamav3") >= _OLDEST["exllamav3"]:
            return
        raise RuntimeMissingError(
            f"the TabbyAPI in {folder} is of the time of ExLlamaV2, and its exllamav3 too old for today's EXL3",
            hint=f"clone main beside it, and name both in MGPU_TABBYAPI, with a colon between: {INSTALL_V3}",
        )
    if version == 2:
        raise RuntimeMissingError(
            f"the TabbyAPI in {folder} serves no EXL2: main left ExLlamaV2 in July 2026",
            hint=f"clone its last branch that does, beside it: {INSTALL_V2}",
        )
    raise RuntimeMissingError(
        f"the TabbyAPI in {folder} has no backend for EXL3", hint=f"update it: cd {folder} && {_UPDATE}"
    )


def _library(version: int) -> str:
    return f"exllamav{version}"


def _backend(version: int) -> str:
    return f"backends/exllamav{version}/model.py"


def _installed_library(texts: Mapping[str, str], name: str, python: str | None) -> tuple[int, ...]:
    """By its metadata in the venv of `python`, the newest if there are several; () without."""
    if python is None:
        return ()
    root = python.partition("/")[0]
    matches = [match for path in texts if path.startswith(f"{root}/") and (match := _METADATA.search(path))]
    return max((_numbers(match[2]) for match in matches if match[1] == name), default=())


def _needed(texts: Mapping[str, str], name: str) -> tuple[int, ...]:
    """What its source checks for; today's where it cannot be read."""
    checks = [_CHECK.findall(text) for path, text in texts.items() if path.startswith("backends/")]
    found = [_numbers(version) for each in checks for library, version in each if library == name]
    return max(found, default=_OLDEST[name])


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
