"""Calibration text: from sources, filtered and weighted, or from the model itself; token sequences with a manifest."""

from halfbyte.calibration.build import build
from halfbyte.calibration.make import make_set
from halfbyte.calibration.records import Document
from halfbyte.calibration.selfgen import SelfGenerated, generate
from halfbyte.calibration.sources import describe_files, read_documents
from halfbyte.calibration.spec import SetSpec, Source, parse_source, spec_from_mapping, spec_from_words
from halfbyte.calibration.store import CalibrationSet
from halfbyte.calibration.tokens import leading_special, text_ids, tokenizer_sha256

__all__ = [
    "CalibrationSet",
    "Document",
    "SelfGenerated",
    "SetSpec",
    "Source",
    "build",
    "describe_files",
    "generate",
    "leading_special",
    "make_set",
    "parse_source",
    "read_documents",
    "spec_from_mapping",
    "spec_from_words",
    "text_ids",
    "tokenizer_sha256",
]
