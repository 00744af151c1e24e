"""Speed: the roofline meets the measurements it was fitted to, evidence is near or far, and the verdicts follow."""

import datetime
import math
import re

import pytest
import yaml

from halfbyte.models import Checkpoint
from halfbyte.plan import choose, footprints, make_plan, render_plan
from halfbyte.plan.decision import nvfp4_for
from halfbyte.plan.memory import KVShape
from halfbyte.plan.roofline import Load, Mass, Work, batch_seconds, work_of
from halfbyte.plan.speed import Model, best_speed, beyond_noise, elsewhere, is_near, mean_speed, nearest_first
from halfbyte.plan.strategy import disagreements, promise
from halfbyte.platforms import load_platform
from halfbyte.recipe.schema import Recipe
from halfbyte.serving import serve_command
from tests.unit.sparse import LLAMA_8B, LLAMA_70B, MIXTRAL, QWEN3_MOE, QWEN_32B, make_sparse

H100, MI325X, CPU = (load_platform(name) for name in ("h100", "mi325x", "cpu"))
(TABLE,) = H100.speed
RECIPES = {
    "gptq": Recipe.model_validate({"method": "gptq", "group_size": 128}),
    "awq": Recipe.model_validate({"method": "awq", "group_size": 128}),
    "modelopt": Recipe.model_validate({"method": "nvfp4", "group_size": 16}),
    "compressed-tensors": Recipe.model_validate({"method": "nvfp4", "group_size": 16, "format": "compressed-tensors"}),
}
LEVELS = [1, 16, 64, 256]
SPREAD = 0.135
"""How far a median of three may lie from the next run's: they spread by up to 18 % at 4 to 16 sequences."""


@pytest.fixture(scope="module")
def of(tmp_path_factory):
    return lambda config: Checkpoint(make_sparse(tmp_path_factory.mktemp("sparse"), config))


@pytest.fixture(scope="module")
def llama(of):
    return of(LLAMA_8B)


@pytest.mark.parametrize("row", TABLE.rows, ids=lambda row: f"{row.format}-{row.kernel}")
def test_the_roofline_meets_what_it_was_fitted_to(llama, row):
    for seconds, guess in _guessed(H100, llama, LLAMA_8B, row):
        assert guess == pytest.approx(seconds, rel=SPREAD)
    seconds, guess = _prefill(H100, llama, LLAMA_8B, row)
    assert guess == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize("table", load_platform("h200").speed, ids=lambda table: table.model.name.partition(" ")[0])
def test_the_roofline_meets_what_was_measured_through_the_server(of, table):
    """Within 20 %, where repeats of one kernel lie less than that apart."""
    h200, config = load_platform("h200"), LLAMA_8B if table.model.blocks == 32 else QWEN_32B
    model, told = of(config), [level for level, share in table.apart.items() if share < 0.2]
    assert len(told) >= 4 and {row.method for row in table.rows} >= {"bf16", "gptq", "nvfp4"}
    for row in table.rows:
        kept = row.model_copy(update={"seconds": {level: row.seconds[level] for level in told}})
        for seconds, guess in [*_guessed(h200, model, config, kept), _prefill(h200, model, config, row)]:
            assert guess == pytest.approx(seconds, rel=0.2), (row.kernel, seconds)


def _guessed(platform, model, config, row):
    """(measured, by the roofline) of a row's seconds at every concurrency."""
    work, kernel = _work(platform, model, config, row)
    return [(s, batch_seconds(work, platform, kernel, Load(n, 128, 128))) for n, s in row.seconds.items()]


def _prefill(platform, model, config, row):
    work, kernel = _work(platform, model, config, row)
    return row.prefill, batch_seconds(work, platform, kernel, Load(16, 2048, 0))


def _work(platform, model, config, row):
    prints = footprints(RECIPES.get(row.method, RECIPES.get(row.format, RECIPES["gptq"])), model)
    blocks = config["num_hidden_layers"]
    kv = KVShape(config["num_key_value_heads"], 128, (None,) * blocks)
    works = work_of(prints, 0, blocks, config["num_attention_heads"], kv, row.kv_cache)
    return works[1] if row.format == "bf16" else works[0], platform.roofline.efficiency(row.format, row.kernel)


def test_a_step_by_hand():
    platform = H100.model_copy(update={"bandwidth_gbs": 1000.0, "bf16_tflops": 100.0})
    shares = platform.roofline.bf16.model_copy(update={"memory": 0.5, "compute": 0.5})
    roofline = platform.roofline.model_copy(update={"overhead_us": 10, "token_us": 7, "bf16": shares})
    platform = platform.model_copy(update={"roofline": roofline})
    work = Work(
        Mass(1e9, 2e9), Mass(3e9, 1.5e9), Mass(), Mass(), Mass(), 0, 0, 4, 8, KVShape(2, 64, (None,) * 4), "auto"
    )
    packed = 1e9 / 5e11 + 2 * 2e9 * 10 / 5e13
    plain = max(3e9 / 5e11, 2 * 1.5e9 * 10 / 5e13)
    cache = 10 * (2 * 2 * 64 * 2) * 4 * 100 / 5e11
    step = packed + plain + cache + 4 * 10e-6 + 10 * 7e-6
    two, one = (batch_seconds(work, platform, shares, Load(10, 100, tokens)) for tokens in (0, 1))
    assert one - two == pytest.approx(step)
    assert batch_seconds(work, CPU, shares, Load(1, 1, 1)) is None


def test_experts_that_a_step_reads():
    work = Work(Mass(), Mass(), Mass(800.0, 1600.0), Mass(), Mass(), 8, 2, 1, 1, KVShape(1, 1, (None,)), "auto")
    four, _ = work.read(1)
    assert four.bytes == pytest.approx(200.0) and four.weights == pytest.approx(400.0)
    assert work.read(2)[0].bytes == pytest.approx(800 * (1 - 0.75**2))
    assert work.read(1000)[0].bytes == pytest.approx(800.0)


def test_near_is_half_to_twice_the_size():
    size = TABLE.model.parameters
    assert is_near(TABLE, Model(size)) and is_near(TABLE, Model(2 * size)) and is_near(TABLE, Model(size // 2 + 1))
    assert not is_near(TABLE, Model(size * 9)) and not is_near(TABLE, Model(size, tp=2))
    far = TABLE.model_copy(update={"model": TABLE.model.model_copy(update={"parameters": 70 * 10**9})})
    both = H100.model_copy(update={"speed": (far, TABLE)})
    assert nearest_first(both, Model(size)).speed[0] is TABLE
    assert nearest_first(both, Model(70 * 10**9)).speed[0] is far


def test_measured_gains_are_those_of_the_table(llama):
    plan = make_plan(llama, None, [H100], 8192, LEVELS)
    served = {gain["concurrency"]: gain for gain in plan["speed"][0]["served"]}
    assert {c: gain["gain"] for c, gain in served.items()} == {1: 1.73, 16: 1.37, 64: 1.29, 256: 0.97}
    assert {gain["basis"] for gain in served.values()} == {"measured"}
    assert served[1]["tokens_per_second"] == pytest.approx(128 / 0.474, abs=0.1)
    assert all(gain["kernel"] == "Humming" and gain["flags"] == "--linear-backend humming" for gain in served.values())
    (gain,) = plan["strategy"]["gain"]
    assert (gain["holds"], gain["fails"], gain["slower"]) == ([1], [16, 64, 256], [256])
    assert "holds at concurrency 1; does not hold at 16, 64, 256" in gain["text"]


def test_a_concurrency_between_says_where_it_was_measured(llama):
    served = make_plan(llama, None, [H100], 8192, [12, 4000])["speed"][0]["served"]
    assert (served[0]["measured_at"], served[0]["basis"]) == (16, "measured")
    assert (served[1]["measured_at"], served[1]["basis"]) == (None, "roofline")


def test_another_size_or_version_gets_the_roofline(llama, of):
    served = make_plan(of(LLAMA_70B), None, [H100], 4096, [1, 64], tp=2)["speed"][0]["served"]
    assert {gain["basis"] for gain in served} == {"roofline"}
    assert served[0]["gain"] > served[1]["gain"] > 0.5
    later = H100.model_copy(update={"vllm": "0.32.0"})
    plan = make_plan(llama, None, [later], 4096, [1, 64])
    assert {gain["basis"] for gain in plan["speed"][0]["served"]} == {"roofline"}
    assert any(w["rule"] == "no-evidence" and "0.32.0" in w["text"] for w in plan["warnings"])
    assert plan["recipe"]["activations"] == "bf16", "no measurement asks for the other declaration there"


def test_the_table_at_the_context_asked_for(llama):
    plan = make_plan(llama, None, [H100, MI325X], 8192, LEVELS)
    text = render_plan(plan, explain=True)
    assert "The same at 8,192 tokens" in text and "1.61x m" in text
    assert max(len(line) for line in text.splitlines()[1:]) <= 80
    assert "The same at" not in render_plan(make_plan(llama, None, [H100], 512, LEVELS))
    assert "m@16" in render_plan(make_plan(llama, None, [H100], 512, [12]))


def test_no_peaks_no_figure(llama):
    plan = make_plan(llama, None, [CPU])
    assert all(gain["gain"] is None for gain in plan["speed"][0]["served"])
    assert plan["strategy"]["gain"][0]["unknown"] == [8]
    assert "bench before you rely on a gain" in " ".join(render_plan(plan).split())


def test_strategy_and_evidence_disagree_and_both_are_shown(llama):
    plan = make_plan(llama, None, [H100], 8192, LEVELS)
    rows = {row["concurrency"]: row for row in plan["strategy"]["disagreements"]}
    assert set(rows) == {1, 64, 256}, "at 16 repeats of one kernel lie further apart"
    assert rows[256]["strategy"]["kernel"] == "Marlin, FP8 KV cache" and rows[256]["strategy"]["gain"] == 0.63
    assert [entry["gain"] for entry in rows[256]["evidence"]] == [1.10, 1.00, 0.97]
    assert (
        "GPTQ with Machete, FP8 KV cache (1.10x)" in rows[256]["do"] and "--linear-backend humming" in rows[256]["do"]
    )
    assert all(row["near"] and "Decision Guide" in row["source"] for row in rows.values())
    assert disagreements([H100, MI325X], list(RECIPES.values()), LEVELS, Model(8 * 10**9)) == []
    text = " ".join(render_plan(plan).split())
    assert "measured 0.63x BF16" in text and "does not hold at 16, 64, 256" in text


def test_a_promise_counts_every_concurrency():
    def gain(level, value, basis="measured"):
        return {"concurrency": level, "gain": value, "basis": basis, "told": None}

    (row,) = promise([{"platform": "x", "served": [gain(1, 1.6), gain(2, 1.59), gain(4, None, None)]}], [1, 2, 4])
    assert (row["holds"], row["fails"], row["unknown"]) == ([1], [2], [4])
    (row,) = promise([{"platform": "x", "served": [gain(1, 2.0, "roofline")]}], [1])
    assert row["text"].startswith("holds at concurrency 1 (by the roofline)"), row["text"]


def test_mixtures_of_experts_are_planned(of):
    mixtral = of(MIXTRAL)
    plan = make_plan(mixtral, None, [H100, MI325X], 4096, [1, 64])
    moe = plan["model"]["moe"]
    assert (moe["experts"], moe["experts_per_token"], moe["routers"]) == (8, 2, 32)
    assert moe["router_bytes"] == 32 * 8 * 4096 * 2
    rows = {row["linear"]: row for row in plan["linears"]}
    assert {rows[name]["count"] for name in ("w1", "w2", "w3")} == {32 * 8}
    assert (rows["gate"]["kind"], rows["gate"]["grid"], rows["gate"]["count"]) == ("router", "bf16", 32)
    assert rows["gate"]["bytes_after"] == moe["router_bytes"]
    in_experts = 32 * 8 * 3 * 4096 * 14336
    assert sum(rows[name]["parameters"] for name in ("w1", "w2", "w3")) == in_experts
    assert 46e9 < plan["model"]["parameters"] < 47e9
    assert plan["bytes"]["after"] < 0.27 * plan["bytes"]["before"]
    assert moe["active_parameters"] == plan["model"]["parameters"] - in_experts * 6 // 8
    assert any("2 of 8 experts, 28% of the parameters" in notice for notice in plan["notices"])
    assert any(
        "experts run in" in warning["text"] and "source, vLLM" in warning["source"] for warning in plan["warnings"]
    )
    assert not any(row["bytes_added"] for row in plan["exemptions"] if row["reason"].startswith("router"))
    assert "8 experts a block" in render_plan(plan)
    small = make_plan(of(QWEN3_MOE), None, [CPU])
    assert small["model"]["moe"]["experts"] == 16
    assert {row["linear"]: row["count"] for row in small["linears"]}["gate_proj"] == 2 * 16


def test_predictions_are_finite(llama, of):
    for config in (LLAMA_8B, MIXTRAL):
        plan = make_plan(of(config), None, [H100, MI325X], 32768, [1, 7, 500])
        for row in plan["speed"]:
            for entry in row["rows"]:
                assert all(math.isfinite(gain["gain"]) and gain["gain"] > 0 for gain in entry["gains"])


def test_a_platform_may_be_ranked_by_another(tmp_path) -> None:
    """A card without figures of its own: its kernels rank as the H100's, whose figures are not told as its."""
    file = tmp_path / "mine.yaml"
    claim = {"kind": "assumed", "device": "", "vllm": "", "date": "2026-11-30"}
    own = {"like": "h100", "name": "mine", "ranked_by": "h100", "roofline": {"evidence": claim}}
    file.write_text(yaml.safe_dump(own))
    h100, mine = load_platform("h100"), load_platform(str(file))
    assert mine.speed and all(table.lent for table in mine.speed) and not any(table.lent for table in h100.speed)
    size = Model(h100.speed[0].model.parameters)
    assert is_near(h100.speed[0], size) and not is_near(mine.speed[0], size)
    recipe = Recipe.model_validate({"method": "nvfp4", "group_size": 16, "activations": "fp4"})
    assert best_speed(recipe, mine, 64) == best_speed(recipe, h100, 64)
    for limit in (size, None):
        command = serve_command("x", "modelopt", mine, variant="NVFP4", concurrency=64, size=limit)
        assert command.value("--linear-backend") == "humming"
        (note,) = (note for note in command.notes if note.startswith("kernel"))
        assert "by a measurement on h100; what it gains here is not known" in note and "x the speed" not in note
    assert mine.roofline and h100.roofline and mine.roofline.kernels == h100.roofline.kernels
    assert str(mine.roofline.evidence) == "assumed, 2026-11-30", "its efficiencies are the H100's"
    assert str(mine.support("gptq").evidence).startswith("measured on h100, ")


def test_the_h200_has_figures_of_its_own(of) -> None:
    """Of an 8B and of a 32B shape: each model is told those of the shape near it, and kernels are chosen by them."""
    h200 = load_platform("h200")
    assert {table.device for table in h200.speed} == {"h200"} and not h200.ranked_by
    small, large = (
        make_plan(of(LLAMA_8B), None, [h200], 256, [1, 64]),
        make_plan(of(QWEN_32B), None, [h200], 256, [1, 64]),
    )
    for plan, shape in ((small, "Llama-3.1-8B"), (large, "Qwen2.5-32B")):
        (speed,) = plan["speed"]
        assert shape in speed["evidence"] and {gain["basis"] for gain in speed["served"]} == {"measured"}
    (table,) = (table for table in h200.speed if "32B" in table.model.name)
    ours = table.fastest([row for row in table.rows if row.method == large["recipe"]["method"]], 1)
    gains = {gain["concurrency"]: gain["gain"] for gain in large["speed"][0]["served"]}
    assert gains[1] == pytest.approx(table.baseline.seconds[1] / ours.seconds[1], abs=0.01) and gains[1] > 1.6
    assert str(h200.roofline.evidence).startswith("measured, "), "its own"
    assert str(h200.support("gptq").evidence).startswith("measured on h100, "), "which kernels there are was seen there"


def test_gains_within_noise_are_marked(of) -> None:
    """The 8B shape on an H200: at 64 sequences Humming is 8 % ahead and noise 11 %, at 256 23 % behind and 49 %."""
    text = render_plan(make_plan(of(LLAMA_8B), None, [load_platform("h200")], 256, [1, 64, 256]))
    said = " ".join(text.split())
    assert "1.33x at 1, ~1.08x at 64, ~0.77x at 256 (measured); kernel Humming, FP8 KV cache ~ within the noise" in said
    assert "at 256 it is slower" not in said and "measured slower than BF16" not in said, "not known"
    assert "GPTQ with Machete, FP8 KV cache (~0.96x)" in said and "~0.84x at 256 (Machete" in said
    assert "0.80x m" in said and "~0.80x" not in said, "Marlin is behind by more than noise"
    assert "measured ~0.99x BF16 at concurrency 128); without it vLLM takes Marlin, FP8 KV cache, 0.65x" in said
    rows = [line for line in text.splitlines() if line.startswith(("  NVFP4 ", "  GPTQ ", "  AWQ ")) and " m" in line]
    assert len(rows) == 7 and len({len(line) for line in rows}) == 1, "numbers stand to the right"
    told = " ".join(render_plan(make_plan(of(LLAMA_8B), None, [load_platform("h200")], 256, [512])).split())
    assert "~0.77x at 512 (measured at 256); kernel" in told


def test_slower_is_said_where_it_is_told() -> None:
    def served(told):
        return [{"platform": "x", "served": [{"concurrency": 8, "gain": 0.9, "basis": "measured", "told": told}]}]

    assert [promise(served(told), [8])[0]["slower"] for told in (True, False, None)] == [[8], [], [8]]
    assert "at 8 it is slower than BF16" in promise(served(True), [8])[0]["text"]


def test_what_noise_leaves_open_is_the_guides_margin_where_a_file_says_nothing() -> None:
    quiet = TABLE.model_copy(update={"apart": {}})
    row = quiet.baseline.model_copy(update={"seconds": {n: s * 1.02 for n, s in quiet.baseline.seconds.items()}})
    assert not beyond_noise(quiet, row, 64)
    row = row.model_copy(update={"seconds": {n: s * 1.05 for n, s in quiet.baseline.seconds.items()}})
    assert beyond_noise(quiet, row, 64) and not beyond_noise(quiet.model_copy(update={"apart": {64: 0.06}}), row, 64)


def _measured(methods, gain, **changes):
    """A table with BF16 and those methods, all as fast as `gain` says, at 1 and 64."""
    kept = [row for row in TABLE.rows if row.method == "bf16" and row.kv_cache == "auto"]
    for method in methods:
        row = next(row for row in TABLE.rows if row.method == method and row.kv_cache == "auto")
        kept.append(row.model_copy(update={"seconds": {n: s / gain[method] for n, s in kept[0].seconds.items()}}))
    model = TABLE.model.model_copy(update=changes.pop("model", {}))
    return TABLE.model_copy(update={"rows": tuple(kept), "model": model, "apart": {}, **changes})


def test_one_measurement_decides() -> None:
    """The newest near one that has the first choice and another; what is not in it does not displace the first."""
    size = Model(TABLE.model.parameters)

    def chosen(*tables):
        decision = choose([4096], [nearest_first(H100.model_copy(update={"speed": tables}), size)], [64], size=size)
        return decision.recipe.method, [reason.text for reason in decision.reasons]

    slow, fast = {"nvfp4": 1.0, "gptq": 1.0, "awq": 1.0}, {"nvfp4": 1.0, "gptq": 1.0, "awq": 3.0}
    assert chosen(_measured(["nvfp4", "gptq"], slow), _measured(["nvfp4", "awq"], fast))[0] == "nvfp4"
    assert chosen(_measured(["nvfp4", "awq"], fast))[0] == "awq"
    assert chosen(_measured(["nvfp4"], slow), _measured(["awq"], fast))[0] == "nvfp4", "two are not compared"
    method, reasons = chosen(_measured(["awq"], fast), _measured(["nvfp4", "gptq"], slow))
    assert method == "nvfp4" and any("AWQ" in why and "NVFP4 is not in it: bench both" in why for why in reasons)
    far = _measured(["nvfp4", "gptq"], {"nvfp4": 1.0, "gptq": 2.0}, model={"parameters": 70 * 10**9})
    assert chosen(_measured(["nvfp4"], slow), far)[0] == "nvfp4", "a far one does not overrule a near one"
    method, reasons = chosen(far)
    assert method == "gptq" and "GPTQ measured faster than NVFP4 on a model of another size" in reasons[0]
    assert "2.00x" not in reasons[0], "whose figures are not told"
    method, reasons = chosen(_measured(["nvfp4", "gptq"], {"nvfp4": 1.5, "gptq": 1.51}))
    alike = "on h100 GPTQ measured 1.51x BF16 and NVFP4 1.50x at concurrency 64, which is within noise"
    assert method == "nvfp4" and alike in reasons[0]
    most = _measured(["nvfp4", "gptq", "awq"], {"nvfp4": 1.0, "gptq": 1.5, "awq": 2.0})
    assert chosen(most)[0] == "awq", "the fastest of those that are faster"
    decision = choose([4096], [H100.model_copy(update={"speed": (most,)})], [1, 64, 2000])
    assert "AWQ measured 2.00x BF16 and NVFP4 1.00x at concurrency 1, 64 and 256 on average" in decision.reasons[0].text
    other = _measured(["nvfp4", "gptq", "awq"], {"nvfp4": 2.0, "gptq": 1.5, "awq": 1.0})
    both = [H100.model_copy(update={"speed": (t,), "name": n}) for t, n in ((most, "one"), (other, "two"))]
    decision = choose([4096], both, [64])
    assert decision.recipe.method == "nvfp4", "faster on one, slower on the other"
    assert (
        "on one AWQ measured 2.00x BF16 and NVFP4 1.00x at concurrency 64, but not on two" in decision.reasons[0].text
    )


def test_where_the_strategy_is_behind_is_told_by_one_measurement(of) -> None:
    """Of a 32B model on an H200 Marlin was not measured: the 8B shape's figures say where it is behind, among them."""
    rows = make_plan(of(QWEN_32B), None, [load_platform("h200")], 256, [1, 16, 64, 256])["strategy"]["disagreements"]
    assert [(row["concurrency"], row["near"]) for row in rows] == [(64, False)]
    assert all(entry["gain"] is None for row in rows for entry in (row["strategy"], *row["evidence"]))


def test_how_nvfp4_is_declared_is_told_by_one_measurement() -> None:
    """A newer one without Marlin does not make Humming, slow in it, slower than Marlin in the other."""
    alone = _measured(["nvfp4"], {"nvfp4": 0.5})
    assert nvfp4_for([H100.model_copy(update={"speed": (alone, TABLE)})], [64]).activations == "fp4"
    assert nvfp4_for([H100.model_copy(update={"speed": (alone,)})], [64]).activations == "fp4", "it alone was measured"


def test_levels_that_share_a_measurement_count_once() -> None:
    recipe, uneven = RECIPES["gptq"], _measured(["gptq"], {"gptq": 1.0})
    rows = (uneven.rows[0], uneven.rows[1].model_copy(update={"seconds": {1: 0.4095, 64: 1.169}}))
    base = rows[0].model_copy(update={"seconds": {1: 0.819, 64: 1.169}})
    platform = H100.model_copy(update={"speed": (uneven.model_copy(update={"rows": (base, rows[1])}),)})
    assert mean_speed(recipe, platform, [1, 2, 3, 64]) == pytest.approx(2**0.5)


def test_of_far_measurements_the_nearest_is_asked_first() -> None:
    def sized(billions, **changes):
        return TABLE.model_copy(
            update={"model": TABLE.model.model_copy(update={"parameters": int(billions * 1e9)}), **changes}
        )

    small, large, lent, two = sized(8), sized(32), sized(64, lent=True), sized(64, tensor_parallel=2)
    known = H100.model_copy(update={"speed": (lent, two, small, large)})
    assert nearest_first(known, Model(200 * 10**9)).speed == (large, small, two, lent)
    assert nearest_first(known, Model(16 * 10**9)).speed[:2] == (small, large), "both are near: as they were"
    assert elsewhere(two, Model(64 * 10**9)) == "on another number of devices"
    assert elsewhere(small, Model(64 * 10**9, 2)) == "on a model of another size"


def test_figures_of_two_tables_are_credited_to_each(llama) -> None:
    rows = tuple(row for row in TABLE.rows if row.method in ("bf16", "gptq"))
    mine = TABLE.model_copy(update={"rows": rows, "note": "mine", "date": TABLE.date + datetime.timedelta(days=1)})
    own = H100.model_copy(update={"speed": (mine, TABLE)})
    told = " ".join(render_plan(make_plan(llama, None, [own], 256, [64])).split())
    first, second = re.findall(r"m of ([^:]+): measured, vLLM 0.26.0, (\S+),", told)
    assert {who.split()[0] for who in first[0].split(", ") if " with " in who} == {"NVFP4", "AWQ"}
    assert second[0] == "GPTQ with Machete, GPTQ with Machete, FP8 KV cache"
    assert (first[1], second[1]) == (str(TABLE.date), str(mine.date))
    alone = " ".join(render_plan(make_plan(llama, None, [H100], 256, [64])).split())
    assert f"m: measured, vLLM 0.26.0, {TABLE.date}" in alone and "m of" not in alone
