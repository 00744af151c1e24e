"""Calibration text: from files or from the model itself, cut into token sequences, kept with a manifest."""

from halfbyte.calibration.build import build
from halfbyte.calibration.selfgen import SelfGenerated, generate
from halfbyte.calibration.sources import Document, describe_files, read_documents
from halfbyte.calibration.store import CalibrationSet
from halfbyte.calibration.tokens import leading_special, text_ids, tokenizer_sha256

__all__ = [
    "CalibrationSet",
    "Document",
    "SelfGenerated",
    "build",
    "describe_files",
    "generate",
    "leading_special",
    "read_documents",
    "text_ids",
    "tokenizer_sha256",
]
