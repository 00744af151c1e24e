"""A model that answers, loaded or served: against plain forwards of the whole sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import subject
from halfbyte.evaluate.pair import Pair, Serving
from halfbyte.evaluate.subject import Loaded, stop_tokens
from halfbyte.types import Quiet
from tests.tiny import FAMILIES, make_tiny, tiny_tokenizer
from tests.unit.stand_in import service, vllm_of

LENGTHS = (20, 7, 20, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny("llama", tmp_path_factory)


def tiny(family, tmp_path_factory):
    place = make_tiny(family, tmp_path_factory.mktemp("subject") / family, max_position_embeddings=512)
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 261, (n,), generator=generator).tolist() for n in LENGTHS]


@torch.inference_mode()
def greedy(model, ids, steps, stops):
    said = []
    while len(said) < steps:
        said.append(int(model(torch.tensor([ids + said])).logits[0, -1].argmax()))
        if said[-1] in stops:
            return said[:-1]
    return said


@pytest.fixture(params=["loaded", "served"])
def asked(request, model):
    tokenizer = tiny_tokenizer()
    if request.param == "loaded":
        yield Loaded(model, tokenizer)
        return
    with service(vllm_of(model, tokenizer)) as url:
        pair = Pair(url, url + "/v1/", tokenizer, ("a", "b"), Serving("logs"))
        with pair.open("model", 512, Quiet()) as found:
            yield found


def test_answers_are_greedy_and_end_where_they_should(asked, model, prompts, monkeypatch):
    monkeypatch.setattr(subject, "BATCH_TOKENS", 60)
    free = [greedy(model, prompt, 8, []) for prompt in prompts]
    stops = [free[0][3], free[2][5], 2]
    expected = [greedy(model, prompt, 8, stops) for prompt in prompts]
    assert min(map(len, expected)) < 8
    said = asked.generate(prompts, 8, stops)
    assert said == [asked_decode(ids) for ids in expected]


def asked_decode(ids):
    return tiny_tokenizer().decode(ids, skip_special_tokens=True)


def test_the_likeliest_candidate(asked, model, prompts, monkeypatch):
    monkeypatch.setattr(subject, "PIECE", 8)
    candidates = list(range(40, 56))
    with torch.inference_mode():
        scores = [model(torch.tensor([p])).logits[0, -1, candidates] for p in prompts]
    expected = [candidates[int(s.argmax())] for s in scores]
    assert asked.choose(prompts, candidates) == expected and len(set(expected)) > 1


def test_log_likelihoods_in_pieces(asked, model, prompts, monkeypatch):
    monkeypatch.setattr(subject, "PIECE", 8)
    windows = [prompt for prompt in prompts if len(prompt) > 1]
    found = asked.logliks(windows)
    for window, values in zip(windows, found):
        with torch.inference_mode():
            p = model(torch.tensor([window])).logits[0, :-1].double().log_softmax(-1)
        np.testing.assert_allclose(values, p[range(len(window) - 1), window[1:]].numpy(), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_of_every_family(family, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(subject, "PIECE", 8)
    model = tiny(family, tmp_path_factory)
    window = list(range(60, 120))
    with torch.inference_mode():
        p = model(torch.tensor([window])).logits[0].log_softmax(-1)
    found = Loaded(model, tiny_tokenizer())
    np.testing.assert_allclose(found.logliks([window])[0], p[range(59), window[1:]].numpy(), atol=1e-4)
    assert found.choose([window], range(5, 261)) == [5 + int(p[-1, 5:261].argmax())]


def test_a_long_sequence_is_never_held_as_logits(model, monkeypatch):
    held = []
    model.register_forward_hook(lambda _, __, out: held.append(out.logits.shape[1]))
    monkeypatch.setattr(subject, "PIECE", 16)
    window = list(range(5, 205))
    assert len(Loaded(model, tiny_tokenizer()).logliks([window])[0]) == 199 and max(held) == 16
    held.clear()
    Loaded(model, tiny_tokenizer()).choose([window], [5, 6])
    assert held == [1] * 13


def test_an_answer_ends_at_every_end_that_is_stated():
    class Config:
        eos_token_id = (9, 2)

    assert stop_tokens(tiny_tokenizer(), Config(), object()) == [2, 9]


def test_out_of_memory_is_one_line(model):
    pair = Pair(model, model, tiny_tokenizer(), ("a", "b"))
    with pytest.raises(HalfbyteError, match="4,096 tokens at a time do not fit"):
        with pair.open("model", 4096, Quiet()):
            raise torch.OutOfMemoryError
