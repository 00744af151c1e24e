"""The command line's surface does not change unnoticed. What the commands do is tested in tests/unit/cli.

`python -m tests.unit.test_cli` writes cli_surface.txt again, after a change of commands or options that is meant.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from halfbyte import __version__ as version
from halfbyte.cli.app import app
from tests.unit.artifacts import halfbyte

ROOT = Path(__file__).resolve().parents[2]
SURFACE = Path(__file__).with_name("cli_surface.txt")


def test_the_version(capsys: Any) -> None:
    assert halfbyte("--version") == 0
    assert capsys.readouterr().out == f"halfbyte {version}\n"


def test_version_and_help_load_no_library() -> None:
    """They answer at once: torch and transformers take seconds to import."""
    script = (
        "import sys; from halfbyte.cli.app import main; sys.argv = ['halfbyte', sys.argv[1]]\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    for word in ("--version", "--help"):
        done = subprocess.run([sys.executable, "-c", script, word], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr


def test_help_needs_no_model(capsys: Any) -> None:
    for words in (["--help"], ["quantize", "--help"], ["-h"]):
        assert halfbyte(*words) == 0
        assert "Usage: halfbyte" in capsys.readouterr().out
    assert halfbyte() == 2


def test_the_surface_is_frozen() -> None:
    assert surface() == SURFACE.read_text(encoding="utf-8"), (
        "the command line's surface changed; if that is meant, write it down with `python -m tests.unit.test_cli`, "
        "and say it in CHANGELOG.md"
    )


def surface() -> str:
    """Commands, arguments and options with their types and defaults, a line each, as the functions state them."""
    assert app.registered_callback is not None
    lines = ["halfbyte", *_parameters(app.registered_callback.callback)]
    for command in app.registered_commands:
        assert command.callback is not None
        lines += [f"{command.name}: {inspect.getdoc(command.callback)}", *_parameters(command.callback)]
    return "\n".join(lines) + "\n"


def _parameters(function: Any) -> list[str]:
    hints = get_type_hints(function, include_extras=True)
    found = inspect.signature(function).parameters.items()
    return ["    " + _parameter(n, hints[n], p.default) for n, p in found if hints[n] is not typer.Context]


def _parameter(name: str, hint: Any, default: Any) -> str:
    kind, info = get_args(hint)
    named = [info.default, *(info.param_decls or ())] if isinstance(info, OptionInfo) else [info.metavar]
    decls = [word for word in named if isinstance(word, str)]
    words = [" ".join(decls) or "--" + name.replace("_", "-"), _type(kind, info)]
    words.append("required" if default is inspect.Parameter.empty else f"default {_value(default)}")
    return ", ".join(words)


def _value(value: Any) -> str:
    return str(value.value if isinstance(value, Enum) else value)


def _type(kind: Any, info: Any) -> str:
    parts = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) in (Union, UnionType) and len(parts) == 1:
        return _type(parts[0], info)
    if get_origin(kind) is list:
        return f"list of {_type(parts[0], info)}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " | ".join(choice.value for choice in kind)
    bounds = "".join(f" {word} {x}" for word, x in (("from", info.min), ("to", info.max)) if x is not None)
    return {bool: "flag", str: "text", int: "integer", float: "number", Path: "path"}[kind] + bounds


if __name__ == "__main__":
    SURFACE.write_text(surface(), encoding="utf-8")
    print(f"written: {SURFACE}")
