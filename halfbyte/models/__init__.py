"""What a checkpoint holds and what a decoder block looks like, per model family."""

from halfbyte.models.checkpoint import Checkpoint, TensorInfo
from halfbyte.models.experts import Expert, Experts, refuse, unfuse
from halfbyte.models.family import FAMILIES, Family, Fold, Mixture, family_of
from halfbyte.models.parameters import set_parameter
from halfbyte.models.source import cache_dir, hub_id, resolve_model

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "Expert",
    "Experts",
    "Family",
    "Fold",
    "Mixture",
    "TensorInfo",
    "cache_dir",
    "family_of",
    "hub_id",
    "refuse",
    "resolve_model",
    "set_parameter",
    "unfuse",
]
