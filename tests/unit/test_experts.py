"""Mixtures of experts: each expert's statistics against a direct computation, few tokens, what shares a fate."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

import halfbyte.engine.block as block_module
import halfbyte.engine.loop as loop_module
from halfbyte.algo import Solved, Stats, dequantize
from halfbyte.artifact import ArtifactWriter, check_artifact, load_fake_quantized, model_card
from halfbyte.engine import Job, Skeleton, quantize_blocks, work_id
from halfbyte.engine.block import BlockResult
from halfbyte.engine.experts import PRIOR, SPREAD
from halfbyte.engine.importance import EXPERTS, SINK, first_token
from halfbyte.engine.loop import make_batches
from halfbyte.engine.wire import packed, perform, unpack
from halfbyte.engine.workers import Errand
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.experiments.cells import resolve_cells
from halfbyte.experiments.matrix import Matrix, MatrixCell
from halfbyte.experiments.passes import SharedPass, Taker
from halfbyte.models import Checkpoint, family_of
from halfbyte.plan.layers import EXPERTS_DOWN, assign, quantized
from halfbyte.recipe.schema import Recipe
from halfbyte.types import Quiet
from tests.tiny import SPARSE, VOCAB, make_tiny
from tests.unit.artifacts import digests, random_set, weight_of
from tests.unit.quantizing.conftest import make

SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "mlp_only_layers": []}
DATA = [torch.randint(5, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (90, 90, 61, 40)]
TOKENS = 200
"""Of a batch: the last one is padded."""
UNSEEN = 4
"""The expert that `starve` takes all tokens from."""


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def get(family: str, **overrides: Any) -> Path:
        name = f"{family} {overrides}"
        if name not in made:
            settings = {k: v for k, v in SMALL.items() if family != "mixtral" or k != "mlp_only_layers"}
            made[name] = make_tiny(family, tmp_path_factory.mktemp(family), **{**settings, **overrides})
        return made[name]

    return get


def recipe(**settings: Any) -> Recipe:
    return Recipe.model_validate({"group_size": 32, "method": "gptq", **settings})


def run(path: Path, chosen: Recipe, data: list[torch.Tensor] | None = None, **more: Any) -> dict[int, BlockResult]:
    kept: dict[int, BlockResult] = {}
    checkpoint = Checkpoint(path)
    job = Job(chosen, quantized(assign(chosen, checkpoint)), lambda _: False, kept.__setitem__)
    quantize_blocks(checkpoint, [job], data, **more)
    return kept


def starve(path: Path, family: str) -> None:
    """A router that never chooses UNSEEN of five experts: two of v x, -v x, v x / 2, -v x / 2 are above its 0."""
    tensors = load_file(path / "model.safetensors")
    (name,) = [n for n in tensors if n.endswith((".block_sparse_moe.gate.weight", ".mlp.gate.weight"))]
    v = tensors[name][0].clone()
    tensors[name] = torch.stack([v, -v, v / 2, -v / 2, torch.zeros_like(v)])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


class Reference:
    """transformers' own sparse block of one tiny model: its inputs by hooks, routed here by the formula."""

    def __init__(self, path: Path, family: str):
        self.family, self.network = family_of(Checkpoint(path).config), None
        network: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self.network = network
        mlp, seen = network.model.layers[0].mlp, []
        handle = mlp.register_forward_pre_hook(lambda _m, a: seen.append(a[0].detach().flatten(0, 1)))
        batches = make_batches(DATA, TOKENS)
        with torch.no_grad():
            for ids, _ in batches:
                network(input_ids=ids, use_cache=False)
        handle.remove()
        importance = first_token(Skeleton(Checkpoint(path)), DATA)
        assert importance.first[0, EXPERTS] not in (0.0, 1.0, SINK)
        counts = [importance.weights((0, EXPERTS), 0, tuple(ids.shape)).flatten().double() for ids, _ in batches]
        keeps = [torch.ones(ids.numel(), dtype=torch.bool) if keep is None else keep for ids, keep in batches]
        self.x, self.count = (torch.cat([t[k] for t, k in zip(ts, keeps)]) for ts in (seen, counts))
        scores = torch.softmax((self.x @ mlp.gate.weight.T).float(), -1)
        weights, self.chosen = scores.topk(self.family.experts_per_token, -1)
        if family != "qwen2_moe":
            weights = weights / weights.sum(-1, keepdim=True)
        self.r = weights.bfloat16().double() if family != "mixtral" else weights.double()

    def routed(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs of an expert's tokens and what each counts."""
        tokens, place = torch.where(self.chosen == number)
        return self.x[tokens], self.count[tokens] * self.r[tokens, place].square()

    def middle(self, number: int, x: torch.Tensor) -> torch.Tensor:
        experts = self.network.model.layers[0].mlp.experts  # type: ignore[union-attr]
        gate, up = experts.gate_up_proj[number].detach().chunk(2)
        return silu(x @ gate.T) * (x @ up.T)


def hessian(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return (x * counts[:, None]).T @ x / counts.sum()


def stats_by_key(monkeypatch: pytest.MonkeyPatch, path: Path) -> dict[str, Stats]:
    """What the pass solves with."""
    seen: dict[str, Stats] = {}

    def spy(_recipe: Recipe, _family: object, _index: int, *rest: Any) -> BlockResult:
        seen.update(rest[2])
        return BlockResult()

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "solve_block", spy)
        run(path, recipe(), DATA, batch_tokens=TOKENS)
    return seen


def assert_near(stats: Stats, H: torch.Tensor) -> None:
    assert stats.gram_II is not None
    assert torch.allclose(stats.second_moment_I.double(), H.diagonal(), rtol=3e-3, atol=1e-9)
    assert float((stats.gram_II - H).norm() / H.norm()) < 4e-3


@pytest.mark.parametrize("family", SPARSE)
def test_an_experts_hessian_is_that_of_its_own_tokens(
    family: str, model_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weighed by the square of the router's weight, with the block's tokens as a prior."""
    path = model_of(family)
    seen, reference = stats_by_key(monkeypatch, path), Reference(path, family)
    assert len(reference.x) < SPREAD, "every token of the block is in the prior"
    for number in range(reference.family.experts):
        x, counts = reference.routed(number)
        assert 0 < len(x) < len(reference.x)
        share = len(x) / (len(x) + PRIOR)
        for kind, into in (("gate_up", lambda x: x), ("down", lambda x, e=number: reference.middle(e, x))):
            stats = seen[f"experts.{number}.{kind}"]
            own, block = hessian(into(x), counts), hessian(into(reference.x), reference.count)
            assert_near(stats, share * own + (1 - share) * block)
            assert float((own - block).norm() / own.norm()) > 0.05, "this model would not tell one from the other"
            assert stats.tokens == len(x)


def test_a_shared_expert_counts_by_its_gate(model_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = model_of("qwen2_moe")
    seen, reference = stats_by_key(monkeypatch, path), Reference(path, "qwen2_moe")
    mlp: Any = reference.network.model.layers[0].mlp  # type: ignore[union-attr]
    with torch.no_grad():
        gate = mlp.shared_expert_gate(reference.x).flatten().double().sigmoid()
        middle = silu(mlp.shared_expert.gate_proj(reference.x)) * mlp.shared_expert.up_proj(reference.x)
    assert float(gate.std()) > 0.1
    for kind, x in (("gate_up", reference.x), ("down", middle)):
        assert_near(seen[f"shared_expert.{kind}"], hessian(x, reference.count * gate.square()))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_an_expert_without_tokens(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is rounded for the block's tokens, reported, and the artifact is whole."""
    key = "num_local_experts" if family == "mixtral" else "num_experts"
    settings = {k: v for k, v in SMALL.items() if family != "mixtral" or k != "mlp_only_layers"}
    path = make_tiny(family, tmp_path / "model", **{**settings, key: 5})
    starve(path, family)
    seen, reference = stats_by_key(monkeypatch, path), Reference(path, family)
    assert len(reference.routed(UNSEEN)[0]) == 0 == seen[f"experts.{UNSEEN}.down"].tokens
    assert_near(seen[f"experts.{UNSEEN}.gate_up"], hessian(reference.x, reference.count))
    assert_near(seen[f"experts.{UNSEEN}.down"], hessian(reference.middle(UNSEEN, reference.x), reference.count))

    told = Quiet()
    manifest = make(path, tmp_path / "out", {"method": "gptq", "group_size": 32}, progress=told)
    ((name, row),) = manifest["experts"].items()
    assert name.endswith(".experts") and row["tokens"][UNSEEN] == 0 and sum(row["tokens"]) == 2400 * 2
    assert row["starved"] == [UNSEEN] and manifest["notices"] == told.notices
    assert f"1 of 5 experts got fewer than {PRIOR} calibration tokens ({UNSEEN} (0))" in told.notices[0]
    assert check_artifact(tmp_path / "out")["ok"]
    counts = f"0 to {max(row['tokens']):,} calibration tokens each; 1 got too few"
    assert f"- experts: 5 in 1 blocks, {counts}" in model_card(manifest)
    errors = [r["error"]["relative"] for n, r in manifest["linears"].items() if f".experts.{UNSEEN}." in n]
    assert len(errors) == 3 and all(0 < e < 0.15 for e in errors)


class Watched:
    """One worker apart, in a thread: how many pieces of work were made and not done yet, at most."""

    apart, count = True, 1

    def __init__(self) -> None:
        self.pool, self.futures, self.most = ThreadPoolExecutor(1), list[Future[Any]](), 0

    def open(self) -> None:
        pass

    def submit(self, errand: Errand) -> Future[Any]:
        def work() -> Any:
            time.sleep(0.05)
            return unpack(perform(sent, "cpu", torch.get_num_threads())).value

        sent = packed(errand)
        self.futures.append(self.pool.submit(work))
        self.most = max(self.most, sum(not future.done() for future in self.futures))
        return self.futures[-1]


def test_workers_get_expert_after_expert(model_of: Callable[..., Path]) -> None:
    """Their statistics are not all made before the first is solved, and the results are those of no workers."""
    path, them = model_of("qwen3_moe", num_experts=8), Watched()
    ours, theirs = run(path, recipe(), DATA), run(path, recipe(), DATA, workers=them)
    assert len(them.futures) > 8 and them.most <= 3, them.most
    for block, result in ours.items():
        for name, solved in result.linears.items():
            other = theirs[block].linears[name].q
            assert torch.equal(solved.q.codes, other.codes) and torch.equal(solved.q.scales, other.scales), name
        assert result.experts == theirs[block].experts


def test_data_free_mixtures_report_no_tokens(model_of: Callable[..., Path], tmp_path: Path) -> None:
    manifest = make(model_of("mixtral"), tmp_path / "out", {"method": "rtn", "group_size": 32})
    assert manifest["experts"] is None and manifest["notices"] == []


@pytest.mark.parametrize("family", SPARSE)
def test_gptq_of_experts_beats_rounding_to_nearest(family: str, model_of: Callable[..., Path]) -> None:
    """On what each expert adds to the block's output for its own tokens, through gate and up, and through down."""
    path = model_of(family)
    reference, errors = Reference(path, family), {}
    for method in ("rtn", "gptq"):
        result = run(path, recipe(method=method, scaling="none"), DATA, batch_tokens=TOKENS)[0]
        error = {"up": 0.0, "down": 0.0}
        for name, solved in result.linears.items():
            if ".experts." not in name:
                continue
            number = int(name.split(".experts.")[1].partition(".")[0])
            x, counts = reference.routed(number)
            down = name.endswith(("w2", "down_proj"))
            x = reference.middle(number, x) if down else x
            E = (dequantize(solved.q) - weight_of(reference.network, name).float()).detach()
            error["down" if down else "up"] += float(((x.float() @ E.T).square().sum(1) * counts).sum())
        errors[method] = error
    for part, value in errors["gptq"].items():
        assert 0 < value < 0.9 * errors["rtn"][part], (part, errors)


@pytest.mark.parametrize("family", SPARSE)
def test_scales_of_experts_cancel(family: str, model_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Input scales go from up into down within each expert, and to no other linear of the mixture (nothing is rounded
    here)."""
    path = model_of(family)
    original = Checkpoint(path).load_all("")

    def forced(weights: list[torch.Tensor], *_rest: Any) -> torch.Tensor:
        return 2 ** (2 * torch.rand(weights[0].shape[1], generator=torch.Generator().manual_seed(3)) - 1)

    def keep(weights: list[torch.Tensor], *_: object) -> tuple[list[Solved], None]:
        return [Solved(SimpleNamespace(weight=w.float().clone()), 0.0, None) for w in weights], None  # type: ignore[arg-type]

    monkeypatch.setattr(block_module, "find_scale", forced)
    monkeypatch.setattr(block_module, "solve_group", keep)
    result = run(path, recipe(method="awq", ignore=("lm_head", "re:.*self_attn.*")), DATA)[0]
    assert not result.tensors, "no norm takes up a scale: the router and all experts read it"
    for name, solved in result.linears.items():
        weight = original[f"{name}.weight"].float()
        if name.endswith(("up_proj", "w3")):
            weight = weight / forced([weight.T])[:, None]
        elif name.endswith(("down_proj", "w2")):
            weight = weight * forced([weight])
        torch.testing.assert_close(solved.q.weight, weight)  # type: ignore[attr-defined]
    assert len(result.linears) == sum(".experts." in n or ".shared_expert." in n for n in original)


@pytest.mark.parametrize("family", SPARSE)
def test_reading_back_keeps_transformers_own_modules(
    family: str, model_of: Callable[..., Path], tmp_path: Path
) -> None:
    path = model_of(family)
    make(path, tmp_path / "out", {"method": "rtn", "group_size": 32})
    native = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    read = load_fake_quantized(tmp_path / "out", dtype=torch.float32)
    assert {n: p.shape for n, p in read.named_parameters()} == {n: p.shape for n, p in native.named_parameters()}
    assert {n: type(m) for n, m in read.named_modules()} == {n: type(m) for n, m in native.named_modules()}
    close = [float((read.get_parameter(n) - p).norm() / p.norm()) for n, p in native.named_parameters()]
    assert max(close) < 0.15 and sum(c > 0 for c in close) >= 6


def plans(path: Path, **settings: Any) -> dict[str, Any]:
    return {plan.name: plan for plan in assign(recipe(**settings), Checkpoint(path))}


def test_all_experts_of_a_block_share_a_fate(model_of: Callable[..., Path]) -> None:
    path = model_of("mixtral", num_hidden_layers=2)
    whole = "model.layers.1.block_sparse_moe.experts"
    for part in (f"{whole}.2", f"{whole}.0.w1", "re:.*experts.*w2"):
        with pytest.raises(UsageError, match=r"keeps a part of .*experts, all experts of which vLLM fuses"):
            plans(path, ignore=("lm_head", part))
    for named in (whole, f"re:{whole}.*"):
        found = plans(path, ignore=("lm_head", named))
        kept = {n for n, p in found.items() if p.scheme is None and p.kind not in ("router", "lm_head")}
        assert kept == {n for n in found if n.startswith(f"{whole}.")} and len(kept) == 12
    routers = [p for p in plans(path, ignore=("lm_head", "re:.*gate")).values() if p.kind == "router"]
    assert len(routers) == 2 and all(p.scheme is None and p.reason.startswith("router") for p in routers)


def test_a_boundarys_down_projections_of_experts_stay_quantized(model_of: Callable[..., Path]) -> None:
    found = plans(model_of("qwen2_moe"), boundary={"blocks": 1, "keep": "projections"})
    experts = [p for n, p in found.items() if ".experts." in n]
    assert all(p.scheme is not None and p.reason == EXPERTS_DOWN for p in experts) and len(experts) == 9
    kept = {n.removeprefix("model.layers.0.") for n, p in found.items() if p.reason == "boundary projection"}
    assert kept == {"self_attn.o_proj", "mlp.shared_expert.down_proj"}
    blocks = plans(model_of("qwen2_moe"), boundary={"blocks": 1, "keep": "blocks"})
    assert not any(p.scheme for n, p in blocks.items())


def test_experts_have_one_group_size(model_of: Callable[..., Path]) -> None:
    """gate and up read 64 numbers, down 96: what divides both."""
    path = model_of("qwen3_moe", moe_intermediate_size=96)
    with pytest.raises(UsageError, match=r"group_size 64 does not divide the 96 inputs of .*mlp\.experts: --set"):
        plans(path, group_size=64)
    smaller = plans(path, group_size=64, indivisible="smaller")
    assert {p.scheme.group_size for n, p in smaller.items() if ".experts." in n} == {32}
    assert {p.scheme.group_size for n, p in smaller.items() if ".self_attn." in n} == {64}
    kept = plans(path, group_size=64, indivisible="keep")
    assert all(p.scheme is None for n, p in kept.items() if ".experts." in n)
    rows = plans(path, group_size=-1)
    assert {p.scheme.group_size for n, p in rows.items() if ".experts." in n} == {64, 96}


@pytest.mark.parametrize("missing", ["num_local_experts", "num_experts_per_tok"])
def test_a_config_without_its_experts_is_one_line(missing: str, model_of: Callable[..., Path]) -> None:
    config = {k: v for k, v in Checkpoint(model_of("mixtral")).config.items() if k != missing}
    with pytest.raises(HalfbyteError, match=r"config\.json lacks num_experts"):
        family_of(config)


def test_dense_blocks_are_named_where_only_a_step_did(tmp_path: Path) -> None:
    path = make_tiny("qwen3_moe", tmp_path / "model", mlp_only_layers=[], decoder_sparse_step=2, num_hidden_layers=2)
    assert family_of(Checkpoint(path).config).sparse == (1,)
    manifest = make(path, tmp_path / "out", {"method": "rtn", "group_size": 32})
    assert Checkpoint(tmp_path / "out").config["mlp_only_layers"] == [0] and check_artifact(tmp_path / "out")["ok"]
    assert manifest["linears"]["model.layers.0.mlp.down_proj"]["scheme"]


def test_a_sweep_of_a_mixture_shares_what_is_the_same(model_of: Callable[..., Path], tmp_path: Path) -> None:
    """Cells that differ in the attention alone share the experts; the artifacts are byte for byte those of quantize."""
    path = model_of("mixtral", num_hidden_layers=2)
    base = {"method": "gptq", "group_size": 32}
    recipes = {"a": base, "b": {**base, "ignore": ["lm_head", "re:.*self_attn.*"]}}
    cells = tuple(MatrixCell(name, r, recipe=Recipe.model_validate(r)) for name, r in recipes.items())
    checkpoint, data = Checkpoint(path), random_set()
    takers = []
    for cell in resolve_cells(Matrix("m", "", cells), checkpoint, []):
        work = work_id(cell.recipe, checkpoint.fingerprint(), data.sha256)  # type: ignore[arg-type]
        writer = ArtifactWriter(tmp_path / cell.name, checkpoint, cell.recipe, cell.plans, work)  # type: ignore[arg-type]
        writer.open()
        takers.append(Taker(cell, writer))
    shared = SharedPass(checkpoint, takers, data, "cpu")
    shared.run()
    assert shared.solved == 2 * 2, "of each block: attention once, experts once"
    for taker in takers:
        assert not taker.cell.reason
        manifest = taker.writer.finish(dict)
        assert len(manifest["experts"]) == 2
        make(path, tmp_path / "alone" / taker.cell.name, recipes[taker.cell.name])
        assert digests(tmp_path / taker.cell.name) == digests(tmp_path / "alone" / taker.cell.name)
