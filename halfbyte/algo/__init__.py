"""The algorithms: torch in, torch out. What values a weight may take, how scales are fitted, how codes are chosen."""

from halfbyte.algo.awq import find_scale
from halfbyte.algo.gptq import Factor, factorize, gptq
from halfbyte.algo.grid import Grid, Scales, dequantize, get_grid
from halfbyte.algo.rtn import rtn
from halfbyte.algo.solve import Options, Solved, relative_error, solve_group
from halfbyte.algo.stats import Stats, output_error, product

__all__ = [
    "Factor",
    "Grid",
    "Options",
    "Scales",
    "Solved",
    "Stats",
    "dequantize",
    "factorize",
    "find_scale",
    "get_grid",
    "gptq",
    "output_error",
    "product",
    "relative_error",
    "rtn",
    "solve_group",
]
