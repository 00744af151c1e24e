"""Synthetic retrieval in long contexts, made by rule from a seed, to an exact number of tokens.

Four tasks, in the spirit of RULER (Hsieh et al., 2024), so scored that they mean something for small models too: the
answer is one of a few words, each of which begins with a token of its own, and a model is right when the right word's
token is the most likely of them. Guessing is right once in CANDIDATES times.

    needle      one sentence with the answer, at a depth, in filler
    needles     four such sentences, one of them asked for
    key_value   nothing but such sentences, one of them asked for
    variables   a variable set to the answer and handed on three times, beside another such chain, in filler
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from halfbyte.calibration import leading_special
from halfbyte.errors import HalfbyteError, UsageError

CANDIDATES = 16
HOPS = 4
NEEDLES = 4
DATA: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_name("haystack.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Words:
    """The words that answers are taken from. A prompt ends with `before`; `tokens[i]` then stands for `words[i]`."""

    words: list[str]
    tokens: list[int]
    before: list[int]


@dataclass(frozen=True)
class Item:
    """A prompt of length - 1 tokens, the token that is right, and where it comes from."""

    task: str
    length: int
    depth: float | None
    ids: list[int]
    answer: int


@dataclass(frozen=True)
class Story:
    """What a task asks: sentences at depths (0..1), what stands around them, the question, the right word."""

    facts: list[tuple[float, str]]
    filler: Iterator[str]
    question: str
    answer: str


def answer_words(tokenizer: Any, count: int = CANDIDATES) -> Words:
    """`count` words that differ in one token. Raises HalfbyteError when the tokenizer does not give so many."""
    encoded = {word: _ids(tokenizer, f" {word}") for word in DATA["words"]}
    for skipped in range(3):
        starts = Counter(tuple(ids[:skipped]) for ids in encoded.values() if len(ids) > skipped)
        if not starts:
            break
        before = starts.most_common(1)[0][0]
        first: dict[int, str] = {}
        for word, ids in encoded.items():
            if len(ids) > skipped and tuple(ids[:skipped]) == before:
                first.setdefault(ids[skipped], word)
        if len(first) >= count:
            tokens = list(first)[:count]
            return Words([first[token] for token in tokens], tokens, list(before))
    raise HalfbyteError(f"the tokenizer does not begin {count} of our words with tokens of their own: no retrieval")


def make_item(tokenizer: Any, words: Words, task: str, length: int, depth: float | None, seed: int) -> Item:
    """One prompt. The same arguments give the same tokens.

    length   tokens of prompt and answer
    depth    where the answer's sentence stands, 0..1, for tasks of DEEP; None else
    Raises UsageError when the length has no room for the task.
    """
    rng = random.Random(f"{seed}-{task}-{length}-{depth}")
    story = STORIES[task](rng, words.words, depth)
    head = leading_special(tokenizer) + _ids(tokenizer, "Read the notes and remember what they say.\n")
    tail = _ids(tokenizer, f"\n\n{story.question}") + words.before
    facts = [(at, _ids(tokenizer, sentence)) for at, sentence in sorted(story.facts)]
    room = length - 1 - len(head) - len(tail) - sum(len(ids) for _, ids in facts)
    if room < 0:
        raise UsageError(f"{length} tokens have no room for the task {task}: use --lengths {length - room} or more")
    body = _around(facts, _filler(tokenizer, story.filler, room), room)
    return Item(task, length, depth, head + body + tail, words.tokens[words.words.index(story.answer)])


def _around(facts: Sequence[tuple[float, list[int]]], filler: list[list[int]], room: int) -> list[int]:
    """Filler with each fact before the first sentence that begins at or behind its depth."""
    body: list[int] = []
    waiting, passed = list(facts), 0
    for sentence in filler:
        while waiting and passed >= waiting[0][0] * room:
            body += waiting.pop(0)[1]
        body += sentence
        passed += len(sentence)
    return body + [token for _, ids in waiting for token in ids]


def _filler(tokenizer: Any, sentences: Iterator[str], room: int) -> list[list[int]]:
    """Sentences of exactly `room` tokens together; the last loses its beginning to make it so."""
    found: list[list[int]] = []
    total = 0
    while total < room:
        found.append(_ids(tokenizer, next(sentences)))
        total += len(found[-1])
    if found:
        found[-1] = found[-1][total - room :]
    return found


def _needle(rng: random.Random, words: Sequence[str], depth: float | None) -> Story:
    city, answer = rng.choice(DATA["cities"]), rng.choice(words)
    return Story([(depth or 0.0, _secret(city, answer))], _chatter(rng), _asked(city), answer)


def _needles(rng: random.Random, words: Sequence[str], depth: float | None) -> Story:
    cities, answers = rng.sample(DATA["cities"], NEEDLES), rng.sample(list(words), NEEDLES)
    facts = [((i + rng.random()) / NEEDLES, _secret(*pair)) for i, pair in enumerate(zip(cities, answers))]
    which = rng.randrange(NEEDLES)
    return Story(facts, _chatter(rng), _asked(cities[which]), answers[which])


def _key_value(rng: random.Random, words: Sequence[str], depth: float | None) -> Story:
    asked, answer = rng.randrange(10_000, 100_000), rng.choice(words)

    def others() -> Iterator[str]:
        while True:
            key = rng.randrange(10_000, 100_000)
            if key != asked:
                yield _secret(f"box {key}", rng.choice(words))

    return Story([(rng.random(), _secret(f"box {asked}", answer))], others(), _asked(f"box {asked}"), answer)


def _variables(rng: random.Random, words: Sequence[str], depth: float | None) -> Story:
    names = [f"X{number}" for number in rng.sample(range(100, 1000), 2 * HOPS)]
    answers = rng.sample(list(words), 2)
    chains = [names[:HOPS], names[HOPS:]]
    facts = []
    for chain, answer in zip(chains, answers):
        facts.append((rng.random() / HOPS, f" The variable {chain[0]} is {answer}."))
        for hop in range(1, HOPS):
            facts.append(((hop + rng.random()) / HOPS, f" The variable {chain[hop]} is equal to {chain[hop - 1]}."))
    which = rng.randrange(2)
    asked = f"The variable {chains[which][-1]} is"
    return Story(facts, _chatter(rng), f"What is the variable {chains[which][-1]}? {asked}", answers[which])


def _chatter(rng: random.Random) -> Iterator[str]:
    while True:
        yield f" {rng.choice(DATA['who'])} {rng.choice(DATA['did'])} {rng.choice(DATA['when'])}."


def _secret(name: str, word: str) -> str:
    return f" The secret word of {name} is {word}."


def _asked(name: str) -> str:
    return f"What is the secret word of {name}? The secret word of {name} is"


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


STORIES: dict[str, Callable[[random.Random, Sequence[str], float | None], Story]] = {
    "needle": _needle,
    "needles": _needles,
    "key_value": _key_value,
    "variables": _variables,
}
DEEP = ("needle",)
"""Tasks that are asked at every depth."""
