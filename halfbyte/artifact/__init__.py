"""A 4-bit checkpoint on disk: written block by block, whole only with its manifest, checked, read back."""

from halfbyte.artifact.card import model_card
from halfbyte.artifact.check import check_artifact
from halfbyte.artifact.check_files import MANIFEST, refuse_damaged
from halfbyte.artifact.fake import load_fake_quantized
from halfbyte.artifact.manifest import read_manifest
from halfbyte.artifact.writer import ArtifactWriter, work_of

__all__ = [
    "MANIFEST",
    "ArtifactWriter",
    "check_artifact",
    "load_fake_quantized",
    "model_card",
    "read_manifest",
    "refuse_damaged",
    "work_of",
]
