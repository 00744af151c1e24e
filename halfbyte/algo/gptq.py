"""GPTQ: round one column at a time and let the columns not yet rounded make up for the error.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ", ICLR 2023 (arXiv 2210.17323), after OBQ. A linear layer's output error
over the calibration inputs is tr(E H E^T) with E = W - W_hat and H = E[x x^T]. If column j is rounded to q_j, the best
change of the columns F after it is

    W_F  -=  (w_j - q_j) / [H_F^-1]_jj  *  [H_F^-1]_jF

and all the inverses H_F^-1 that are needed are rows of one upper triangular factor, H^-1 = U^T U:

    err_j = (w_j - q_j) / U_jj,     W_{:,j+1:} -= err_j  U_{j,j+1:}

Updates are applied at once inside a block of `BLOCK` columns and as one matrix product to the rest.

Order. Columns are visited by falling H_jj (act-order), so that the inputs that matter most are rounded while the most
columns are left to compensate. The groups and their scales are fixed beforehand in the original order (static groups):
the file needs no g_idx, which vLLM would ignore.

Legend: O = out, I = in, W_OI the weight, H_II the Hessian, U_II its factor, s_OI the scale of each column's group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.algo.grid import Grid
from halfbyte.algo.kernels import usable

BLOCK = 128
WIDE = 16384
"""A Hessian of more columns is factorised in its own place on a CPU: of one of 28,672 there are four else, 13 GB."""
LIMIT = 1e36
"""Damping that float32 no longer holds beside a Hessian."""


@dataclass(frozen=True)
class Factor:
    """What the column loop needs of H, made once for a group of linears: U (float32 [I, I], permuted), the order
    (int64 [I], or None), and the damping that was needed."""

    upper: torch.Tensor
    order: torch.Tensor | None
    damp: float


def factorize(H_II: torch.Tensor, damp: float, act_order: bool = True) -> Factor:
    """Upper U with (H + damp * mean(diag H) * I)^-1 = U^T U, columns ordered by falling diagonal.

    A dead input (H_jj = 0) gets H_jj = 1: its weights are rounded and nothing compensates. Damping doubles
    from `damp` until the factorisation succeeds; the Factor says what it took. Raises ValueError for a Hessian
    that is not finite or that no damping mends.
    """
    H = H_II.float()
    if not _finite(H):
        raise ValueError("the Hessian is not finite")
    diagonal = H.diagonal()
    dead = diagonal <= 0
    diagonal = torch.where(dead, 1.0, diagonal)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    if order is not None:
        diagonal, dead = diagonal[order], dead[order]
    mean = 1.0 if bool(dead.all()) else float(diagonal[~dead].mean())
    reverse = (torch.arange(len(H), device=H.device) if order is None else order).flip(0)
    diagonal, dead = diagonal.flip(0), dead.flip(0)
    in_place = len(H) > WIDE and not H.is_cuda
    arranged: torch.Tensor | None = None
    share = damp
    while share * mean < LIMIT:
        if arranged is None or in_place:
            arranged = H[reverse[:, None], reverse]
            if bool(dead.any()):
                arranged.masked_fill_(dead | dead[:, None], 0)
        arranged.diagonal().copy_(diagonal + share * mean)
        upper = _inverse_factor_(arranged) if in_place else _inverse_factor(arranged)
        if upper is not None:
            return Factor(upper, order, share)
        share = share * 2 or 1e-3
    raise ValueError("no damping makes the Hessian positive definite in float32")


def _inverse_factor(H: torch.Tensor) -> torch.Tensor | None:
    """Upper U with (J H J)^-1 = U^T U, J the reversal of the order; None where float32 finds H not positive definite.

    chol(H) = L gives J H J = (J L J)(J L J)^T with J L J upper, so U = (J L J)^-1 = J L^-1 J: one Cholesky and one
    triangular inverse instead of two factorisations and an inverse.
    """
    L, info = torch.linalg.cholesky_ex(H)
    if int(info) != 0:
        return None
    if L.is_cuda:
        inverse_lower_(L)
    else:
        L = torch.linalg.solve_triangular(L, torch.eye(len(H), device=H.device), upper=False)
    upper = L.flip(0, 1).contiguous()
    return upper if _finite(upper) and bool((upper.diagonal() > 0).all()) else None


def _inverse_factor_(H: torch.Tensor) -> torch.Tensor | None:
    """The same in H's own place, for matrices of which memory holds few: H is used up, also where there is no U.

    LAPACK counts columns first: what it finds in H^T as the upper factor is L in H.
    """
    A, info = H.T, torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(A, upper=True, out=(A, info))
    if int(info) != 0:
        return None
    upper = _reverse_(inverse_lower_(H, panel=1024))
    return upper if _finite(upper) and bool((upper.diagonal() > 0).all()) else None


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


def inverse_lower_(L: torch.Tensor, panel: int = 512) -> torch.Tensor:
    """Invert a lower triangular matrix in its place by products of panels of rows: on a GPU faster than solving with
    the identity, and in a third of the memory.

        (L^-1)_{i,<i} = -(L_ii)^-1 L_{i,<i} (L^-1)_{<i,<i}
    """
    L.tril_()
    for first in range(0, len(L), panel):
        rows = slice(first, first + panel)
        corner = L[rows, rows]
        eye = torch.eye(len(corner), dtype=L.dtype, device=L.device)
        inverse = torch.linalg.solve_triangular(corner, eye, upper=False)
        L[rows, :first] = inverse @ (L[rows, :first] @ L[:first, :first]).neg_()
        L[rows, rows] = inverse
    return L


def gptq(
    W_OI: torch.Tensor,
    scale_OI: torch.Tensor,
    zero_OI: torch.Tensor | None,
    factor: Factor,
    grid: Grid,
    block: int = BLOCK,
) -> torch.Tensor:
    """Codes (float32-valued 0..15, [O, I]) for W under fixed scales and zeros: [O, G], or [O, I] spread by group."""
    order, U = factor.order, factor.upper
    if block == BLOCK and usable(W_OI):
        from halfbyte.algo.kernels.columns import round_columns

        return round_columns(W_OI, scale_OI, zero_OI, U, order, grid.name).float()
    if scale_OI.shape != W_OI.shape:
        group = W_OI.shape[1] // scale_OI.shape[1]
        scale_OI = scale_OI.repeat_interleave(group, 1)
        zero_OI = None if zero_OI is None else zero_OI.repeat_interleave(group, 1)
    W = (W_OI.float() if order is None else W_OI.float()[:, order]).T.clone(memory_format=torch.contiguous_format)
    S = (scale_OI if order is None else scale_OI[:, order]).T.contiguous()
    Z = None if zero_OI is None else (zero_OI if order is None else zero_OI[:, order]).T.contiguous()
    width = W.shape[0]
    X = torch.empty_like(W)
    diagonal = U.diagonal().tolist()
    for first in range(0, width, block):
        last = min(first + block, width)
        errors = torch.empty_like(W[first:last])
        for j in range(first, last):
            x = W[j] / S[j]
            X[j] = x
            z = None if Z is None else Z[j]
            e = grid.snap(x, z).mul_(S[j]).sub_(W[j]).mul_(-1 / diagonal[j])
            errors[j - first] = e
            if j + 1 < last:
                W[j + 1 : last].addr_(U[j, j + 1 : last], e, alpha=-1)
        if last < width:
            W[last:].addmm_(U[first:last, last:].T, errors, alpha=-1)
    codes = grid.encode(X, Z).T
    if order is None:
        return codes.contiguous()
    out = torch.empty_like(codes, memory_format=torch.contiguous_format)
    out[:, order] = codes
    return out
