"""The model card: the Hub's front matter, what was measured, and no markup from outside."""

import re

import yaml

from halfbyte.artifact.card import model_card
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
