"""`run` end to end on a tiny model: every stage leaves its result, and only what changed is done again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tiny
from tests.unit.artifacts import digests, edit_json, halfbyte, without_vllm
from tests.unit.fake_vllm import VERSION, make_fake
from tests.unit.forked import run_forked

GENEROUS = ["--gate", "ppl=+100000%", "--gate", "top1=0%"]
FILES = {
    "plan.json", "check.json", "served.json", "eval.json", "gates.json", "run.json", "report.html", "report.md",
    "serve.sh", "calibration", "model",
}  # fmt: skip
ALL = ["plan", "calibrate", "quantize", "check", "eval", "served"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("run") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "own.txt"
    path.write_text("\n\n".join(f"Paragraph {i} says: " + f"{i * 7} words and more, " * 30 for i in range(40)))
    return path


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No vLLM anywhere; one cache for this file."""
    without_vllm(monkeypatch, tmp_path_factory.getbasetemp() / "run-cache")


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"at": tmp_path_factory.mktemp("finished") / "run"}


@pytest.fixture()
def done(finished: dict[str, Path], model: Path, tmp_path: Path, run: Any) -> Path:
    """A copy of a finished run, to change."""
    if not finished["at"].exists():
        run(finished["at"], *GENEROUS)
    return Path(shutil.copytree(finished["at"], tmp_path / "run"))


@pytest.fixture()
def run(model: Path, capsys: Any) -> Any:
    """run(output, *words, code=0): the result of `halfbyte run --format json`."""

    def go(output: Path, *words: object, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        status = halfbyte("run", model, "--on", "cpu", "-o", output, "--format", "json", *words)
        shown = capsys.readouterr()
        assert status == code, shown.err
        return json.loads(shown.out)

    return go


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def figures(directory: Path) -> dict[str, Any]:
    """eval.json without the places and times."""
    return {key: value for key, value in read(directory / "eval.json").items() if key not in ("seconds", "model")}


def stamps(directory: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in directory.iterdir() if p.name != "README.md"}


def test_end_to_end_without_vllm_and_again(model: Path, tmp_path: Path, run: Any, capsys: Any) -> None:
    out = tmp_path / "deep" / "run"
    result = run(out, *GENEROUS)
    assert {p.name for p in out.iterdir()} == FILES and result["fresh"] == ALL
    assert result["gates"]["verdict"] == "accepted" and read(out / "check.json")["ok"]
    served = read(out / "served.json")
    assert served["status"] == "not served" and "no vLLM found" in served["reason"]
    page, card = (out / "report.html").read_text(), (out / "model" / "README.md").read_text()
    assert "not served" in page and "not served" in (out / "report.md").read_text().lower()
    assert "base_model_relation: quantized" in card and "vllm serve" in (out / "serve.sh").read_text()
    assert result["manifest"]["command"].startswith("halfbyte run")
    assert result["plan"]["model"]["name"] == model.name and "path" not in result["plan"]["model"]
    assert (
        "vllm serve model " in page and "vllm serve ." in card and "vllm serve model " in (out / "serve.sh").read_text()
    )
    for name in sorted(FILES - {"calibration", "model"}) + ["model/halfbyte.json", "model/README.md"]:
        assert str(tmp_path) not in (out / name).read_text() and str(model) not in (out / name).read_text(), name
    assert result["eval"]["self_generated"] and result["eval"]["metrics"]["ppl_ratio"]["value"] > 1
    calibrated, judged = read(out / "calibration" / "manifest.json")["sha256"], result["eval"]["text"]["sha256"]
    assert calibrated != judged, "judged on what it was calibrated on"

    before = {**stamps(out / "model"), **stamps(out / "calibration"), **{n: v for n, v in stamps(out).items()
              if n in ("plan.json", "check.json", "served.json", "eval.json", "run.json")}}  # fmt: skip
    again = run(out, *GENEROUS)
    after = {**stamps(out / "model"), **stamps(out / "calibration"), **stamps(out)}
    assert again["fresh"] == [] and before == {name: after[name] for name in before}
    assert {k: again[k] for k in ("gates", "manifest", "eval", "check")} == {
        k: result[k] for k in ("gates", "manifest", "eval", "check")
    }
    assert halfbyte("run", model, "--on", "cpu", "-o", out, *GENEROUS) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("Accepted") and "everything was there already" in shown.out
    assert f"next: halfbyte serve {out / 'model'} --on cpu" in shown.out and "no vLLM found" in shown.err


def test_the_default_gates_fail_a_tiny_model(done: Path, model: Path, run: Any, capsys: Any) -> None:
    """Exit code 3, with the artifact, the report and the advice all the same."""
    result = run(done, "--no-mitigate", code=3)
    assert result["fresh"] == [] and result["gates"]["verdict"] == "rejected"
    assert {row["name"]: row["status"] for row in result["gates"]["gates"]}["ppl"] == "failed"
    assert "Rejected" in (done / "report.md").read_text()
    assert halfbyte("run", model, "--on", "cpu", "-o", done, "--no-mitigate") == 3
    assert capsys.readouterr().out.startswith("Rejected: ")


def test_a_gate_that_was_not_measured_does_not_pass(done: Path, run: Any) -> None:
    assert run(done, *GENEROUS, "--gate", "served", code=3)["gates"]["verdict"] == "incomplete"
    none = run(done, "--gate", "ppl=off", "--gate", "top1=off", code=3)
    assert none["gates"]["verdict"] == "incomplete" and "no gate" in none["gates"]["text"]


def test_real_text_is_split(model: Path, text: Path, tmp_path: Path, run: Any) -> None:
    words = ["--text", text, "-r", "B3", "--set", "calibration={sequences: 40, max_tokens: 128}", *GENEROUS]
    result = run(tmp_path / "run", *words)
    assert result["fresh"] == ALL and not result["eval"]["self_generated"]
    manifest = read(tmp_path / "run" / "calibration" / "manifest.json")
    assert manifest["source"]["kind"] == "text" and manifest["source"]["portion"] == [0.0, 0.8]
    assert manifest["longest"] <= 128 and result["eval"]["text"]["window"] == 512
    assert run(tmp_path / "run", *words)["fresh"] == []
    text.write_text(text.read_text() + "\n\nAnd one paragraph more, which is held out with the others at the end.")
    assert run(tmp_path / "run", *words)["fresh"][0] == "calibrate"


def test_missing_text_is_refused(model: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["run", model, "--on", "cpu", "-o", tmp_path / "run", "--text", tmp_path / "none.txt"]
    assert halfbyte(*words) == 2
    assert "does not exist" in capsys.readouterr().err.splitlines()[-1]


def test_another_recipe_does_the_right_stages(done: Path, model: Path, tmp_path: Path, run: Any) -> None:
    first = read(done / "model" / "halfbyte.json")
    words = ["-r", "B3", "--set", "group_size=32", *GENEROUS]
    result = run(done, *words)
    assert result["fresh"] == ["plan", "quantize", "check", "eval", "served"]
    assert result["manifest"]["calibration"] == first["calibration"] and result["manifest"]["work"] != first["work"]
    assert read(done / "model" / "config.json")["quantization_config"]["group_size"] == 32
    clean = run(tmp_path / "clean", *words)
    assert digests(done / "model") == digests(tmp_path / "clean" / "model")
    assert figures(done) == figures(tmp_path / "clean") and clean["fresh"] == ALL


def test_another_platform_leaves_the_artifact(tmp_path: Path, run: Any) -> None:
    out = tmp_path / "run"
    run(out, "-r", "B1", *GENEROUS)
    before = stamps(out / "model")
    result = run(out, "-r", "B1", "--on", "h100", *GENEROUS)
    assert result["fresh"] == ["plan"] and stamps(out / "model") == before
    assert set(result["commands"]) == {"cpu", "h100"} and "# on h100" in (out / "serve.sh").read_text()


def test_a_lost_result_is_made_again(done: Path, run: Any) -> None:
    expected = figures(done)
    (done / "eval.json").unlink()
    (done / "report.html").unlink()
    assert run(done, *GENEROUS)["fresh"] == ["eval"]
    assert figures(done) == expected and (done / "report.html").exists()
    shutil.rmtree(done / "model")
    assert run(done, *GENEROUS)["fresh"] == ["quantize"]


def test_a_change_of_the_model_is_seen(tmp_path: Path, run: Any, model: Path, capsys: Any) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "m"))
    words = ["run", copy, "--on", "cpu", "-o", tmp_path / "run", "--format", "json", *GENEROUS]
    assert halfbyte(*words) == 0
    edit_json(copy / "config.json", lambda config: config.update(rms_norm_eps=1e-5))
    capsys.readouterr()
    assert halfbyte(*words) == 0
    assert json.loads(capsys.readouterr().out)["fresh"] == ALL


def test_force_does_everything_again(done: Path, run: Any) -> None:
    expected, whole = figures(done), digests(done / "model")
    raw = bytearray((done / "model" / "model.safetensors").read_bytes())
    raw[-1] ^= 255
    (done / "model" / "model.safetensors").write_bytes(raw)
    assert run(done, *GENEROUS, "--force")["fresh"] == ALL
    assert figures(done) == expected and digests(done / "model") == whole


def test_a_vllm_that_is_there_is_asked(done: Path, tmp_path: Path, run: Any) -> None:
    """A stand-in answers with made-up numbers: served, compared, found wrong, and so rejected."""
    fake = make_fake(tmp_path / "fake")
    result = run(done, *GENEROUS, "--vllm", fake, code=3)
    served = read(done / "served.json")
    assert result["fresh"] == ["served"] and served["status"] == "served" and served["vllm"] == VERSION
    assert not served["passed"] and served["relative_difference"] > 0.005 and "limit" in served
    assert served["command"][:3] == ["vllm", "serve", "model"]
    assert result["gates"]["verdict"] == "rejected"
    assert run(done, *GENEROUS, "--vllm", fake, code=3)["fresh"] == []


def test_a_vllm_that_failed_is_asked_again(done: Path, tmp_path: Path, run: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("HALFBYTE_VLLM", str(make_fake(tmp_path / "fake")))
    monkeypatch.setenv("FAKE", "die")
    result = run(done, *GENEROUS)
    assert result["fresh"] == ["served"], "it was not served before for want of a vLLM"
    assert result["served"]["status"] == "not served" and "the weights are wrong" in result["served"]["reason"]
    monkeypatch.setenv("FAKE", "ok")
    assert run(done, *GENEROUS, code=3)["served"]["status"] == "served"


def test_a_wrong_vllm_is_told_before_any_work(model: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["run", model, "--on", "cpu", "-o", tmp_path / "run", "--vllm", tmp_path / "none"]
    assert halfbyte(*words) == 2
    assert "does not exist" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_killed_anywhere_it_ends_with_the_same_figures(model: Path, tmp_path: Path) -> None:
    """All in children with one thread each: sums in another number of threads round differently."""
    words = ["run", str(model), "--on", "cpu", *GENEROUS]
    (whole,) = run_forked(tmp_path, [{"words": [*words, "-o", str(tmp_path / "whole")]}])
    assert whole["status"] == 0
    points = range(1, whole["writes"], 6)
    jobs: list[dict[str, Any]] = []
    for at in points:
        mine = [*words, "-o", str(tmp_path / str(at))]
        jobs += [{"words": mine, "act": "kill", "at": at}, {"words": [*mine, "--format", "json"]}]
    ended = run_forked(tmp_path, jobs)
    assert len(points) > 3
    for i, at in enumerate(points):
        first, second = ended[2 * i : 2 * i + 2]
        assert first["status"] == -9 and second["status"] == 0, (at, second["stderr"])
        fresh = json.loads(second["stdout"])["fresh"]
        assert fresh == ALL[len(ALL) - len(fresh) :], (at, fresh)
        assert figures(tmp_path / str(at)) == figures(tmp_path / "whole"), at
        assert digests(tmp_path / str(at) / "model") == digests(tmp_path / "whole" / "model"), at
        left = [p.name for p in (tmp_path / str(at)).rglob("*") if p.name.endswith((".tmp", ".partial", ".lock"))]
        assert left == [], at
