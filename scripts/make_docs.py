#!/usr/bin/env python3
"""Write the generated documents: docs/cli.md from the commands' own help, docs/recipe.md from the recipe schema.

    python scripts/make_docs.py            write them
    python scripts/make_docs.py --check    say which are stale; exit code 1 if one is

The pages are made of names, metavars, defaults and help texts, not of rendered help pages, so that they do not
change with the width of a terminal or the version of typer.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Any

from typer.main import get_command

from halfbyte.cli.app import app
from halfbyte.recipe import preset_markdown, recipe_schema_markdown

ROOT = Path(__file__).resolve().parents[1]
GENERATED = "<!-- made by scripts/make_docs.py: edit the source, not this page -->"
INTRO = "Results go to stdout, progress and notices to stderr. `halfbyte --version` prints the version."
EXIT_CODES = """\
| exit code | means |
|---|---|
| 0 | done; for `run`: accepted |
| 1 | an error that you can put right: one line on stderr says how |
| 2 | the request is wrong: an option, a recipe key, an output directory in use |
| 3 | `run` finished, and a gate failed or was not measured; `eval`: the 4-bit answers are too long |
"""
RECIPE_INTRO = """\
A recipe says what to make of a model. It names no file and no machine, so that its resolved form, together with
the model's tensors and the calibration tokens, names a piece of work.

Give a recipe with `-r`: the name of a preset, or a YAML file. `--set key=value` changes a key, `--set key+=value`
adds to a list, and a dot reaches a nested key (`--set boundary.keep=blocks`). The command line beats the file, the
file beats the defaults. An unknown key is an error that names the nearest one.

```yaml
method: gptq
group_size: 64
ignore: [lm_head, "re:.*layers\\\\.0\\\\.mlp\\\\.down_proj"]
boundary: {blocks: 1, keep: projections}
calibration: {sequences: 512, max_tokens: 2048}
```
"""


def commands() -> dict[str, Any]:
    """The command line's commands by name, in the order of `halfbyte --help`."""
    group: Any = get_command(app)
    return dict(group.commands)


def cli_page() -> str:
    """docs/cli.md."""
    parts = [GENERATED, "# Commands", INTRO, EXIT_CODES.strip()]
    found = commands()
    rows = [f"| [`{name}`](#halfbyte-{name}) | {cell(command.short_help)} |" for name, command in found.items()]
    parts.append("\n".join(["| command | what it does |", "|---|---|", *rows]))
    for name, command in found.items():
        parts += [f"## halfbyte {name}", f"`{usage(name, command)}`", " ".join(command.help.split())]
        parts.append("\n".join(["| | | default |", "|---|---|---|", *map(row, command.params)]))
    return "\n\n".join(parts) + "\n"


def usage(name: str, command: Any) -> str:
    """A command's first line: required options, then arguments."""
    words = ["halfbyte", name]
    for parameter in command.params:
        if is_argument(parameter):
            words.append(parameter.metavar)
        elif parameter.required:
            words.append(f"{spelled(parameter)[-1]} {parameter.metavar}")
    return " ".join([*words, "[OPTIONS]"])


def row(parameter: Any) -> str:
    """An option or an argument as a row of a table. Raises ValueError for an option that names no metavar."""
    if is_argument(parameter):
        return f"| `{parameter.metavar}` | {cell(parameter.help)} | {default(parameter)} |"
    if not parameter.is_flag and not parameter.metavar:
        raise ValueError(f"{parameter.opts[0]} has no metavar: give it one")
    words = ", ".join(f"`{name}`" for name in spelled(parameter))
    value = "" if parameter.is_flag else f" {parameter.metavar}"
    return f"| {words}{value} | {cell(parameter.help)} | {default(parameter)} |"


def is_argument(parameter: Any) -> bool:
    return not parameter.opts[0].startswith("-")


def spelled(parameter: Any) -> list[str]:
    """An option's names, the short one last."""
    return sorted([*parameter.opts, *parameter.secondary_opts], key=lambda name: not name.startswith("--"))


def default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value is None or value == () or (parameter.opts[0].startswith("-") and parameter.is_flag):
        return ""
    return f"`{value.value if isinstance(value, Enum) else value}`"


def cell(text: str) -> str:
    """Text that holds in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def recipe_page() -> str:
    """docs/recipe.md."""
    parts = [GENERATED, "# Recipes", RECIPE_INTRO.strip(), "## Keys", recipe_schema_markdown().strip()]
    parts += ["“follows” means that the key takes its value from the method, the grid or the effort.", "## Presets"]
    return "\n\n".join([*parts, preset_markdown().strip()]) + "\n"


def documents() -> dict[str, str]:
    """Every generated page by its path below the repository's root."""
    return {"docs/cli.md": cli_page(), "docs/recipe.md": recipe_page()}


def stale() -> list[str]:
    """The generated pages that are missing or differ from what would be made now."""
    pages = documents().items()
    return [name for name, text in pages if not (ROOT / name).is_file() or (ROOT / name).read_text("utf-8") != text]


def main() -> None:
    old = stale()
    if "--check" in sys.argv[1:]:
        for name in old:
            print(f"{name} is stale: run python scripts/make_docs.py")
        sys.exit(bool(old))
    for name in old:
        (ROOT / name).write_text(documents()[name], encoding="utf-8")
        print(f"wrote {name}")


if __name__ == "__main__":
    main()
