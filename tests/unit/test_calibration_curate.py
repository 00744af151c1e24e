"""The curated set: filters, duplicates, weights, lengths, memory, and the same bytes in every process."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.calibration import make_set, spec_from_mapping
from halfbyte.calibration.fit import fit
from halfbyte.calibration.languages import is_in
from halfbyte.calibration.near import near_duplicates
from halfbyte.calibration.passages import join, split
from halfbyte.calibration.records import Document
from halfbyte.calibration.sample import Pool
from halfbyte.calibration.seen import Seen
from halfbyte.calibration.text import ngram_hashes, words
from halfbyte.errors import HalfbyteError
from tests.tiny import tiny_tokenizer

WORDS = [
    a + b for a in ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu") for b in ("lt", "rn", "sk", "mp", "x")
]


def prose(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def curated(sources: list[Any], **options: Any) -> Any:
    places = [{"path": str(source)} if isinstance(source, Path) else source for source in sources]
    spec = spec_from_mapping({"sources": places, "sequences": 16, "max_tokens": 128, **options}, "test")
    return make_set(tiny_tokenizer(), spec)


def steps(made: Any, source: int = 0) -> dict[str, int]:
    return {row["step"]: row["documents"] for row in made.manifest["sources"][source]["steps"]}


def decoded(made: Any) -> list[str]:
    return [tiny_tokenizer().decode(sequence.tolist()) for sequence in made.sequences]


def test_duplicates_are_left_out_and_counted(tmp_path: Path) -> None:
    texts = [prose(i, 60) for i in range(40)]
    near = [text + " " + prose(900 + i, 2) for i, text in enumerate(texts[:10])]
    exact = ["  ".join(text.split(" ")) + "\n" for text in texts[5:25]]
    made = curated([jsonl(tmp_path / "a.jsonl", texts + near + exact + ["too short"])])
    assert steps(made) == {
        "read": 71, "exact duplicates": 51, "joined": 51, "length": 50, "split": 50, "sampled": 50,
        "near duplicates": 40,
    }  # fmt: skip
    kept = curated([tmp_path / "a.jsonl"], near_duplicates=None)
    assert "near duplicates" not in steps(kept) and kept.manifest["filters"]["near_duplicates"] is None
    both = curated(
        [tmp_path / "a.jsonl", jsonl(tmp_path / "b.jsonl", texts[:5] + [prose(500 + i, 60) for i in range(30)])]
    )
    assert steps(both, 1)["exact duplicates"] == 30, "what the first source has is not taken from the second"


def test_paragraphs_that_repeat_are_left_out(tmp_path: Path) -> None:
    paragraphs = [prose(i, 25) for i in range(60)]
    (tmp_path / "a.txt").write_text("\n\n".join([*paragraphs, "}", *paragraphs, "}"]))
    made = curated([tmp_path / "a.txt"], sequences=8)
    assert steps(made)["read"] == 122 and steps(made)["exact duplicates"] == 62, "short ones may repeat"


def test_near_duplicates_by_their_share_of_shingles() -> None:
    base = prose(1, 400)
    little = base.replace(base[:200], prose(2, 30), 1)
    most = base[: len(base) * 7 // 10] + prose(3, 120)
    assert near_duplicates([base, prose(4, 400), little, base.upper() + "!", most, "", ""], 0.8) == [
        False, False, True, True, False, False, False,
    ]  # fmt: skip
    assert near_duplicates([base, most], 0.3) == [False, True]


def test_words_of_any_script() -> None:
    assert words("Don't STOP_now, 漢字かな Ünïcode 42") == [
        "don",
        "t",
        "stop",
        "now",
        "漢",
        "字",
        "か",
        "な",
        "ünïcode",
        "42",
    ]
    found = words("a b c d a b c")
    hashes = ngram_hashes(found, 3)
    assert len(hashes) == 5 and hashes[0] == hashes[4] and len(set(hashes.tolist())) == 4
    assert len(ngram_hashes(found, 8)) == 0
    assert int(ngram_hashes(["the", "cat"], 2)[0]) == 12723210772998992254, "the same on every machine"


SAMPLES = {
    "en": "The committee said that it would not be able to meet with the members of the board before the end of June.",
    "de": "Der Ausschuss hat mitgeteilt, dass er sich nicht vor dem Ende des Monats mit den Mitgliedern treffen wird.",
    "fr": "Le comité a déclaré que les membres du conseil ne seraient pas en mesure de se réunir avant la fin du mois.",
    "es": "El comité dijo que no podría reunirse con los miembros de la junta antes de que termine el mes de junio.",
    "it": "Il comitato ha detto che non sarebbe in grado di incontrare i membri prima della fine del mese.",
    "nl": "De commissie zei dat het niet mogelijk is om voor het einde van de maand met de leden te praten.",
    "ru": "Комитет заявил, что не сможет встретиться с членами совета до конца июня.",
    "uk": "Комітет заявив, що не зможе зустрітися з членами ради до кінця червня, і це їх засмутило.",
    "zh": "委员会表示，在六月底之前无法与董事会成员会面。",
    "ja": "委員会は、六月末までに理事会のメンバーと会うことができないと述べた。",
    "ko": "위원회는 6월 말 이전에 이사회 구성원과 만날 수 없다고 말했다.",
    "ar": "قالت اللجنة إنها لن تتمكن من الاجتماع مع أعضاء المجلس قبل نهاية الشهر.",
    "el": "Η επιτροπή δήλωσε ότι δεν θα μπορέσει να συναντηθεί με τα μέλη.",
}


@pytest.mark.parametrize("language", SAMPLES)
def test_languages_are_told_apart(language: str) -> None:
    for other, text in SAMPLES.items():
        assert is_in(text, [language]) == (other == language), other
    assert is_in(SAMPLES[language], ["en", "de", "fr", "es", "it", "nl", "ru", "uk", "zh", "ja", "ko", "ar", "el"])


def test_what_cannot_be_told_is_kept_in_its_script() -> None:
    code = "def f(x):\n    return [y ** 2 for y in range(x)]\n"
    assert is_in(code, ["en"]) and is_in("12, 34; 56", ["zh"]) and is_in("Hello", ["de"]) and not is_in(code, ["zh"])


def test_language_and_length_filters(tmp_path: Path) -> None:
    english = [SAMPLES["en"] + " " + prose(i, 20) + " and the " * 4 for i in range(40)]
    made = curated([jsonl(tmp_path / "a.jsonl", [*english, SAMPLES["de"], SAMPLES["zh"] * 3])], languages=["en"])
    assert (steps(made)["length"], steps(made)["language"]) == (42, 40)
    cut = curated([tmp_path / "a.jsonl"], min_chars=150, max_chars=10_000)
    assert steps(cut)["length"] == 40
    with pytest.raises(HalfbyteError, match=r"a.jsonl: nothing is left of its 42 documents \(40 by length, 2 by lang"):
        curated([tmp_path / "a.jsonl"], languages=["ja"], max_chars=130)


def test_running_text_is_joined_and_long_documents_are_split() -> None:
    running = [Document(f"{i}. {prose(i, 10)}\n\n", "a", continues=i > 0) for i in range(50)]
    joined = list(join([*running, Document("alone", "b")], 300))
    assert "".join(d.text for d in joined) == "".join(d.text for d in running) + "alone" and joined[-1].text == "alone"
    assert all(300 <= len(d.text) < 400 for d in joined[:-2])
    long = Document(joined[0].text * 50, "a", kind="instruction")
    parts = list(split(long, 500))
    assert "".join(d.text for d in parts) == long.text and max(len(d.text) for d in parts) <= 750
    assert all(d.text.endswith("\n\n") for d in parts) and [d.kind for d in parts[:2]] == ["instruction", "text"]
    assert [len(d.text) for d in split(Document("x" * 1000, "a"), 300)] == [300, 300, 400]


def test_a_pool_is_a_sample_that_knows_no_order() -> None:
    documents = [Document(prose(i, 80), "a") for i in range(400)]
    pools = [Pool(10_000, seed) for seed in (0, 0, 1)]
    for pool, order in zip(pools, (documents, documents[::-1] + documents[:99], documents)):
        for document in order:
            pool.offer(document)
    first, again, other = ([c.document for c in pool.candidates()] for pool in pools)
    assert first == again != other
    held = sum(len(d.text) for d in first)
    assert 10_000 <= held < 11_000 and held - len(first[-1].text) < 10_000
    places = [documents.index(d) for d in first + other]
    assert min(places) < 100 and max(places) >= 300, "from the whole file"


def test_seen_is_exact_across_its_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.calibration.seen._RECENT", 10)
    seen, known = Seen(), set()
    values = [random.Random(i).getrandbits(64) for i in range(150)] * 2 + [0, 2**64 - 1, 0]
    for value in values:
        assert seen.add(value) == (value not in known)
        known.add(value)
    assert len(seen) == len(known) == 152


def pool_of(*lengths: int) -> list[np.ndarray]:
    starts = np.cumsum([0, *lengths])
    return [np.arange(a, a + n) for a, n in zip(starts, lengths)]


def test_fit_gives_lengths_and_shares() -> None:
    pools = [pool_of(*[90] * 30), pool_of(*[30, 200, 60] * 10), pool_of(*[17] * 99)]
    lengths = [100] * 8 + [20, 40, 60, 80] * 2
    pieces = fit(pools, [0.5, 0.4, 0.1], lengths, 100)
    given = [sum(len(p.ids) for p in pieces if p.source == i) for i in range(3)]
    assert abs(sum(given) - 1200) < 100 and [round(n / 1200, 1) for n in given] == [0.5, 0.4, 0.1]
    assert [len(p.ids) for p in pieces if p.source == 1].count(100) == 3, "long documents for long lengths"
    for source in range(3):
        used = np.concatenate([p.ids for p in pieces if p.source == source])
        assert len(used) == len(set(used.tolist())), "no token twice"
    for piece in pieces:
        assert np.array_equal(piece.ids, np.arange(piece.ids[0], piece.ids[0] + len(piece.ids)))


def test_a_short_source_gives_all_and_others_fill_its_place() -> None:
    pieces = fit([pool_of(50, 50), pool_of(*[500] * 9)], [0.5, 0.5], [100] * 10, 100)
    assert sum(len(p.ids) for p in pieces if p.source == 0) == 100 and sum(len(p.ids) for p in pieces) == 1000
    with pytest.raises(HalfbyteError, match=r"gives 4,600, 5,000 are asked"):
        fit([pool_of(50, 50), pool_of(*[500] * 9)], [0.5, 0.5], [100] * 50, 100)


def test_weights_and_lengths_reach_the_manifest(tmp_path: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", [prose(i, 60) for i in range(80)])
    b = jsonl(tmp_path / "b.jsonl", [prose(1000 + i, 6 + i % 30) for i in range(300)])
    made = curated([{"path": str(a), "weight": 3}, {"path": str(b), "weight": 1, "in_domain": True}], sequences=32)
    rows = made.manifest["sources"]
    assert [row["weight"] for row in rows] == [0.75, 0.25] and [row["weight_given"] for row in rows] == [3, 1]
    assert [round(row["share"], 1) for row in rows] == [0.7, 0.3] or abs(rows[0]["share"] - 0.75) < 0.03
    assert sum(row["tokens"] for row in rows) == made.tokens and sum(r["sequences"] for r in rows) == len(
        made.sequences
    )
    assert rows[1]["in_domain"] and [row["kind"] for row in rows] == ["jsonl", "jsonl"]
    assert made.manifest["longest"] == 128 and len(made.manifest["histogram"]) >= 3, "short, middling and long"
    assert made.manifest["coverage"]["in_domain"] > 0.99


def test_without_enough_text_both_numbers_are_told(tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match=r"the text gives [\d,]+, [\d,]+ are asked for"):
        curated([jsonl(tmp_path / "a.jsonl", [prose(i, 60) for i in range(3)])])


def test_the_order_of_records_does_not_matter_and_the_seed_does(tmp_path: Path) -> None:
    texts = [prose(i, 60) for i in range(300)]
    made = curated([jsonl(tmp_path / "a.jsonl", texts)])
    assert made.sha256 == curated([jsonl(tmp_path / "b.jsonl", texts[::-1])]).sha256
    assert made.sha256 != curated([tmp_path / "a.jsonl"], seed=1).sha256
    assert steps(made)["sampled"] < 300


SCRIPT = """
import sys
from pathlib import Path
from halfbyte.calibration import make_set, spec_from_words
from tests.tiny import tiny_tokenizer
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10  # MiB; exec resets it
directory, out = Path(sys.argv[1]), sys.argv[2]
words = [str(directory / "big.jsonl") + ":0.8", str(directory / "small.txt") + ":0.2:in-domain"]
tokenizer = tiny_tokenizer()
options = dict(sequences=4, max_tokens=1024, languages=["en"], held_out=[str(directory / "held.txt")])
make_set(tokenizer, spec_from_words([str(directory / "small.txt")], **{**options, "sequences": 2}))
before = peak()
made = make_set(tokenizer, spec_from_words(words, **options))
print(peak() - before)
made.save(out)
"""


def test_two_processes_make_the_same_bytes_of_a_file_that_they_do_not_hold(tmp_path: Path) -> None:
    pad = prose(0, 1500)
    with (tmp_path / "big.jsonl").open("w") as handle:
        for i in range(9_000):
            handle.write(json.dumps({"text": f"{prose(i, 8)} number {i} {pad}"}) + "\n")
    size = (tmp_path / "big.jsonl").stat().st_size >> 20
    (tmp_path / "small.txt").write_text("\n\n".join(prose(-i, 30) for i in range(50)))
    (tmp_path / "held.txt").write_text(prose(-7000, 500))
    runs = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(tmp_path / seed)]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        root = Path(__file__).resolve().parents[2]
        runs.append(subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True))
    grown = [int(run.communicate()[0]) for run in runs]
    assert size > 60 and max(grown) < 32, f"{grown} MiB more for a file of {size} MiB"
    for name in ("manifest.json", "tokens.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    assert manifest["sources"][0]["steps"][0]["documents"] == 9_000
