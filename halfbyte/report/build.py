"""Result files in, report.html and report.md out: one self-contained page without scripts, and the same in Markdown."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from halfbyte.files import write_text
from halfbyte.report.sources import read_sources
from halfbyte.report.views import build_views

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$])")
_INTRAWORD = re.compile(r"(?<=[A-Za-z0-9])\\_(?=[A-Za-z0-9])")


def build_report(run_dir: Path) -> tuple[Path, Path]:
    """Write report.html and report.md into `run_dir` from the result files there; returns both paths.

    Reads result files only, so that it can be made again at any time. What a file does not say stands there as
    not measured. Raises UsageError when the directory holds no results.
    """
    run_dir = Path(run_dir)
    views = build_views(read_sources(run_dir))
    page, plain = run_dir / "report.html", run_dir / "report.md"
    write_text(page, _html_environment().get_template("report.html.j2").render(views, style=_style()))
    write_text(plain, _markdown_environment().get_template("report.md.j2").render(views))
    return page, plain


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


def _html_environment() -> jinja2.Environment:
    return jinja2.Environment(loader=_Templates(), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False)


def _markdown_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=_Templates(), autoescape=False, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"md": escape_markdown, "fence": fence}
    return environment


class _Templates(jinja2.BaseLoader):
    def get_source(self, environment: jinja2.Environment, template: str) -> tuple[str, str, None]:
        return _resource(template), template, None


def _style() -> Markup:
    return Markup(_resource("style.css").strip())


def _resource(name: str) -> str:
    return resources.files("halfbyte.report").joinpath(name).read_text(encoding="utf-8")
