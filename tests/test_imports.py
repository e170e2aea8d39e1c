"""The house's floors: an import never points up; only named modules reach for drivers, programs and the network."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
ROOTS: Final = {"mgpu": "launcher", "mgpu_adapters": "adapters", "mgpu_profiles": "profiles"}

#: From the ground up. A module may import its own floor and those below.
FLOORS: Final = (
    ("mgpu.errors", "mgpu.units", "mgpu.request"),
    ("mgpu.rig", "mgpu.model", "mgpu.doctor.finding"),
    ("mgpu_profiles", "mgpu.inspect", "mgpu.plan"),
    ("mgpu.detect", "mgpu.report", "mgpu.service", "mgpu.adapter", "mgpu.plain", "mgpu.cluster"),
    ("mgpu_adapters", "mgpu.launch", "mgpu.decide"),
    (
        "mgpu.gather",
        "mgpu.whatif",
        "mgpu.options",
        "mgpu.rigs",
        "mgpu.commands",
        "mgpu.bench",
        "mgpu.shells",
        "mgpu.runtimes",
        "mgpu.doctor",
        "mgpu.auto",
        "mgpu.remade",
        "mgpu.running",
        "mgpu.launches",
        "mgpu.unit",
    ),
    ("mgpu.cli",),
    ("mgpu.__main__",),
)

#: Packages with effects, and the only modules that may import them.
ALONE: Final = {
    "subprocess": ("mgpu.launch",),
    "pynvml": ("mgpu.detect.nvidia",),
    "requests": ("mgpu.launch", "mgpu.inspect.remote"),
    "click": (
        "mgpu_profiles.store",
        "mgpu.cli",
        "mgpu.options",
        "mgpu.commands",
        "mgpu.running",
        "mgpu.launches",
        "mgpu.bench",
        "mgpu.rigs",
        "mgpu.runtimes",
        "mgpu.doctor.command",
        "mgpu.shells",
    ),
    "rich": ("mgpu.report",),
}


def _modules() -> Iterator[tuple[str, Path]]:
    for package, root in ROOTS.items():
        for path in sorted((ROOT / root / package).rglob("*.py")):
            parts = path.relative_to(ROOT / root).with_suffix("").parts
            yield ".".join(part for part in parts if part != "__init__"), path


MODULES: Final = dict(_modules())


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def _within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def _floor(module: str) -> int:
    return next((level for level, prefixes in enumerate(FLOORS) if _within(module, prefixes)), -1)


@pytest.mark.parametrize("module", MODULES)
def test_imports_never_point_up(module: str) -> None:
    if module in ROOTS:
        return
    assert _floor(module) >= 0, f"{module} has no floor"
    for imported in _imports(MODULES[module]):
        if imported.split(".")[0] in ROOTS and imported not in ROOTS:
            assert _floor(imported) <= _floor(module), f"{module} imports {imported}, which is above it"


@pytest.mark.parametrize("module", MODULES)
def test_only_named_modules_have_effects(module: str) -> None:
    for imported in _imports(MODULES[module]):
        allowed = ALONE.get(imported.split(".")[0])
        assert allowed is None or _within(module, allowed), f"{module} imports {imported}"


def test_adapters_are_pure() -> None:
    for module, path in MODULES.items():
        if module.startswith("mgpu_adapters"):
            bad = {"os", "sys", "pathlib", "socket", "subprocess", "click", "requests", "psutil"}
            assert not bad & {imported.split(".")[0] for imported in _imports(path)}, module


def test_every_package_imported_is_declared() -> None:
    """Standard library, ours, or a dependency in pyproject.toml."""
    declared = {"click", "msgspec", "pynvml", "platformdirs", "psutil", "requests", "rich", "tomli_w"}
    declared.add("urllib3")  # a part of requests' own interface: what a broken stream raises
    for module, path in MODULES.items():
        for imported in _imports(path):
            top = imported.split(".")[0]
            assert top in sys.stdlib_module_names | declared | set(ROOTS), f"{module} imports {imported}"
