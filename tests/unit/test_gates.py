"""Gates judge the unfavourable end of the interval, and what was not measured never passes."""

import pytest

from halfbyte.errors import UsageError
from halfbyte.experiments.gates import evaluate_gates, parse_gate, resolve_gates


def evaluation(**metrics):
    keys = ("value", "low", "high")
    return {"metrics": {name: dict(zip(keys, numbers)) for name, numbers in metrics.items()}, "confidence": 0.95}


def judge(texts, measured, **others):
    return evaluate_gates(resolve_gates(texts, defaults=()), measured, **others)


@pytest.mark.parametrize(
    "text, name, limit, spelled",
    [
        ("ppl=+5%", "ppl", 0.05, "+5%"),
        ("ppl=18%", "ppl", 0.18, "+18%"),
        ("ppl=+0.5%", "ppl", 0.005, "+0.5%"),
        ("top1=90%", "top1", 0.90, "90%"),
        ("top1=0.9", "top1", 0.90, "90%"),
        ("top1=100%", "top1", 1.0, "100%"),
        ("kl=0.1", "kl", 0.1, "0.1"),
        (" kl = 0.1 ", "kl", 0.1, "0.1"),
    ],
)
def test_parse(text, name, limit, spelled):
    gate = parse_gate(text)
    assert (gate.name, gate.spell()) == (name, spelled)
    assert gate.limit == pytest.approx(limit)


@pytest.mark.parametrize(
    "text",
    ["ppl", "ppl=", "ppl=1.05", "ppl=-5%", "ppl=five", "top1=90", "top1=120%", "kl=10%", "kl=nan", "speed=2"],
)
def test_wrong_gates_are_one_line(text):
    with pytest.raises(UsageError) as caught:
        parse_gate(text)
    assert "--gate" in str(caught.value) and "\n" not in str(caught.value)


def test_did_you_mean():
    with pytest.raises(UsageError, match="did you mean 'ppl'"):
        parse_gate("pp=+5%")


def test_defaults_are_replaced_dropped_and_joined():
    defaults = [("ppl", "+5%"), ("top1", "90%"), ("tasks", "-2%"), ("speed@1", "+60%")]
    assert [(g.name, g.spell()) for g in resolve_gates()] == defaults
    gates = resolve_gates(["ppl=+18%", "top1=off", "kl=0.2"])
    assert [(g.name, g.spell()) for g in gates] == [("ppl", "+18%"), defaults[2], defaults[3], ("kl", "0.2")]
    assert [g.name for g in gates if g.stated] == ["ppl", "kl"]


@pytest.mark.parametrize(
    "gate, metric, numbers, status",
    [
        ("ppl=+5%", "ppl_ratio", (1.03, 1.01, 1.049), "passed"),
        ("ppl=+5%", "ppl_ratio", (1.04, 1.01, 1.06), "failed"),
        ("ppl=+5%", "ppl_ratio", (0.99, 0.98, 1.0), "passed"),
        ("top1=90%", "top1", (0.93, 0.91, 0.95), "passed"),
        ("top1=90%", "top1", (0.93, 0.89, 0.97), "failed"),
        ("kl=0.1", "kl_mean", (0.08, 0.07, 0.09), "passed"),
        ("kl=0.1", "kl_mean", (0.08, 0.07, 0.11), "failed"),
        ("kl=0.1", "kl_mean", (float("nan"),) * 3, "failed"),
        ("ppl=+5%", "ppl_ratio", (float("inf"),) * 3, "failed"),
        ("kl=0.1", "kl_mean", (0.01, None, None), "not measured"),
        ("kl=0.1", "kl_median", (0.01, 0.01, 0.01), "not measured"),
    ],
)
def test_the_worse_bound_decides(gate, metric, numbers, status):
    result = judge([gate], evaluation(**{metric: numbers}))
    assert [row["status"] for row in result["gates"]] == [status]
    verdict = {"passed": "accepted", "failed": "rejected", "not measured": "incomplete"}[status]
    assert result["verdict"] == verdict
    assert result["text"].casefold().startswith(verdict)


def test_values_are_in_the_units_of_the_limit():
    row = judge(["ppl=+18%"], evaluation(ppl_ratio=(1.129, 1.12, 1.138)))["gates"][0]
    assert row["limit"] == "+18%"
    assert (row["value"], row["low"], row["high"]) == pytest.approx((0.129, 0.12, 0.138))
    assert "+12.9%" in row["text"] and "+13.8%" in row["text"] and "95%" in row["text"]


def test_nothing_measured_is_incomplete_not_accepted():
    for measured in (None, {}, {"metrics": None}, {"metrics": {"ppl_ratio": 1.0}}):
        result = judge(["ppl=+5%"], measured)
        assert result["verdict"] == "incomplete"
        assert result["gates"][0]["value"] is None
    assert judge([], evaluation())["verdict"] == "incomplete"


def test_one_failure_among_passes_rejects():
    measured = evaluation(ppl_ratio=(1.0, 1.0, 1.0), kl_mean=(1.0, 1.0, 1.0))
    assert judge(["ppl=+5%", "kl=0.1"], measured)["verdict"] == "rejected"


def test_a_broken_artifact_rejects_without_being_asked():
    good = evaluation(ppl_ratio=(1.0, 1.0, 1.0))
    check = {"ok": False, "tensors": 9, "findings": [{"code": "nan", "where": "a.scales", "message": "not finite"}]}
    result = judge(["ppl=+5%"], good, check=check)
    assert result["verdict"] == "rejected" and "a.scales: not finite" in result["text"]
    served = {"status": "served", "passed": False, "relative_difference": 0.3}
    assert judge(["ppl=+5%"], good, served=served)["verdict"] == "rejected"
    assert judge(["ppl=+5%"], good, check={"ok": True, "tensors": 9})["verdict"] == "accepted"


def test_a_served_gate_is_not_passed_by_not_serving():
    good = evaluation(ppl_ratio=(1.0, 1.0, 1.0))
    unserved = {"status": "not served", "reason": "no vLLM was found", "passed": True}
    assert judge(["ppl=+5%"], good, served=unserved)["verdict"] == "accepted"
    result = judge(["ppl=+5%", "served"], good, served=unserved)
    assert result["verdict"] == "incomplete" and "no vLLM was found" in result["gates"][1]["text"]
    served = {"status": "served", "passed": True, "relative_difference": -0.001}
    assert judge(["served"], good, served=served)["verdict"] == "accepted"


def test_a_rejection_says_what_is_known_of_the_files():
    measured = evaluation(ppl_ratio=(1.2, 1.19, 1.21))
    sound = {"ok": True, "tensors": 9}
    served = {"status": "served", "passed": True, "relative_difference": 0.001}
    both = judge(["ppl=+5%"], measured, check=sound, served=served)["text"]
    assert "The artifact is sound and vLLM computes what it says, but it loses more than the budget" in both
    unserved = {"status": "not served", "reason": "no vLLM was found"}
    for other in (None, unserved):
        assert "The artifact is sound, but it loses" in judge(["ppl=+5%"], measured, check=sound, served=other)["text"]
    assert "The artifact was not checked, and it loses" in judge(["ppl=+5%"], measured)["text"]
