"""GPTQ: round one column at a time and let the columns not yet rounded make up for the error.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ", ICLR 2023 (arXiv 2210.17323), after OBQ. A linear layer's output error
over the calibration inputs is tr(E H E^T) with E = W - W_hat and H = E[x x^T]. If column j is rounded to q_j, the best
change of the columns F after it is

    W_F  -=  (w_j - q_j) / [H_F^-1]_jj  *  [H_F^-1]_jF

The same codes come without an inverse (Chee, Cai, Kuleshov, De Sa: "QuIP", NeurIPS 2023, arXiv 2307.13304, theorem 6):
with H = B D B^T, B unit upper triangular and D diagonal, the errors e_j = w_j - q_j of the weights as they were are fed
forward,

    q_k  =  round(w_k + sum_{j<k} e_j B_jk)

which takes one Cholesky factorisation: nothing is inverted, and nothing is lost in doing so. Feedback is applied at
once inside a block of `BLOCK` columns and as one matrix product to the rest.

Order. Columns are visited by falling H_jj (act-order), so that the inputs that matter most are rounded while the most
columns are left to compensate. The groups and their scales are fixed beforehand in the original order (static groups):
the file needs no g_idx, which vLLM would ignore.

Legend: O = out, I = in, W_OI the weight, H_II the Hessian, B_II its factor, s_OI the scale of each column's group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.algo.grid import Grid
from halfbyte.algo.kernels import usable

BLOCK = 128
WIDE = 16384
"""A Hessian of more columns is factorised in its own place on a CPU: of one of 28,672 there are three else, 10 GB."""
LIMIT = 1e36
"""Damping that float32 no longer holds beside a Hessian."""


@dataclass(frozen=True)
class Factor:
    """What the column loop needs of H, made once for a group of linears: B (float32 [I, I], permuted), the order
    (int64 [I], or None), and the damping that was needed."""

    feedback: torch.Tensor
    order: torch.Tensor | None
    damp: float


def factorize(H_II: torch.Tensor, damp: float, act_order: bool = True) -> Factor:
    """Unit upper B with H + damp * mean(diag H) * I = B D B^T, columns ordered by falling diagonal.

    A dead input (H_jj = 0) gets H_jj = 1: its weights are rounded and nothing compensates. Damping doubles
    from `damp` until the factorisation succeeds; the Factor says what it took. Raises ValueError for a Hessian
    that is not finite or that no damping mends.
    """
    diagonal = H_II.diagonal().float()
    if not bool(torch.isfinite(diagonal).all()):
        raise ValueError("the Hessian is not finite")
    dead = diagonal <= 0
    diagonal = torch.where(dead, 1.0, diagonal)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    if order is not None:
        diagonal, dead = diagonal[order], dead[order]
    mean = 1.0 if bool(dead.all()) else float(diagonal[~dead].mean())
    reverse = (torch.arange(len(H_II), device=H_II.device) if order is None else order).flip(0)
    diagonal, dead = diagonal.flip(0), dead.flip(0)
    in_place = len(H_II) > WIDE and not H_II.is_cuda
    H: torch.Tensor | None = None
    share = damp
    while share * mean < LIMIT:
        if H is None or in_place:
            H = H_II[reverse[:, None], reverse].float()
            if bool(dead.any()):
                H.masked_fill_(dead | dead[:, None], 0)
        H.diagonal().copy_(diagonal + share * mean)
        feedback = _unit_upper(H, in_place)
        if feedback is not None:
            return Factor(feedback, order, share)
        if share == damp and not _finite(H_II):
            raise ValueError("the Hessian is not finite")
        share = share * 2 or 1e-3
    raise ValueError("no damping makes the Hessian positive definite in float32")


def _unit_upper(H: torch.Tensor, in_place: bool) -> torch.Tensor | None:
    """Unit upper B with J H J = B D B^T, J the reversal of the order; None where float32 finds H not positive definite.

    chol(H) = L gives J H J = (J L J)(J L J)^T with J L J upper; its columns are divided by its diagonal. `in_place`:
    in H's own memory, for matrices of which there is room for few; H is used up, also where there is no B.
    """
    if in_place:  # LAPACK counts columns first: what it finds in H^T as the upper factor is L in H
        L, info = H, torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(H.T, upper=True, out=(H.T, info))
    else:
        L, info = torch.linalg.cholesky_ex(H)
    diagonal = L.diagonal().flip(0).clone()
    if int(info) != 0 or not bool((torch.isfinite(diagonal) & (diagonal > 0)).all()):
        return None
    upper = _reverse_(L).triu_() if in_place else L.flip(0, 1).contiguous()
    return upper.div_(diagonal)


def _reverse_(matrix: torch.Tensor, step: int = 1 << 22) -> torch.Tensor:
    """J M J of a contiguous square M in its place: its numbers in reverse."""
    flat = matrix.view(-1)
    half, size = len(flat) // 2, len(flat)
    for first in range(0, half, step):
        last = min(first + step, half)
        front, back = flat[first:last], flat[size - last : size - first]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)
    return matrix


def _finite(matrix: torch.Tensor, rows: int = 256) -> bool:
    """Whether all of it is; some rows at a time, which takes little memory."""
    return all(bool(torch.isfinite(some).all()) for some in matrix.split(rows))


def gptq(
    W_OI: torch.Tensor,
    scale_OI: torch.Tensor,
    zero_OI: torch.Tensor | None,
    factor: Factor,
    grid: Grid,
    block: int = BLOCK,
) -> torch.Tensor:
    """Codes (float32-valued 0..15, [O, I]) for W under fixed scales and zeros: [O, G], or [O, I] spread by group."""
    order, B = factor.order, factor.feedback
    if block == BLOCK and usable(W_OI):
        from halfbyte.algo.kernels.columns import round_columns

        return round_columns(W_OI, scale_OI, zero_OI, B, order, grid.name).float()
    if scale_OI.shape != W_OI.shape:
        group = W_OI.shape[1] // scale_OI.shape[1]
        scale_OI = scale_OI.repeat_interleave(group, 1)
        zero_OI = None if zero_OI is None else zero_OI.repeat_interleave(group, 1)
    W = (W_OI.float() if order is None else W_OI.float()[:, order]).T.contiguous()
    S = (scale_OI if order is None else scale_OI[:, order]).T.contiguous()
    Z = None if zero_OI is None else (zero_OI if order is None else zero_OI[:, order]).T.contiguous()
    width = W.shape[0]
    X = W.clone()
    for first in range(0, width, block):
        last = min(first + block, width)
        errors = torch.empty_like(W[first:last])
        for j in range(first, last):
            X[j] /= S[j]
            z = None if Z is None else Z[j]
            e = torch.addcmul(W[j], grid.snap(X[j], z), S[j], value=-1)
            errors[j - first] = e
            if j + 1 < last:
                X[j + 1 : last].addr_(B[j, j + 1 : last], e)
        if last < width:
            X[last:].addmm_(B[first:last, last:].T, errors)
    codes = grid.encode(X, Z).T
    if order is None:
        return codes.contiguous()
    out = torch.empty_like(codes, memory_format=torch.contiguous_format)
    out[:, order] = codes
    return out
