"""What a recipe makes of a model, before a weight is read: the choice of a recipe, layers, memory, speed, warnings."""

from halfbyte.plan.decision import Decision, choose
from halfbyte.plan.inventory import Footprint, footprints
from halfbyte.plan.layers import LinearPlan, assign, quantized
from halfbyte.plan.make import make_plan
from halfbyte.plan.memory import KVShape, memory_estimate
from halfbyte.plan.remote import open_for_plan
from halfbyte.plan.render import render_plan
from halfbyte.plan.rules import Reason
from halfbyte.plan.words import spell, title, variant_of

__all__ = [
    "Decision",
    "Footprint",
    "KVShape",
    "LinearPlan",
    "Reason",
    "assign",
    "choose",
    "footprints",
    "make_plan",
    "memory_estimate",
    "open_for_plan",
    "quantized",
    "render_plan",
    "spell",
    "title",
    "variant_of",
]
