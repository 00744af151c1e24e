"""The import rule: rooms import downward only, and the algorithms and formats stand alone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import halfbyte.types

ROOT = Path(halfbyte.types.__file__).parent
LEVELS = (
    ("types",),
    ("errors", "hashing"),
    ("files",),
    ("platforms", "recipe"),
    ("algo", "formats", "models"),
    ("plan", "calibration"),
    ("engine", "artifact", "serving"),
    ("evaluate", "report"),
    ("experiments",),
    ("cli",),
)
RANK = {room: rank for rank, level in enumerate(LEVELS) for room in level}
ALONE = {"algo": {"types"}, "formats": {"types", "errors"}}
"""Rooms that stand on torch and the shared vocabulary alone."""
SEPARATE = ("vllm",)
"""Programs of their own environment: never imported."""


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    """The room a file belongs to; "" for the package's own face (__init__, __main__)."""
    name = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if name.startswith("__") else name


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, full module name) of every import in a module of `package`, relative ones resolved, nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name != "halfbyte")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "halfbyte":
            yield node.lineno, f"halfbyte.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            if stem == "halfbyte":
                yield from ((node.lineno, f"halfbyte.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, stem
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def breaches(source: str, path: Path) -> list[str]:
    """What a module with this source, at this place, would do against the rule."""
    room = room_of(path)
    package = ("halfbyte", *path.relative_to(ROOT).parts[:-1])
    found = []
    for line, name in imported(ast.parse(source), package):
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        top, _, rest = name.partition(".")
        if top in SEPARATE:
            found.append(f"{where}: it runs as a program of its own")
        if top != "halfbyte":
            kernels = "kernels" in path.relative_to(ROOT).parts and top == "triton"
            if room in ALONE and top != "torch" and top not in sys.stdlib_module_names and not kernels:
                found.append(f"{where}: {room} stands on torch alone")
            continue
        other = rest.split(".")[0]
        if other in (room, "__version__") or not room:
            continue
        if other not in RANK:
            found.append(f"{where}: {other!r} is no room")
        elif RANK[other] >= RANK[room]:
            found.append(f"{where}: not downward")
        elif room in ALONE and other not in ALONE[room]:
            found.append(f"{where}: {room} takes {', '.join(sorted(ALONE[room]))} alone")
    return found


def test_every_room_has_its_place() -> None:
    rooms = {room_of(p) for p in modules()} - {""}
    assert rooms <= set(RANK), f"without a place: {rooms - set(RANK)}"
    assert {"types", "errors", "algo", "formats", "models", "engine"} <= rooms


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward_only(path: Path) -> None:
    assert breaches(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("engine/x.py", "from halfbyte.evaluate import fidelity"),
        ("engine/x.py", "import halfbyte.artifact"),
        ("engine/x.py", "from ..artifact import check"),
        ("engine/x.py", "def f():\n    from halfbyte import cli"),
        ("engine/x.py", "import halfbyte.cellar"),
        ("engine/x.py", "import halfbyte\nhalfbyte.quantize('model')"),
        ("algo/x.py", "from halfbyte.formats import get_format"),
        ("algo/x.py", "from halfbyte.errors import HalfbyteError"),
        ("algo/x.py", "import numpy"),
        ("formats/x.py", "from safetensors import safe_open"),
        ("formats/x.py", "import halfbyte.recipe.schema"),
        ("serving/x.py", "from vllm import LLM"),
        ("serving/x.py", "import importlib\nimportlib.import_module('vllm.engine')"),
        ("errors.py", "import halfbyte.files"),
        ("platforms/x.py", "from halfbyte.recipe import load_recipe"),
        ("types.py", "from halfbyte.errors import HalfbyteError"),
    ],
)
def test_the_rule_finds_a_breach(place: str, source: str) -> None:
    assert len(breaches(source, ROOT / place)) == 1


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("engine/x.py", "from halfbyte.algo import gptq\nfrom halfbyte.engine.block import options_of\nimport scipy"),
        ("algo/x.py", "from __future__ import annotations\nimport math, torch\nfrom halfbyte.types import GRIDS"),
        ("algo/x.py", "from .grid import Grid\nfrom . import rtn"),
        ("platforms/x.py", "from halfbyte.errors import UsageError"),
        ("cli/app.py", "from halfbyte.experiments import run"),
        ("engine/x.py", "import halfbyte\nprint(halfbyte.__version__)"),
        ("__init__.py", "from halfbyte.experiments import run"),
    ],
)
def test_the_rule_lets_good_imports_pass(place: str, source: str) -> None:
    assert breaches(source, ROOT / place) == []
