"""Which language a text is in, told by its script and, in Latin script, by its commonest words.

A guess for filtering, not a classifier: short texts, tables and source code stay undetermined, and undetermined text
is kept wherever its script is one of a wanted language.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

from halfbyte.calibration.text import words

SAMPLE = 1000
"""Characters looked at."""
_LEAST_WORDS = 8
_LEAST_SHARE, _MARGIN = 0.08, 1.25
"""A language is told where this share of the words are its common ones, by this factor more than the next one's."""

_COMMON = {
    "en": "the of and to in is that it was for with as on are this be have not or from at by you he they which an",
    "de": "der die das und ist nicht ein eine zu den mit sich auf für dem von im auch es wie wird oder ich aus bei",
    "fr": "le la les des et est une dans pour que qui pas sur du au avec il elle ce sont par plus nous vous aux cette",
    "es": "el la los las de que y en una es por con para del se no al lo como más pero sus está este su ha son",
    "it": "il di che la e un una per non è con del della sono gli le si nel anche da dei come alla più ha questo lo",
    "pt": "o de que e a do da em um uma para com não os as no na se mais por dos foi ao como mas ele são das",
    "nl": "de het een van en is dat niet op te zijn met voor in die aan er ook om maar als bij naar wordt door ik",
    "sv": "och att det som en på är av för med den till inte har om ett jag men var sig från så kan vi",
    "da": "og at det som en på er af for med den til ikke har om et jeg men var sig fra så kan vi de",
    "pl": "i w nie na się z że do to jest jak o co po za od ale czy jego przez są dla który tak być",
    "cs": "a v se na že je s z do to i o k ve jako za by po ale pro jsou od které byl jeho být",
    "ro": "și de în la a cu nu că o pe este un din să care pentru mai se sau fost sunt prin ca",
    "fi": "ja on ei että oli se hän mutta ovat kuin myös joka tai niin kun jos sen ole mitä vain",
    "tr": "ve bir bu için ile de da olarak çok daha olan gibi ne kadar ama en var değil sonra o",
    "hu": "a az és hogy nem is egy meg volt ez van csak de már azt mint kell még vagy ki",
    "vi": "và của là có được cho trong một không với các người những đã này để khi từ đến ở",
    "id": "yang dan di dengan untuk dari pada ini itu tidak adalah dalam ke akan oleh juga atau ada sebagai bisa",
}
_COMMON_IN = {
    word: tuple(name for name, text in _COMMON.items() if word in text.split())
    for word in sorted({word for text in _COMMON.values() for word in text.split()})
}
_SCRIPTS = (
    ("latin", r"A-Za-z\u00aa-\u024f\u1e00-\u1eff"),
    ("cyrillic", r"\u0400-\u052f"),
    ("greek", r"\u0370-\u03ff\u1f00-\u1fff"),
    ("arabic", r"\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufeff"),
    ("hebrew", r"\u0590-\u05ff"),
    ("devanagari", r"\u0900-\u097f"),
    ("bengali", r"\u0980-\u09ff"),
    ("tamil", r"\u0b80-\u0bff"),
    ("thai", r"\u0e00-\u0e7f"),
    ("hangul", r"\u1100-\u11ff\uac00-\ud7af"),
    ("kana", r"\u3040-\u30ff"),
    ("han", r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"),
)
_RANGES = [(name, re.compile(f"[{ranges}]")) for name, ranges in _SCRIPTS]
_OF_SCRIPT = {
    "greek": "el", "hebrew": "he", "devanagari": "hi", "bengali": "bn", "tamil": "ta", "thai": "th", "hangul": "ko",
    "kana": "ja", "han": "zh",
}  # fmt: skip
LANGUAGES = tuple(sorted({*_COMMON, *_OF_SCRIPT.values(), "ru", "uk", "ar", "fa"}))
"""What can be told, as ISO 639-1 codes."""


def is_in(text: str, languages: Collection[str]) -> bool:
    """Whether a text is in one of `languages` (codes of LANGUAGES), or cannot be told from one that is."""
    sample = text[:SAMPLE]
    if len(sample.encode("ascii", "ignore")) * 4 > len(sample) * 3:
        return _is_latin(sample, languages)
    counts = Counter({name: len(pattern.findall(sample)) for name, pattern in _RANGES})
    script, most = counts.most_common(1)[0]
    if not most:
        return True
    if script == "latin":
        return _is_latin(sample, languages)
    return _of_script(script, counts, sample) in languages


def _of_script(script: str, counts: Counter[str], sample: str) -> str:
    letters = counts.total()
    if script in ("han", "kana"):
        return "ja" if counts["kana"] * 10 > counts["han"] else "zh"
    if script == "cyrillic":
        return "uk" if len(re.findall("[іїєґІЇЄҐ]", sample)) * 50 > letters else "ru"
    if script == "arabic":
        return "fa" if len(re.findall("[پچژگی]", sample)) * 50 > letters else "ar"
    return _OF_SCRIPT[script]


def _is_latin(sample: str, languages: Collection[str]) -> bool:
    """False where a language that is not wanted is told by its common words, or none that is uses Latin letters."""
    found = words(sample)
    if not found or all(word.isdigit() for word in found):
        return True
    asked = [name for name in languages if name in _COMMON]
    if not asked or len(found) < _LEAST_WORDS:
        return bool(asked)
    hits = Counter(name for word in found for name in _COMMON_IN.get(word, ()))
    mine = max(hits[name] for name in asked)
    other = max((count for name, count in hits.items() if name not in asked), default=0)
    return other < _LEAST_SHARE * len(found) or other < _MARGIN * mine
