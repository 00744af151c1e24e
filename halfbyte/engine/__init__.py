"""THE loop over decoder blocks: load, collect statistics, solve for every recipe, emit, hand the outputs on."""

from halfbyte.engine.block import BlockResult
from halfbyte.engine.loop import ALGORITHM_VERSION, quantize_blocks, work_id
from halfbyte.engine.processes import Processes
from halfbyte.engine.rounding import Block, Rounder
from halfbyte.engine.skeleton import Skeleton
from halfbyte.engine.solving import Job
from halfbyte.engine.tune import Tuned, Tuner
from halfbyte.engine.workers import Errand, Here, Seat, Workers, as_done

__all__ = [
    "ALGORITHM_VERSION",
    "Block",
    "BlockResult",
    "Errand",
    "Here",
    "Job",
    "Processes",
    "Rounder",
    "Seat",
    "Skeleton",
    "Tuned",
    "Tuner",
    "Workers",
    "as_done",
    "quantize_blocks",
    "work_id",
]
