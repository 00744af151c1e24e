"""The documents: generated pages are current, links resolve, and what the README tells a reader to type exists."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import halfbyte
from halfbyte.experiments.gates import parse_gate
from halfbyte.platforms import list_platforms, load_evidence
from halfbyte.recipe import list_presets
from halfbyte.recipe.loader import recipe_from_mapping

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {"runs", "build", "dist", "node_modules", "__pycache__"}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
SPEEDS = re.compile(r"^\| (BF16|GPTQ|AWQ|NVFP4)([^|]*) \|(?: (16 bits|FP8) \|)? ([\d.]+) \| (.+) \|$", re.M)
"""A row of a table of serving speed: method, kernel, KV cache, weights, and figures by concurrency and of prefill."""
PLACE = re.compile(r"(?<![\w.$~}-])/(?:work|root|home|mnt|workspace)/\w")
"""An absolute path of somebody's machine."""


def tool() -> ModuleType:
    """scripts/make_docs.py as a module."""
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def own_files() -> list[Path]:
    """The repository's files: what git knows or would take; outside a checkout, all but hidden and built ones."""
    try:
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        files = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        parts = {path: path.relative_to(ROOT).parts for path in ROOT.rglob("*")}
        files = [p for p, names in parts.items() if not any(n in SKIPPED or n.startswith(".") for n in names)]
    return [path for path in files if path.is_file()]


def pages() -> list[Path]:
    return sorted(path for path in own_files() if path.suffix == ".md")


def typed(text: str) -> Iterator[list[str]]:
    """The words of every halfbyte command in a page: in shell blocks and in code spans."""
    blocks = [body for language, body in FENCE.findall(text) if language in ("bash", "sh", "console")]
    spans = re.findall(r"`(halfbyte [^`\n]+)`", FENCE.sub("", text))
    lines = [line for body in blocks for line in body.replace("\\\n", " ").splitlines()]
    for line in [*lines, *spans]:
        if line.split() and Path(line.split()[0]).name == "halfbyte":
            yield shlex.split(line, comments=True)[1:]


def options_of(command: object) -> set[str]:
    names = {"-h", "--help"}
    for parameter in command.params:  # type: ignore[attr-defined]
        names |= {name for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("-")}
    return names


def complaints(words: list[str]) -> list[str]:
    """What a command line names that does not exist."""
    found = tool().commands()
    if words[0].startswith("-"):
        return [] if words[0] in ("-h", "--help", "--version") else [f"no option {words[0]}"]
    if words[0] not in found:
        return [f"no command {words[0]}"]
    mine = words[1 : words.index("--")] if "--" in words else words[1:]
    known = options_of(found[words[0]])
    wrong = [f"{words[0]} has no option {w}" for w in mine if w.startswith("-") and w.split("=")[0] not in known]
    for name, value in itertools.pairwise(mine):
        if name == "--on" and value not in (*list_platforms(), "PLATFORM", "my.yaml"):
            wrong.append(f"no platform {value}")
        if name == "--gate":
            parse_gate(value)
    return wrong


def test_generated_pages_are_current() -> None:
    assert tool().stale() == [], "run python scripts/make_docs.py"


def test_a_changed_page_is_found_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tool()
    for name, text in made.documents().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(made, "ROOT", tmp_path)
    assert made.stale() == []
    (tmp_path / "docs" / "cli.md").write_text("older", encoding="utf-8")
    (tmp_path / "docs" / "recipe.md").unlink()
    assert made.stale() == ["docs/cli.md", "docs/recipe.md"]


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name} links to {target}"
        if anchor and place.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", place.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name} links to {target}"


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))])
def test_commands_in_a_page_exist(name: str) -> None:
    lines = list(typed((ROOT / name).read_text(encoding="utf-8")))
    assert [problem for words in lines for problem in complaints(words)] == []
    if name == "README.md":
        assert {words[0] for words in lines} >= set(tool().commands()), "the README leaves a command out"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("halfbyte sow MODEL", "no command sow"),
        ("halfbyte plan MODEL --onto h100", "plan has no option --onto"),
        ("halfbyte plan MODEL --on h99", "no platform h99"),
        ("halfbyte --verbose", "no option --verbose"),
    ],
)
def test_a_wrong_command_is_found(line: str, problem: str) -> None:
    for page in (f"Say `{line}`.\n", f"```bash\n{line}  # as it is\n```\n"):
        assert [complaints(words) for words in typed(page)] == [[problem]]


@pytest.mark.parametrize("name", ["README.md", "docs/recipe.md"])
def test_recipes_in_a_page_are_valid(name: str) -> None:
    bodies = [b for language, b in FENCE.findall((ROOT / name).read_text(encoding="utf-8")) if language == "yaml"]
    assert bodies
    for body in bodies:
        recipe_from_mapping(yaml.safe_load(body), name)


def test_the_recipe_page_names_every_preset() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name, *_ in list_presets())


def test_scripts_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"\bscripts/[\w.]+", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named >= {"scripts/demo", "scripts/test"}
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_draws_every_room() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The house")[2]
    rooms = [p.parent.name for p in (ROOT / "halfbyte").glob("*/__init__.py")]
    assert [room for room in rooms if f"  {room}/" not in tree] == []


def test_the_changelog_has_this_version() -> None:
    assert f"## {halfbyte.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    found = []
    for path in own_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in PLACE.finditer(text)]
    assert found == []


def test_such_a_place_would_be_found() -> None:
    assert PLACE.search("cd " + "/".join(["", "home", "me", "x"]))
    assert not PLACE.search("a/home/page and $HOME/mnt/x and https://host/root")


@pytest.mark.parametrize(
    ("page", "heading", "of", "form", "count"),
    [
        ("docs/results/h100-serving.md", "", ("h100", "8B"), "{0:.3f} ({1:.2f}×)", 9),
        ("docs/results/h200-serving.md", "An 8B shape", ("h200", "8B"), "{0:.3f} ({1:.2f}×)", 9),
        ("docs/results/h200-serving.md", "A 32B shape", ("h200", "32B"), "{0:.3f} ({1:.2f}×)", 3),
        ("docs/vllm-facts.md", "", ("h100", "8B"), "{1:.2f}×", 4),
    ],
)
def test_pages_show_the_evidence_of_serving_speed(
    page: str, heading: str, of: tuple[str, str], form: str, count: int
) -> None:
    (table,) = (t for t in load_evidence() if t.device == of[0] and f"-{of[1]} shape" in t.model.name)
    timed = [row for row in table.rows if row.format != "compressed-tensors"]
    text = (ROOT / page).read_text(encoding="utf-8")
    if heading:
        text = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    shown = SPEEDS.findall(text)
    assert len(shown) == count
    for method, kernel, cache, weights, figures in shown:
        named, kept = (method + kernel).casefold(), "fp8" if cache == "FP8" else "auto"
        (row,) = (
            r
            for r in timed
            if (r.method, r.kv_cache) == (method.lower(), kept) and r.kernel.partition(",")[0].casefold() in named
        )
        pairs = [(row.seconds[level], seconds) for level, seconds in table.baseline.seconds.items()]
        pairs.append((row.prefill, table.baseline.prefill))
        assert (weights, figures.split(" | ")) == (f"{row.weights_gib:.2f}", [form.format(s, b / s) for s, b in pairs])
