"""What a recipe makes of a model, before a weight is read: layers, bytes, memory, the choice of a recipe, notices."""

from halfbyte.plan.decision import Decision, choose, title, variant_of
from halfbyte.plan.inventory import Footprint, footprints
from halfbyte.plan.layers import LinearPlan, assign, quantized
from halfbyte.plan.make import make_plan
from halfbyte.plan.memory import kv_bytes_per_token, memory_estimate
from halfbyte.plan.render import render_plan

__all__ = [
    "Decision",
    "Footprint",
    "LinearPlan",
    "assign",
    "choose",
    "footprints",
    "kv_bytes_per_token",
    "make_plan",
    "memory_estimate",
    "quantized",
    "render_plan",
    "title",
    "variant_of",
]
