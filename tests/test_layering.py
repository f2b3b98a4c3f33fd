"""Imports point one way: from the outer packages to the core, and in the core to the left."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OUTER = ("server", "training", "clients")
#: Each may import itself and what is left of it.
LAYERS = (
    ("errors", "config"), ("commands",), ("models",), ("fast_weights",), ("adaptation",),
    ("sessions",), ("engine",), ("bench",),
)  # fmt: skip
#: The package's face and its command: above all layers, imported by none of them.
FACE = ("__init__", "cli")


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names of everything that a file imports, wherever in the file it does."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import module` names the module, too.
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def imports_any(path: Path, packages: tuple[str, ...]) -> list[str]:
    return [name for name in imports(path) if name.split(".")[0] in packages]


def layer(name: str) -> int:
    """Index in LAYERS of a part of ponderttt."""
    return next(index for index, names in enumerate(LAYERS) if name in names)


def part_of(path: Path) -> str:
    """`engine` for ponderttt/engine/core.py, `errors` for ponderttt/errors.py."""
    first = path.relative_to(ROOT / "ponderttt").parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import a.b as c", ["a.b"]),
        ("from a import b, c", ["a.b", "a.c"]),
        ("from . import b", ["ponderttt.engine.b"]),
        ("from ..models import b", ["ponderttt.models.b"]),
        ("def f():\n    from a.b import c", ["a.b.c"]),
        ("if TYPE_CHECKING:\n    import a", ["a"]),
    ],
)
def test_imports_of_every_form_are_found(
    monkeypatch: pytest.MonkeyPatch, source: str, names: list[str]
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: source)
    assert list(imports(ROOT / "ponderttt" / "engine" / "core.py")) == names


@pytest.mark.parametrize("path", modules("ponderttt"), ids=lambda p: str(p.relative_to(ROOT)))
def test_core_module_imports_no_outer_package_and_nothing_to_its_right(path: Path) -> None:
    assert imports_any(path, (*OUTER, "tests")) == []
    part = part_of(path)
    if part in FACE:
        return
    for name in imports_any(path, ("ponderttt",)):
        imported = name.split(".")[1]
        assert imported not in FACE, f"{name} is the package's face"
        assert layer(imported) <= layer(part), f"{part} may not import {name}"


def test_layers_cover_every_part_of_the_core() -> None:
    parts = {part_of(path) for path in modules("ponderttt")}
    assert parts == {*FACE, *(name for names in LAYERS for name in names)}


@pytest.mark.parametrize("path", modules("clients"), ids=lambda p: str(p.relative_to(ROOT)))
def test_client_module_talks_over_http_and_shares_nothing_but_errors(path: Path) -> None:
    assert imports_any(path, ("server", "training")) == []
    core = imports_any(path, ("ponderttt",))
    assert [name for name in core if not name.startswith("ponderttt.errors.")] == []


@pytest.mark.parametrize("module", ["ponderttt", "ponderttt.errors", "ponderttt.config"])
def test_import_of_the_package_loads_no_torch(module: str) -> None:
    heavy = ("torch", "transformers", "numpy", "safetensors")
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
