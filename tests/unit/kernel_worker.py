"""Functions that run Triton kernels, called in a process where Triton interprets them: TRITON_INTERPRET counts where it
is set before triton is imported. It stays out of the caller's process, whose own calls take the torch path."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch

SWITCH = "TRITON_INTERPRET"


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """call(function, *args, **kwargs): what a module's function returns there. What it changes in place is lost."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(torch.set_num_threads, 1).result()
            _restore(before)
            yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()
    finally:
        _restore(before)


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop(SWITCH, None)
    else:
        os.environ[SWITCH] = before


def round_columns(*args: Any, **kwargs: Any) -> torch.Tensor:
    from halfbyte.algo.kernels import columns

    return columns.round_columns(*args, **kwargs)


def fit_scales(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    from halfbyte.algo.kernels import scales

    return scales.fit_scales(*args, **kwargs)


def scaled_errors(*args: Any, **kwargs: Any) -> torch.Tensor:
    from halfbyte.algo.kernels import scales

    return scales.scaled_errors(*args, **kwargs)


def fit(grid: str, *args: Any) -> Any:
    """Grid.fit"""
    from halfbyte.algo import get_grid

    return get_grid(grid).fit(*args)
