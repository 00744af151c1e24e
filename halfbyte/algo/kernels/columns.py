"""GPTQ's column loop (halfbyte.algo.gptq) on a GPU.

Given the factor B, output channels do not see each other. A program takes `ROWS` of them through one block of columns:
its tile of weights, with what was fed forward to them, stays in registers; each column is picked out by a masked sum,
rounded, and its error spread over the columns after it, all in float32. A column that is done leaves its error in the
tile. What the block feeds to the rest is one product, as in the oracle.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl

from halfbyte.algo.kernels.rounding import code_of, snap

BLOCK = 128
ROWS, WARPS = 8, 1
"""Rows of a program and its warps: a warp that owns its rows needs no barrier between columns."""


@triton.jit
def _block(
    X, W, B, scales, zeros, group_of, errors, codes, total, W_step, B_step, S_step,
    GRID: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    live = rows < total
    inside = live[:, None] & (columns < COUNT)[None, :]
    at = rows.to(tl.int64)
    x = tl.load(X + at[:, None] * W_step + columns[None, :], mask=inside, other=0.0)
    chosen = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    b_row = B
    for j in range(COUNT):
        group = tl.load(group_of + j)
        s = tl.load(scales + at * S_step + group, mask=live, other=1.0)
        z = tl.load(zeros + at * S_step + group, mask=live, other=0.0) if GRID == "int4_asym" else 0.0
        w = tl.load(W + at * W_step + j, mask=live, other=0.0)
        b = tl.load(b_row + columns, mask=(columns > j) & (columns < COUNT), other=0.0)
        here = (columns == j)[None, :]
        value = snap(tl.div_rn(tl.sum(tl.where(here, x, 0.0), axis=1), s), z, GRID)
        e = w - value * s
        x = tl.where(here, e[:, None], x + e[:, None] * b[None, :])
        chosen = tl.where(here, code_of(value, z, GRID)[:, None], chosen)
        b_row += B_step
    tl.store(errors + at[:, None] * BLOCK + columns[None, :], x, mask=inside)
    tl.store(codes + at[:, None] * W_step + columns[None, :], chosen.to(tl.uint8), mask=inside)


def round_columns(
    W_OI: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    B: torch.Tensor,
    order: torch.Tensor | None,
    grid: str,
    rows: int = ROWS,
    warps: int = WARPS,
) -> torch.Tensor:
    """Codes, uint8 [O, I], of W (float, [O, I]) rounded column by column.

    scales, zeros   float32 [O, G], G dividing I: groups of contiguous columns in the file's order (or a column each)
    B, order        of the Factor: float32 [I, I], int64 [I] or None
    Rows are independent: linears and recipes with one B can be stacked along O, each row with its own scales.
    """
    total, width = W_OI.shape
    place = torch.arange(width, device=W_OI.device) if order is None else order
    W = W_OI.index_select(1, place).float()
    group_of = place.div(width // scales.shape[1], rounding_mode="floor").int()
    S, B = scales.float().contiguous(), B.contiguous()
    X = W.clone()
    Z = S if zeros is None else zeros.float().contiguous()
    errors = torch.empty(total, BLOCK, device=W.device)
    codes = torch.empty(total, width, dtype=torch.uint8, device=W.device)
    for first in range(0, width, BLOCK):
        last = min(first + BLOCK, width)
        with torch.cuda.device_of(W):
            _block[(triton.cdiv(total, rows),)](
                X[:, first:], W[:, first:], B[first:, first:], S, Z, group_of[first:], errors, codes[:, first:],
                total, width, width, S.shape[1],
                GRID=grid, COUNT=last - first, ROWS=rows, BLOCK=BLOCK, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
        if last < width:
            X[:, last:].addmm_(errors[:, : last - first], B[first:last, last:])
    if order is None:
        return codes
    return codes.index_select(1, torch.empty_like(order).scatter_(0, order, torch.arange(width, device=W.device)))
