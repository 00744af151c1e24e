"""Result files in, report.html and report.md out: one self-contained page without scripts, and the same in Markdown."""

from __future__ import annotations

import functools
import re
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from halfbyte.files import write_text
from halfbyte.report.blocks import Page
from halfbyte.report.run_page import run_page
from halfbyte.report.sources import MANIFEST, read_sources

SWEEP = "sweep.json"
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$])")
_INTRAWORD = re.compile(r"(?<=[A-Za-z0-9])\\_(?=[A-Za-z0-9])")


def build_report(run_dir: Path) -> tuple[Path, Path]:
    """Write report.html and report.md into `run_dir` from the result files there; returns both paths.

    An artifact's own directory stays as it is: its report goes beside it, as NAME-report.html and NAME-report.md.
    Reads result files only, so that it can be made again at any time. What a file does not say stands there as
    not measured. Raises UsageError when the directory holds no results.
    """
    run_dir = Path(run_dir)
    if (run_dir / SWEEP).is_file():
        from halfbyte.report.sweep import build_sweep_report

        return build_sweep_report(run_dir)
    return write_page(run_page(read_sources(run_dir)), *_places(run_dir))


def write_page(page: Page, html: Path, markdown: Path) -> tuple[Path, Path]:
    """Write a page as HTML and as Markdown; returns both paths."""
    write_text(html, html_environment().get_template("page.html.j2").render(page=page, style=style()))
    write_text(markdown, markdown_environment().get_template("page.md.j2").render(page=page))
    return html, markdown


def _places(directory: Path) -> tuple[Path, Path]:
    if not (directory / MANIFEST).is_file():
        return directory / "report.html", directory / "report.md"
    whole = directory.resolve()
    beside = directory.parent if directory.name == whole.name else whole.parent
    return beside / f"{whole.name}-report.html", beside / f"{whole.name}-report.md"


def escape_markdown(value: object) -> str:
    """Text as Markdown that shows it literally, on one line: no table, link, HTML or emphasis can start in it."""
    flat = " ".join(str(value).split())
    escaped = _INTRAWORD.sub("_", _MARKDOWN.sub(r"\\\1", flat.replace("&", "&amp;")))
    return escaped.replace("\\<", "&lt;").replace("\\>", "&gt;").replace("://", ":&#47;/")


def fence(value: object) -> str:
    """Text as a fenced block, with a fence longer than any run of backticks in it."""
    body = str(value)
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", body)), default=0))
    return f"{ticks}\n{body}\n{ticks}"


@functools.cache
def html_environment() -> jinja2.Environment:
    return jinja2.Environment(loader=_Templates(), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False)


@functools.cache
def markdown_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=_Templates(), autoescape=False, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"md": escape_markdown, "fence": fence}
    return environment


class _Templates(jinja2.BaseLoader):
    def get_source(self, environment: jinja2.Environment, template: str) -> tuple[str, str, None]:
        return _resource(template), template, None


def style() -> Markup:
    return Markup(_resource("style.css").strip())


def _resource(name: str) -> str:
    return resources.files("halfbyte.report").joinpath(name).read_text(encoding="utf-8")
