"""The report from made-up results: whole, partial, broken and hostile."""

import html.parser
import json
import re

import pytest

from halfbyte.errors import UsageError
from halfbyte.report import build_report
from halfbyte.report.build import escape_markdown, fence
from halfbyte.report.plots import byte_bars, gate_bullet, heat_map, limit_number
from halfbyte.report.words import command, percent, seconds, significant, size
from tests.unit import report_files as files

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=y> | `a` [b](javascript:c) & \u202e\ud800"


class Page(html.parser.HTMLParser):
    """Tags and visible text of a page; raises on tags that do not nest."""

    VOID = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self._open = [], [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def build(run):
    page, plain = build_report(run)
    return Page(page.read_text(encoding="utf-8")), plain.read_text(encoding="utf-8")


def test_a_whole_run(tmp_path):
    page, plain = build(files.write_run(tmp_path))
    for words in (
        "smollm2-135m in 4 bits",
        "Accepted",
        "+10.3%",
        "0.1018 to 0.1089",
        "20,440 tokens",
        "whole",
        "0.04%",
        "2.4× smaller",
        "damping raised to 0.1",
        "model.layers.28.mlp.down_proj",
        "1 min 52 s",
        "noise",
    ):
        assert words.casefold() in page.text.casefold(), words
    for words in ("# smollm2-135m in 4 bits: Accepted", "| ppl | passed | +18% | +10.3% | +9.52% to +11.2% |", "17.4%"):
        assert words in plain, words
    assert "not measured" not in page.text.casefold().replace("what was not measured does not pass", "")


def test_the_page_is_self_contained(tmp_path):
    page, _ = build(files.write_run(tmp_path))
    assert "script" not in page.tags and "iframe" not in page.tags and "img" not in page.tags
    links = [value for name, value in page.attributes if name in ("href", "src")]
    inside = {f"#{value}" for name, value in page.attributes if name == "id"}
    assert all(link.startswith("data:") or link in inside for link in links)
    raw = (tmp_path / "report.html").read_text()
    assert "url(" not in raw and "@import" not in raw and len(raw) < 300_000


def test_every_linear_is_drawn_and_exempt_ones_outlined(tmp_path):
    page, _ = build(files.write_run(tmp_path))
    classes = [value for name, value in page.attributes if name == "class"]
    shades = [value for value in classes if re.fullmatch(r"h\d", value)]
    assert len(shades) == 30 * 7 - 4 + 9
    assert classes.count("exempt") == 4 + 1


@pytest.mark.parametrize(
    "missing",
    [
        "plan.json",
        "check.json",
        "served.json",
        "eval.json",
        "gates.json",
        "calibration/manifest.json",
        "model/halfbyte.json",
    ],
)
def test_a_missing_result_is_said_and_never_a_crash(tmp_path, missing):
    run = files.write_run(tmp_path)
    (run / missing).unlink()
    page, plain = build(run)
    said = {
        "plan.json": "there is no plan here",
        "check.json": "Not checked",
        "served.json": "Not served",
        "eval.json": "Not measured",
        "gates.json": "No gates were applied",
        "calibration/manifest.json": "No calibration manifest",
        "model/halfbyte.json": "manifest",
    }
    assert said[missing] in page.text and said[missing] in plain
    if missing == "gates.json":
        assert "Not judged" in page.text and "Accepted" not in page.text


def test_an_artifact_alone(tmp_path):
    """Its report goes beside it: the artifact stays what was written and hashed."""
    artifact = tmp_path / "mine"
    artifact.mkdir()
    (artifact / "halfbyte.json").write_text(json.dumps(files.manifest()))
    assert build_report(artifact) == (tmp_path / "mine-report.html", tmp_path / "mine-report.md")
    page, _ = build(artifact)
    assert "17.4%" in page.text and "Not judged" in page.text
    assert [p.name for p in artifact.iterdir()] == ["halfbyte.json"]


def test_the_text_is_named_in_words(tmp_path):
    run = files.write_run(tmp_path)
    assert "20,440 tokens that the BF16 model wrote itself, 40 windows" in build(run)[1]
    given = {**files.evaluation(), "self_generated": False}
    (run / "eval.json").write_text(json.dumps({**given, "text": {**given["text"], "source": "c.txt"}}))
    assert "20,440 tokens of c.txt, 40 windows" in build(run)[1]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "{",
        '{"gates": 3, "metrics": [1], "linears": "x", "bytes": []}',
        '{"gates": [null, 4, {"value": "x"}], "metrics": {"ppl": null, "top1": {"value": "a"}}}',
        '{"linears": {"model.layers.0.q": {"scheme": {}, "error": {"relative": NaN}}}}',
    ],
)
def test_broken_results_do_not_break_the_report(tmp_path, content):
    run = files.write_run(tmp_path)
    for name in ("plan.json", "check.json", "served.json", "eval.json", "gates.json", "model/halfbyte.json"):
        (run / name).write_text(content)
    page, plain = build(run)
    assert "Accepted" not in page.text
    if not content.startswith("{") or content == "{":
        assert "eval.json is not a JSON object" in page.text and "eval.json is not a JSON object" in plain


def poison(value):
    """The same tree with every string (keys of open mappings as well) replaced by a hostile one."""
    if isinstance(value, dict):
        open_mapping = "versions" in value or "cpu" in value or any("." in key for key in value)
        entries = {key: poison(inner) for key, inner in value.items()}
        return {**entries, EVIL: EVIL} if open_mapping else entries
    if isinstance(value, list):
        return [poison(inner) for inner in value]
    return EVIL if isinstance(value, str) else value


def test_hostile_strings_are_text(tmp_path):
    run = files.write_run(tmp_path)
    clean = Page((build_report(run)[0]).read_text(encoding="utf-8"))
    for file in run.rglob("*.json"):
        file.write_text(json.dumps(poison(json.loads(file.read_text()))))
    page, plain = build(run)
    assert set(page.tags) <= set(clean.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text
    outside = re.sub(r"(?ms)^(`{3,})$.*?^\1$", "", plain)
    assert "<script" not in outside and not re.search(r"(?<!\\)\]\(", outside)
    tables = re.findall(r"(?m)(?:^\|.*\n?)+", outside)
    assert len(tables) > 15
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_nothing_to_report(tmp_path):
    with pytest.raises(UsageError, match="holds no results"):
        build_report(tmp_path)
    with pytest.raises(UsageError, match="no directory"):
        build_report(tmp_path / "x")


def test_the_same_results_give_the_same_bytes(tmp_path):
    run = files.write_run(tmp_path)
    first = [path.read_bytes() for path in build_report(run)]
    assert first == [path.read_bytes() for path in build_report(run)]
    assert not list(run.glob(".*"))


def test_heat_map_shades_by_error():
    cells = heat_map({"model.layers.0.a": 0.1, "model.layers.1.a": 0.2, "model.layers.2.a": None, "x": 0.9})["cells"]
    assert [cell["class"] for cell in cells] == ["h0", "h8", "exempt"]
    assert heat_map({"model.layers.0.a": None}) is None
    assert heat_map({"model.layers.0.a": 0.1})["cells"][0]["class"] == "h4"


def test_byte_bars_share_one_scale():
    bars = byte_bars(files.plan())["bars"]
    lengths = [sum(segment["width"] for segment in bar["segments"]) for bar in bars]
    assert lengths[0] == pytest.approx(100, abs=0.01)
    assert lengths[1] == pytest.approx(100 * 117_992_192 / 269_060_352, abs=0.01)
    assert byte_bars({}) is None


def test_bullets_put_value_and_limit_in_order():
    below = gate_bullet({"name": "ppl", "value": 0.1, "low": 0.09, "high": 0.11, "limit": "+18%"}, 0.18)
    assert 0 < below["low"] < below["value"] < below["limit"] < 100
    above = gate_bullet({"name": "top1", "value": 0.83, "low": 0.82, "high": 0.84, "limit": "75%"}, 0.75)
    assert above["limit"] < above["low"] < above["value"] < 100
    assert gate_bullet({"name": "ppl", "value": None}, 0.1) is None
    assert (limit_number("+5%"), limit_number("0.1"), limit_number("yes")) == (0.05, 0.1, None)


def test_words():
    assert [size(x) for x in (0, 1023, 1024, 112e6, 5.39 * 2**30)] == [
        "0 bytes",
        "1,023 bytes",
        "1 KiB",
        "107 MiB",
        "5.39 GiB",
    ]
    assert [percent(x) for x in (0.0004, 0.1294, 0.9987, None)] == ["0.04%", "12.9%", "99.87%", "not measured"]
    assert [significant(x) for x in (0, 28.2612, 1234567, 2.1e-5, "x", float("nan"))] == [
        "0",
        "28.26",
        "1,234,567",
        "2.1e-05",
        "not measured",
        "not measured",
    ]
    assert [seconds(x) for x in (3.21, 112.4, 7260)] == ["3.21 s", "1 min 52 s", "2 h 1 min"]
    assert command(["vllm", "serve", "a b"]) == "vllm serve 'a b'"
    assert (
        command(["halfbyte", "--long-flag", "value one", "--another-flag", "value", "--third", "x"]).count("\\\n") == 3
    )
    assert escape_markdown("a_b |\n*c* <d> `e`") == "a_b \\| \\*c\\* &lt;d&gt; \\`e\\`"
    assert fence("a ``` b").startswith("````\n")
