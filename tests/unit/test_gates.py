"""Gates judge the unfavourable end of the interval, and what was not measured never passes."""

import pytest

from halfbyte.errors import UsageError
from halfbyte.experiments.gate_kinds import kinds
from halfbyte.experiments.gates import DEFAULT_GATES, evaluate_gates, parse_gate, resolve_gates, shortfall


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


def metric(value, low=None, high=None):
    return {"value": value, "low": value if low is None else low, "high": value if high is None else high}


def rows_of(texts, **files):
    """The rows of gates on other result files: bench=…, tasks=… are the contents of bench.json, tasks.json."""
    results = {f"{name}.json": tree for name, tree in files.items()}
    judged = evaluate_gates(resolve_gates(texts, defaults=()), None, results=results)
    return {row["name"]: row for row in judged["gates"]}


def test_every_gate_is_data_with_a_source_and_an_example():
    for name, kind in kinds().items():
        assert kind.source.startswith(("strategy, ", "halfbyte: ")) and kind.file.endswith(".json")
        gate = parse_gate(kind.example)
        assert gate.family == name and parse_gate(gate.spelled) == gate
    assert DEFAULT_GATES == ("ppl=+5%", "top1=90%", "tasks=-2%", "speed@1=+60%")


@pytest.mark.parametrize(
    "text, limit",
    [
        ("tasks=-2%", -0.02),
        ("task:arc_easy=-1%", -0.01),
        ("task:a:b=-1%", -0.01),
        ("speed@16=+20%", 0.2),
        ("speed@256=-10%", -0.1),
        ("memory@64=40GiB", 40.0),
        ("memory@64=40", 40.0),
        ("long_context=5%", 0.05),
    ],
)
def test_parse_the_others(text, limit):
    gate = parse_gate(text)
    assert gate.limit == pytest.approx(limit) and parse_gate(gate.spelled) == gate


@pytest.mark.parametrize(
    "text",
    [
        "tasks=2%", "tasks=-2", "tasks:arc=-1%", "task=-1%", "task:=-1%", "speed=+60%", "speed@=+60%", "speed@x=+60%",
        "speed@0=+60%", "speed@1=60", "memory@64=5%", "memory@64=big", "memory=40GiB", "kl=1GiB", "ppl@4=+5%",
        "stability=5%", "long_context=-5%",
    ],
)  # fmt: skip
def test_wrong_gates_of_the_others_are_one_line(text):
    with pytest.raises(UsageError) as caught:
        parse_gate(text)
    assert "--gate" in str(caught.value) and "\n" not in str(caught.value)


def test_a_gate_at_one_concurrency_takes_the_defaults_place():
    assert [g.name for g in resolve_gates(["speed@16=+20%", "speed@64=0%"]) if g.family == "speed"] == [
        "speed@16",
        "speed@64",
    ]
    assert "speed@1" not in {g.name for g in resolve_gates(["speed@1=off"])}


@pytest.mark.parametrize(
    "gate, numbers, status",
    [
        ("tasks=-2%", (-0.01, -0.019, 0.0), "passed"),
        ("tasks=-2%", (-0.01, -0.021, 0.0), "failed"),
        ("task:arc=-1%", (-0.005, -0.0099, 0.0), "passed"),
        ("task:arc=-1%", (-0.005, -0.011, 0.0), "failed"),
    ],
)
def test_tasks(gate, numbers, status):
    tree = {"tasks": [{"name": "arc", "higher_is_better": True, "difference": metric(*numbers)}]}
    tree["average"] = {"difference": metric(*numbers)}
    row = rows_of([gate], tasks=tree)[gate.split("=")[0]]
    assert (row["status"], row["measured_in"], row["required"]) == (status, "tasks.json", True)
    assert (row["value"], row["low"], row["high"]) == pytest.approx(numbers)
    assert row["margin"] == pytest.approx(numbers[1] - parse_gate(gate).limit)


def test_a_task_where_less_is_better_and_one_that_is_not_there():
    tree = {"tasks": [{"name": "wer", "higher_is_better": False, "difference": metric(0.01, 0.0, 0.03)}]}
    rows = rows_of(["task:wer=-2%", "task:other=-1%"], tasks=tree)
    assert rows["task:wer"]["status"] == "failed" and rows["task:wer"]["low"] == pytest.approx(-0.03)
    assert rows["task:other"]["status"] == "not measured"
    assert "not among the tasks" in rows["task:other"]["text"]


def bench(**points):
    rows = []
    for name, (status, speedup) in points.items():
        ran = {"status": "ok"}
        model = {"status": status, "reason": "" if status == "ok" else "CUDA ran out"}
        rows.append({"concurrency": int(name[1:]), "baseline": ran, "model": model, "speedup": speedup})
    return {"platform": "h100", "points": rows, "confidence": 0.9}


def test_speed_is_judged_at_each_concurrency():
    tree = bench(c1=("ok", metric(1.7, 1.61, 1.8)), c16=("ok", metric(1.2, 1.1, 1.3)), c64=("out of memory", None))
    rows = rows_of(["speed@1=+60%", "speed@16=+20%", "speed@64=-50%", "speed@8=+1%"], bench=tree)
    statuses = {name: row["status"] for name, row in rows.items()}
    assert statuses == {"speed@1": "passed", "speed@16": "failed", "speed@64": "failed", "speed@8": "not measured"}
    assert rows["speed@1"]["low"] == pytest.approx(0.61) and "(90% confidence)" in rows["speed@1"]["text"]
    assert "out of memory, CUDA ran out" in rows["speed@64"]["text"]
    lone = bench(c1=("ok", None))
    lone["points"][0]["baseline"] = {"status": "out of memory"}
    told = rows_of(["speed@1=+60%"], bench=lone)["speed@1"]
    assert told["status"] == "not measured" and "BF16: out of memory" in told["text"], "nothing to compare with"


def drift(*values, fp8=None):
    names = ("4bit", "4bit+fp8kv")
    return {name: metric(*v) for name, v in zip(names, (values, fp8)) if v}


def test_long_context_by_kv_cache():
    tree = {"drift": drift(0.02, 0.0, 0.04, fp8=(0.1, 0.08, 0.2)), "ppl_drift": drift(0.01, fp8=(0.02,))}
    fp8, auto = ({"kv_cache": [{"kv_cache_dtype": dtype}]} for dtype in ("fp8", "auto"))
    names = ["retrieval", "ppl", "retrieval@fp8", "ppl@fp8"]
    rows = rows_of(["long_context=5%"], long_context=tree, plan=fp8)
    assert [name.removeprefix("long_context:") for name in rows] == names
    assert [row["status"] for row in rows.values()] == ["passed", "passed", "failed", "passed"]
    assert list(rows_of(["long_context=5%"], long_context=tree)) == list(rows), "no plan: what was measured counts"
    without = rows_of(["long_context=5%"], long_context=tree, plan=auto)
    assert [row["status"] for row in without.values()] == ["passed", "passed"]
    bare = {"drift": drift(0.0), "ppl_drift": drift(0.0)}
    unmeasured = rows_of(["long_context=5%"], long_context=bare, plan=fp8)
    assert [row["status"] for row in unmeasured.values()] == ["passed", "passed", "not measured", "not measured"]


def test_memory_by_estimate_and_by_benchmark():
    def level(gib, fits):
        return {"concurrency": 64, "context": 4096, "total_bytes": int(gib * 2**30), "fits": fits}

    plan = {"memory": [
        {"platform": "h100", "levels": [level(30, True)]},
        {"platform": "small", "levels": [], "asked": [level(20, False)]},
    ]}  # fmt: skip
    rows = rows_of(["memory@64=40GiB", "memory@8=fits"], plan=plan)
    assert rows["memory@64"]["status"] == "passed" and rows["memory@64"]["value"] == 30
    assert "30GiB on h100" in rows["memory@64"]["text"] and "estimate" in rows["memory@64"]["text"]
    assert rows["memory@8"]["status"] == "not measured"
    assert rows_of(["memory@64=25GiB"], plan=plan)["memory@64"]["status"] == "failed"
    assert rows_of(["memory@64=fits"], plan=plan)["memory@64"]["status"] == "failed"
    plan["memory"].pop()
    assert rows_of(["memory@64=fits"], plan=plan)["memory@64"]["status"] == "passed"
    died = rows_of(["memory@64=fits"], plan=plan, bench=bench(c64=("out of memory", None)))["memory@64"]
    assert (died["status"], died["measured_in"]) == ("failed", "bench.json")
    plan["memory"][0]["levels"] = [level(30, None)]
    assert rows_of(["memory@64=fits"], plan=plan)["memory@64"]["status"] == "not measured"
    ran = rows_of(["memory@64=fits"], plan=plan, bench=bench(c64=("ok", metric(1.0))))["memory@64"]
    assert (ran["status"], ran["measured_in"]) == ("passed", "plan.json, bench.json")


def test_stability():
    sound, bad = {"ok": True, "reasons": []}, {"ok": False, "reasons": ["3 of 40 answers repeat themselves"]}
    assert rows_of(["stability"], stability=sound)["stability"]["status"] == "passed"
    row = rows_of(["stability"], stability=bad)["stability"]
    assert row["status"] == "failed" and "answers repeat themselves" in row["text"]
    assert rows_of(["stability"])["stability"]["status"] == "not measured"
    judged = evaluate_gates(resolve_gates(["stability"], defaults=()), None, results={"stability.json": bad})
    assert judged["text"].endswith("Read stability.json before you serve it.")


def test_what_was_not_asked_for_does_not_block_and_is_named():
    good = evaluation(ppl_ratio=(1.0, 1.0, 1.0), top1=(0.95, 0.94, 0.96))
    result = evaluate_gates(resolve_gates(), good)
    rows = {row["name"]: row for row in result["gates"]}
    assert result["verdict"] == "accepted" and not rows["tasks"]["required"] and rows["ppl"]["required"]
    assert "every gate that was measured holds" in result["text"]
    assert "Not measured in this run, and not judged: tasks -2%, speed@1 +60% (--tasks, --bench" in result["text"]
    asked = evaluate_gates(resolve_gates(), good, asked={"eval.json", "tasks.json"}, why={"tasks.json": "no lm-eval"})
    assert asked["verdict"] == "incomplete" and asked["text"].startswith("Incomplete: tasks not measured")
    assert asked["gates"][2]["text"].endswith("not measured (no lm-eval)")
    assert evaluate_gates(resolve_gates(["speed@1=+60%"]), good)["verdict"] == "incomplete"
    slow = evaluate_gates(resolve_gates(), good, results={"bench.json": bench(c1=("ok", metric(1.5)))})
    assert slow["verdict"] == "rejected", "what was measured counts, asked for or not"
    assert "plan" in slow["text"] and "group_size" not in slow["text"]


def test_shortfalls_are_shares_of_the_limit():
    gates = resolve_gates(["ppl=+5%", "kl=0.1", "top1=off", "tasks=off", "speed@1=off"])
    worse = evaluate_gates(gates, evaluation(ppl_ratio=(1.1, 1.1, 1.15), kl_mean=(0.08, 0.07, 0.09)))["gates"]
    assert shortfall(gates, worse) == pytest.approx(2.0)
    both = evaluate_gates(gates, evaluation(ppl_ratio=(1.1, 1.1, 1.15), kl_mean=(0.3, 0.2, 0.4)))["gates"]
    assert shortfall(gates, both) == pytest.approx(5.0)
    broken = evaluate_gates(gates, evaluation(ppl_ratio=(float("nan"),) * 3, kl_mean=(0.0, 0.0, 0.0)))["gates"]
    assert shortfall(gates, broken) == float("inf")


def test_what_was_tried_stands_in_the_place_of_advice():
    measured = evaluation(ppl_ratio=(1.2, 1.19, 1.21))
    gates = resolve_gates(["ppl=+5%"], defaults=())
    text = evaluate_gates(gates, measured, {"ok": True, "tensors": 9}, tried="The ladder ended.")["text"]
    assert text.endswith("loses more than the budget allows. The ladder ended.") and "choose" not in text
