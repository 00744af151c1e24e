"""The report in a headless Chromium: plots drawn, nothing beyond the page, legible in both themes, a silent console."""

from __future__ import annotations

import functools
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from halfbyte.report import build_report
from tests.unit import report_files as files
from tests.unit.test_report import poison

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROBE = Path(__file__).with_name("report_probe.js")
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
WIDTHS = (400, 1400)
BAD = (
    "<main><h1 style='color: #999; background: #aaa'>faint</h1><div style='width: 900px'>a line that is too wide to be"
    " read without scrolling the page, on any small screen</div><svg class='field' width='0' height='0'>"
    "</svg><script>window.owned = true; console.error('a complaint of the page')</script></main>"
)


@functools.cache
def chromium() -> str | None:
    """The browser: HALFBYTE_CHROMIUM, else the first on the PATH that runs (some are mere stubs)."""
    named = os.environ.get("HALFBYTE_CHROMIUM")
    found = [named] if named else [place for name in NAMES if (place := shutil.which(name))]
    return next(
        (place for place in found if subprocess.run([place, "--version"], capture_output=True).returncode == 0), None
    )


pytestmark = pytest.mark.skipif(
    chromium() is None, reason=f"no Chromium: none of {', '.join(NAMES)} on the PATH, no HALFBYTE_CHROMIUM"
)
Seen = dict[tuple[str, int], dict[str, Any]]


def pages(place: Path) -> dict[str, Path]:
    """A whole run, a run with hostile words, an artifact alone, a sweep, and a page that is wrong in every respect."""
    whole = files.write_run(place / "run")
    (whole / "sensitivity.json").write_text(json.dumps(files.sensitivity()))
    hostile = files.write_run(place / "hostile")
    for file in hostile.rglob("*.json"):
        file.write_text(json.dumps(poison(json.loads(file.read_text()))))
    alone, sweep = place / "alone" / "model", place / "sweep"
    for directory, name, content in ((alone, "halfbyte.json", files.manifest()), (sweep, "sweep.json", files.sweep())):
        directory.mkdir(parents=True)
        (directory / name).write_text(json.dumps(content))
    found = {d.name: build_report(d)[0] for d in (whole, hostile, alone, sweep)}
    found["bad"] = place / "bad.html"
    found["bad"].write_text(f"<!doctype html><html><head></head><body>{BAD}</body></html>")
    return found


def probed(page: Path, name: str) -> Path:
    """A copy of the page with the probe in it, which the page's own policy would not let run."""
    text = POLICY.sub("", page.read_text(encoding="utf-8"))
    text = text.replace("<html", f'<html data-name="{name}"', 1)
    copy = page.with_name(f"{name}-probed.html")
    copy.write_text(text.replace("</body>", f"<script>{PROBE.read_text()}</script></body>"), encoding="utf-8")
    return copy


def look(place: Path, shown: dict[str, Path], dark: bool) -> tuple[Seen, list[str]]:
    """What the probes found in each page at each width, and the console's lines; the pages as they are among them."""
    frames = [(probed(page, name), width) for name, page in shown.items() for width in WIDTHS]
    frames += [(page, 800) for page in shown.values()]
    drawn = "".join(f'<iframe src="file://{page}" width="{width}" height="900"></iframe>' for page, width in frames)
    wait = f"seen.length === {len(shown) * len(WIDTHS)} && (document.body.textContent = JSON.stringify(seen))"
    script = f"const seen = []; onmessage = (event) => {{ seen.push(event.data); {wait}; }}"
    around = place / "around.html"
    around.write_text(f"<!doctype html><html><head><script>{script}</script></head><body>{drawn}</body></html>")
    command = [
        str(chromium()),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--log-level=0",
    ]
    command += [f"--user-data-dir={place / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command += ["--window-size=1600,1000", "--virtual-time-budget=20000", "--dump-dom", f"file://{around}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    body = re.search(r"<body>(\[.*\])</body>", done.stdout, re.S)
    assert body, f"the browser gave no measurements: {done.stdout[:200]} {done.stderr[-500:]}"
    seen = {(row["name"], row["inner"]): row for row in json.loads(html.unescape(body[1]))}
    return seen, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module", params=["light", "dark"])
def view(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, list[str], bool]:
    place, dark = tmp_path_factory.mktemp("browser"), request.param == "dark"
    return *look(place, pages(place), dark), dark


def test_the_pages_are_drawn_and_legible(view: tuple[Seen, list[str], bool]) -> None:
    seen, _, dark = view
    good = {key: row for key, row in seen.items() if key[0] != "bad"}
    assert set(good) == {(name, width) for name in ("run", "hostile", "model", "sweep") for width in WIDTHS}
    for key, row in good.items():
        assert row["dark"] == dark
        assert row["whole"] <= row["inner"] and not row["beyond"], key
        assert row["faint"] == [] and row["crossed"] == [], key
        assert row["links"] and not row["owned"] and row["words"] > 50, key
        for picture in row["pictures"]:
            assert picture["width"] >= 100 and picture["height"] >= 20 and picture["drawn"] >= 1, (key, picture)


@pytest.mark.parametrize(
    ("name", "least"), [("run", {"field": 18, "heat": 2, "bullet": 9, "bar": 2}), ("sweep", {"field": 11})]
)
def test_every_picture_is_there(view: tuple[Seen, list[str], bool], name: str, least: dict[str, int]) -> None:
    for width in WIDTHS:
        drawn = [picture["what"] for picture in view[0][(name, width)]["pictures"]]
        assert {what: drawn.count(what) for what in least} == least


def test_the_console_is_silent_but_for_the_bad_page(view: tuple[Seen, list[str], bool]) -> None:
    seen, console, _ = view
    assert console and all("a complaint of the page" in line and "bad" in line for line in console), console
    bad = seen[("bad", 400)]
    assert bad["whole"] > bad["inner"] and bad["beyond"] and bad["faint"] and bad["owned"]
    assert bad["pictures"][0]["width"] < 100
