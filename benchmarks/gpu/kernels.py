"""The Triton kernels against torch on a GPU: the same codes and scales, and how much faster.

    python benchmarks/gpu/kernels.py [--json FILE] [--sweep]

From a checkout, on a machine with a GPU, torch and triton; random weights of realistic scale, no model, no data; about
a minute. The shapes are a Llama-3.1-8B block's and a SmolLM2-135M block's, linears with one input stacked as the solver
stacks them. "Same" is the share of codes or scales that are equal to torch's; a float32 sum in another order decides a
tie differently now and then, and in GPTQ one such code moves those after it in its row. "Loss" is by how much the error
then differs, relatively. Exits with 1 where a kernel differs by more than ties explain.

"before" is torch. For "gptq tf32" it is the same kernel with float32 products. For "awq point", one point of AWQ's
search, it is halfbyte.algo.awq as it stands; now is one kernel and a bfloat16 product.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from halfbyte.algo import Stats, awq, factorize, get_grid, gptq, kernels, output_error
from halfbyte.algo.grid import Scales, in_groups

LARGE = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
SMALL = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)}
GRIDS = {"int4_sym": 128, "int4_asym": 128, "nvfp4": 16}
CHECKED = 512
"""Rows on which grids other than the first are held against torch."""
LEAST_SAME, MOST_LOSS = {"gptq": 0.98, "fit": 0.999}, 1e-3
DEVICE = torch.device("cuda")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def torch_only() -> Iterator[None]:
    """The oracle's path, on the GPU."""
    modules = [sys.modules[f"halfbyte.algo.{name}"] for name in ("gptq", "int4", "nvfp4")]
    patches = [patch.object(module, "usable", lambda *_: False) for module in modules]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def timed(function: Callable[[], Any], repeats: int = 3) -> tuple[Any, float]:
    """What it returned and the least seconds of `repeats` runs."""
    least = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = function()
        torch.cuda.synchronize()
        least = min(least, time.perf_counter() - started)
    return result, least


def weights(shape: tuple[int, int]) -> torch.Tensor:
    g = torch.Generator(DEVICE).manual_seed(sum(shape))
    return (torch.randn(shape, generator=g, device=DEVICE) * 0.02).bfloat16().float()


def inputs(width: int) -> Stats:
    """Statistics of 16384 correlated inputs of unequal magnitude."""
    g = torch.Generator(DEVICE).manual_seed(width)
    mix = torch.randn(width // 4, width, generator=g, device=DEVICE).bfloat16()
    X = torch.randn(16384, width // 4, generator=g, device=DEVICE).bfloat16() @ mix / (width // 4) ** 0.5
    X = X + 0.3 * torch.randn(X.shape, generator=g, device=DEVICE)
    X *= torch.randn(width, generator=g, device=DEVICE).exp()
    H = X.T @ X / len(X)
    return Stats(H.diagonal().clone(), H, float(X.abs().max()), len(X))


def decoded(grid: str, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
    group = codes.shape[1] // scales.scales.shape[1]
    zeros = None if scales.zeros is None else scales.zeros[:, :, None]
    return (get_grid(grid).decode(codes.unflatten(1, (-1, group)), zeros) * scales.effective[:, :, None]).flatten(1)


def loss(E: torch.Tensor, stats: Stats) -> float:
    return float(sum(output_error(part, stats).double().sum() for part in E.split(4096)))


def fit_row(model: str, name: str, W: torch.Tensor, stats: Stats, grid: str) -> tuple[Scales, dict[str, Any]]:
    """Time and compare one search for scales."""
    chosen, group = get_grid(grid), GRIDS[grid] if model == "8B" else min(GRIDS[grid], 64)
    outer = chosen.global_scale([W])
    run = lambda: chosen.fit(W, stats.second_moment_I, group, outer, "default")  # noqa: E731
    run()
    got, fast = timed(run)
    with torch_only():
        want, slow = timed(run, 1)
    same = want.scales == got.scales
    if want.zeros is not None and got.zeros is not None:
        same &= want.zeros == got.zeros
    w, h = in_groups(W, stats.second_moment_I, group)
    errors = []
    for scales in (want, got):
        zeros = None if scales.zeros is None else scales.zeros[:, :, None]
        s = scales.effective[:, :, None]
        errors.append(float(chosen.snap(w / s, zeros).mul_(s).sub_(w).square_().mul_(h).sum(dtype=torch.float64)))
    return got, row("fit", model, name, grid, slow, fast, float(same.float().mean()), errors[1] / errors[0] - 1)


def gptq_row(
    model: str, name: str, W: torch.Tensor, stats: Stats, grid: str, scales: Scales, factor: Any, whole: bool
) -> dict[str, Any]:
    """Time GPTQ's column loop; compare it on all rows, or on CHECKED of them."""
    chosen = get_grid(grid)
    run = lambda part: gptq(  # noqa: E731
        W[part], scales.effective[part], None if scales.zeros is None else scales.zeros[part], factor, chosen
    )
    part = slice(None) if whole else slice(0, CHECKED)
    run(part)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    codes, fast = timed(lambda: run(slice(None)))
    peak = torch.cuda.max_memory_allocated() - held
    with torch_only():
        want, slow = timed(lambda: run(part), 1)
    codes = codes[part]
    here = Scales(scales.scales[part], None if scales.zeros is None else scales.zeros[part], scales.global_scale)
    before, after = (loss(decoded(grid, c, here) - W[part], stats) for c in (want, codes))
    same = float((codes == want).float().mean())
    return row("gptq", model, name, grid, slow if whole else None, fast, same, after / before - 1) | {"peak": peak}


def row(what: str, model: str, name: str, grid: str, slow: Any, fast: float, same: Any, drift: Any) -> dict[str, Any]:
    say(f"{model} {name} {what} {grid}: {fast * 1e3:.2f} ms")
    return {"what": what, "model": model, "linears": name, "grid": grid, "before": slow, "now": fast, "same": same,
            "loss": drift}  # fmt: skip


def awq_row(name: str, W: torch.Tensor, stats: Stats, grid: str = "int4_asym") -> dict[str, Any]:
    """One point of AWQ's search: as halfbyte.algo.awq does it, and as one kernel and a bfloat16 product."""
    from halfbyte.algo.kernels.scales import scaled_errors

    assert stats.gram_II is not None
    s = awq.normalised(stats.second_moment_I.sqrt() ** 0.5)
    H = stats.gram_II.bfloat16()
    view, h = in_groups(W, stats.second_moment_I / s.square(), 128)
    ratios = torch.linspace(0.8, 1.0, 3).tolist()

    def point() -> float:
        return _trace(scaled_errors(grid, view, h, s, torch.bfloat16, ratios=ratios), H)

    point()
    fast_loss, fast = timed(point)
    awq.scaled_loss(W[:CHECKED], s, stats, get_grid(grid), 128)
    slow_loss, slow = timed(lambda: awq.scaled_loss(W, s, stats, get_grid(grid), 128), 1)
    return row("awq point", "8B", name, grid, slow, fast, None, fast_loss / slow_loss - 1)


def _trace(E: torch.Tensor, H: torch.Tensor) -> float:
    """tr(E H E^T) from bfloat16 products, a slice of rows at a time, summed in float32 and above."""
    parts = [(torch.mm(e, H, out_dtype=torch.float32) * e).sum(1).sum(dtype=torch.float64) for e in E.split(4096)]
    return float(torch.stack(parts).sum())


def tf32_row(name: str, W: torch.Tensor, stats: Stats, scales: Scales, factor: Any) -> dict[str, Any]:
    """GPTQ with its trailing products in TF32, against float32: is the precision needed?"""
    chosen = get_grid("int4_sym")
    run = lambda: gptq(W, scales.effective, None, factor, chosen)  # noqa: E731
    want, slow = timed(run, 2)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        got, fast = timed(run, 2)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    before, after = (loss(decoded("int4_sym", c, scales) - W, stats) for c in (want, got))
    same = float((got == want).float().mean())
    return row("gptq tf32", "8B", name, "int4_sym", slow, fast, same, after / before - 1)


def factor_row(model: str, stats: Stats) -> tuple[Any, dict[str, Any]]:
    assert stats.gram_II is not None
    factor, seconds = timed(lambda: factorize(stats.gram_II, 0.05), 2)
    return factor, row("factorize", model, f"{len(factor.feedback)}", "", None, seconds, None, None)


def sweep(W: torch.Tensor, scales: Scales, factor: Any) -> None:
    """The column kernel's programs, in other sizes."""
    from halfbyte.algo.kernels.columns import round_columns

    def run(rows: int, warps: int) -> torch.Tensor:
        return round_columns(W, scales.effective, None, factor.feedback, factor.order, "int4_sym", rows, warps)

    for rows, warps in ((2, 1), (4, 1), (8, 1), (8, 2), (16, 1), (16, 2), (16, 4), (32, 4)):
        run(rows, warps)
        seconds = timed(partial(run, rows, warps))[1]
        say(f"{tuple(W.shape)}: {rows} rows, {warps} warps: {seconds * 1e3:.2f} ms")


def measure(wide: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for model, shapes in (("SmolLM2", SMALL), ("8B", LARGE)):
        known: dict[int, tuple[Stats, Any]] = {}
        for name, shape in shapes.items():
            if shape[1] not in known:
                known.clear()
                stats = inputs(shape[1])
                factor, one = factor_row(model, stats)
                rows.append(one)
                known[shape[1]] = (stats, factor)
            stats, factor = known[shape[1]]
            W = weights(shape)
            for grid in GRIDS:
                scales, one = fit_row(model, name, W, stats, grid)
                rows.append(one)
                rows.append(gptq_row(model, name, W, stats, grid, scales, factor, grid == "int4_sym"))
                if grid == "int4_sym" and model == "8B":
                    rows.append(tf32_row(name, W, stats, scales, factor))
                    if wide:
                        sweep(W, scales, factor)
            if model == "8B":
                rows.append(awq_row(name, W, stats))
            del W
            torch.cuda.empty_cache()
    return rows


def cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def table(rows: list[dict[str, Any]]) -> str:
    head = ["model", "linears", "what", "grid", "before ms", "now ms", "times", "same %", "loss"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|---" + "|---:" * 5 + "|"]
    for r in rows:
        slow, fast, same = r["before"], r["now"], r["same"]
        cells = [r["model"], r["linears"], r["what"], r["grid"]]
        cells += [cell(slow and slow * 1e3, ",.1f"), cell(fast * 1e3, ",.2f"), cell(slow and slow / fast, ",.1f")]
        cells += [cell(same and same * 100, ".3f"), cell(r["loss"], "+.1e")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def wrong(rows: list[dict[str, Any]]) -> list[str]:
    """What differs by more than ties explain."""
    found = []
    for r in rows:
        least = LEAST_SAME.get(r["what"])
        if least is not None and (r["same"] < least or abs(r["loss"]) > MOST_LOSS):
            where = f"{r['model']} {r['linears']} {r['what']} {r['grid']}"
            found.append(f"{where}: {r['same']:.3%} same, loss {r['loss']:+.1e}")
    return found


def block_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of an 8B block on int4_sym: four fits, four column loops, four factors (of three the time of one)."""
    ours = [r for r in rows if r["model"] == "8B" and r["grid"] in ("", "int4_sym")]
    total = {what: sum(r["now"] for r in ours if r["what"] == what) for what in ("factorize", "fit", "gptq")}
    total["factorize"] += 2 * min(r["now"] for r in ours if r["what"] == "factorize")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--sweep", action="store_true", help="try the column kernel with other programs")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no GPU here")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    started = time.perf_counter()
    if not kernels.usable(torch.empty(1, device=DEVICE)):
        sys.exit("error: Triton does not run here")
    rows = measure(arguments.sweep)
    total = block_of(rows)
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "seconds": time.perf_counter() - started}
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, "block_8b": total, "rows": rows}, indent=1))
    import triton

    print(f"{facts['gpu']}, torch {facts['torch']}, triton {triton.__version__}, {facts['seconds']:.0f} s")
    print(table(rows))
    parts = ", ".join(f"{what} {seconds * 1e3:.0f} ms" for what, seconds in total.items())
    print(f"An 8B block, GPTQ g128 int4_sym, four factors: {sum(total.values()) * 1e3:.0f} ms ({parts})")
    problems = wrong(rows)
    print("\n".join(problems) if problems else "all as torch has it")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
