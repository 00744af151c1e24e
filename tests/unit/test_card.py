"""The model card: the Hub's front matter, what was measured, and no markup from outside."""

import re

import yaml
from huggingface_hub import ModelCard, metadata_load

from halfbyte.artifact.card import model_card
from halfbyte.models.licence import licence_of
from tests.unit import report_files as files


def front_matter(card):
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_front_matter_is_the_hubs():
    manifest = {**files.manifest(), "model": "HuggingFaceTB/SmolLM2-135M"}
    fields, body = front_matter(model_card(manifest))
    assert fields["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert fields["base_model_relation"] == "quantized"
    assert fields["library_name"] == "transformers"
    assert {"4-bit", "gptq", "vllm", "halfbyte"} <= set(fields["tags"])
    assert body.lstrip().startswith("# SmolLM2-135M, 4-bit (GPTQ")


def test_a_local_directory_is_no_base_model_of_the_hub():
    fields, body = front_matter(model_card({**files.manifest(), "model": "/data/my model"}))
    assert "base_model" not in fields
    assert "`/data/my model`" in body


def test_results_are_told():
    card = model_card(
        files.manifest(),
        files.evaluation(),
        files.served(),
        files.gates(),
        {"cpu": "vllm serve X", "h100": "vllm serve Y"},
    )
    assert "| Perplexity, change | +10.3% | +9.5% to +11.2% |" in card
    assert "83.4%" in card and "0.1052" in card and "20,440 tokens" in card
    assert "On cpu:\n\n```bash\nvllm serve X\n```" in card and "vllm serve Y" in card
    assert "vLLM 0.32.0+cpu, and its perplexity agreed" in card
    assert "Accepted" in card and "4.36 bits" in card


def test_text_is_named_in_words():
    own = {"source": {"kind": "self-generated", "opening": "bos"}, "tokens": 12697}
    card = model_card({**files.manifest(), "calibration": own}, files.evaluation())
    assert "Measured on 20,440 tokens that the base model wrote itself." in card
    assert "- calibration: 12,697 tokens that the base model wrote itself" in card
    given = {"source": {"kind": "text", "files": [{"file": "a.jsonl"}, {"file": "b.txt"}]}, "tokens": 65536}
    text = {**files.evaluation(), "self_generated": False, "text": {"source": "c.txt", "tokens": 900}}
    card = model_card({**files.manifest(), "calibration": given}, text)
    assert "Measured on 900 tokens of c.txt." in card and "- calibration: 65,536 tokens of a.jsonl, b.txt" in card
    assert "self-generated" not in card and "'kind'" not in card


def test_commands_are_given_from_within_the_artifact():
    card = model_card(files.manifest(), commands={"cpu": "vllm serve ."})
    assert "In this directory" in card and "vllm serve ." in card
    assert "In this directory" not in model_card(files.manifest())


def test_what_is_missing_is_said():
    card = model_card({})
    assert "Not measured." in card and "Not yet served" in card and "fidelity was not measured" in card
    failed = {**files.served(), "passed": False}
    assert "DID NOT agree" in model_card(files.manifest(), served=failed)
    unserved = {"status": "not served", "reason": "no vLLM was found"}
    assert "Not yet served in vLLM: no vLLM was found." in model_card(files.manifest(), served=unserved)


def test_hostile_text_adds_no_markup():
    evil = "<script>x</script> | [a](javascript:1)\n---\nlicense: mit `` ` ``"
    manifest = {**files.manifest(), "model": evil, "calibration": {"source": evil}, "versions": {"torch": evil}}
    evaluation = {**files.evaluation(), "text": {"source": evil, "tokens": 5}}
    card = model_card(
        manifest, evaluation, {"status": "not served", "reason": evil}, {"text": evil}, {evil: "a\n```\nb"}
    )
    fields, body = front_matter(card)
    assert set(fields) == {"base_model_relation", "library_name", "pipeline_tag", "tags"}
    assert "````bash\na\n```\nb\n````" in body
    prose = re.sub(r"(?s)(?<![`\\])(`+)(?!`).*?(?<!`)\1(?!`)", "CODE", body)
    assert "\n---" not in prose and "\nlicense" not in prose
    assert "<script" not in prose and not re.search(r"(?<!\\)\]\(", prose)
    assert "&lt;script&gt;" in prose


def three(value, spread=0.1):
    return {"value": value, "low": value - spread, "high": value + spread}


def test_the_hub_s_own_parser_reads_it(tmp_path):
    model = {
        "hub_id": "HuggingFaceTB/SmolLM2-135M",
        "license": {"license": "other", "license_name": "x", "license_link": "y"},
    }
    (tmp_path / "README.md").write_text(model_card({**files.manifest(), "model": model}, files.evaluation()))
    card = ModelCard.load(tmp_path / "README.md")
    fields = card.data.to_dict()
    assert (card.data.base_model, fields["base_model_relation"]) == ("HuggingFaceTB/SmolLM2-135M", "quantized")
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "x", "y")
    assert card.data.pipeline_tag == "text-generation" and card.data.library_name == "transformers"
    assert metadata_load(tmp_path / "README.md") == fields and card.text.lstrip().startswith("# SmolLM2")


def test_the_licence_is_the_base_models(tmp_path):
    card = tmp_path / "README.md"
    assert licence_of(tmp_path) is None
    for text in ("no front matter", "---\n[1\n---\n", "---\ntags: [a]\n---\n", "---\nlicense: [mit]\n---\n"):
        card.write_text(text)
        assert licence_of(tmp_path) is None, text
    card.write_text("---\nlanguage: en\nlicense: llama3\nlicense_link: LICENSE\nlicense_name: 3\n---\nText")
    assert licence_of(tmp_path) == {"license": "llama3", "license_link": "LICENSE"}


def test_tasks_long_context_and_speed_are_told():
    piqa = {"name": "piqa", "metric": "acc", "items": 500, "baseline": three(0.7), "model": three(0.63)}
    tasks = {"tasks": [{**piqa, "recovery": three(0.9)}], "average": {"recovery": three(0.9)}}
    retrieval = [
        {"task": t, "length": 4096, "scores": {"bf16": three(1.0), "4bit": three(s)}}
        for t, s in (("a", 0.8), ("b", 0.6))
    ]
    ok, oom = {"status": "ok", "output_tokens_per_second": three(1000)}, {"status": "out of memory"}
    bench = {
        "platform": "h100", "hardware": "NVIDIA H100", "vllm": "0.26.0", "input_tokens": 128, "output_tokens": 64,
        "points": [{"concurrency": 16, "baseline": ok, "model": ok, "speedup": three(1.5)},
                   {"concurrency": 64, "baseline": oom, "model": ok, "speedup": None}],
    }  # fmt: skip
    more = {"tasks": tasks, "long_context": {"retrieval": retrieval, "drift": {"4bit": three(0.3)}}, "bench": bench}
    card = model_card(files.manifest(), **more)
    assert "| piqa, acc | 500 | 0.7 | 0.63 | 90.0% | 80.0% to 100.0% |\n| average | | | | 90.0%" in card
    assert "| 4,096 | 100.0% | 70.0% |" in card and "Largest loss of retrieval against BF16: 30.0%" in card
    assert "| 16 | 1000 | 1000 | 1.50× | 1.40× to 1.60× |\n| 64 | out of memory | 1000 | – | – |" in card
    assert "Measured on h100, NVIDIA H100, vLLM 0.26.0, 128 tokens in and 64 out." in card
    assert "Not measured: tasks" not in card
    bare = model_card(files.manifest())
    assert "Not measured: tasks and speed." in bare and "## Speed" not in bare and "## Long context" not in bare


def test_notices_and_unstable_answers_are_limitations():
    card = model_card(
        {**files.manifest(), "notices": [f"notice {i}" for i in range(8)]},
        stability={"ok": False, "reasons": ["it <b>loops"]},
    )
    assert "- While it was made: notice 4." in card and "notice 5" not in card and "- 3 further notices" in card
    assert "Long answers were NOT stable: it &lt;b&gt;loops." in card


def test_hostile_results_add_no_markup():
    evil = "<script>x</script> | [a](b)\n---\n"
    row = {"name": evil, "metric": evil, "items": evil, "baseline": evil, "recovery": {"value": evil}}
    point = {"concurrency": evil, "baseline": {"status": evil}, "model": None, "speedup": evil}
    bench = {"platform": evil, "hardware": evil, "vllm": evil, "input_tokens": evil, "points": [point, evil]}
    card = model_card(
        files.manifest(), tasks={"tasks": [row], "average": None}, bench=bench, long_context={"retrieval": [row, 3]}
    )
    assert "<script" not in card and "\n---\n" not in card.split("---\n", 2)[2]
