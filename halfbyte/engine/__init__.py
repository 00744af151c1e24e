"""THE loop over decoder blocks: load, collect statistics, solve for every recipe, emit, hand the outputs on."""

from halfbyte.engine.block import BlockResult
from halfbyte.engine.loop import ALGORITHM_VERSION, Job, quantize_blocks, work_id
from halfbyte.engine.skeleton import Skeleton
from halfbyte.engine.tune import Block, Tuned, Tuner

__all__ = [
    "ALGORITHM_VERSION",
    "Block",
    "BlockResult",
    "Job",
    "Skeleton",
    "Tuned",
    "Tuner",
    "quantize_blocks",
    "work_id",
]
