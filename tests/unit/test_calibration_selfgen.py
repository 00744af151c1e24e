"""The model's own text: what is sampled, what is put in, and how the token budget is met."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.calibration import build, generate
from halfbyte.calibration.script import write_script
from halfbyte.calibration.selfgen import _sample
from halfbyte.errors import HalfbyteError
from halfbyte.recipe.schema import CalibrationSpec
from halfbyte.types import Quiet
from tests.tiny import DENSE, make_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(family: str):
        if family not in made:
            path = make_tiny(family, tmp_path_factory.mktemp(family))
            made[family] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        return made[family]

    return get


class Ending(torch.nn.Module):
    """A model that ends its text more often (or, with a negative boost, never)."""

    def __init__(self, model: torch.nn.Module, boost: float):
        super().__init__()
        self.inner, self.boost = model, boost
        self.config, self.generation_config, self.device = model.config, model.generation_config, torch.device("cpu")

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        out.logits[..., 2] += self.boost
        return out


def plain():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def test_sample_inverts_the_distribution():
    logits = torch.log(torch.tensor([[0.1, 0.0, 0.6, 0.3]])).repeat(1000, 1)
    draws = (torch.arange(1000) + 0.5) / 1000
    assert torch.bincount(_sample(logits, draws), minlength=4).tolist() == [100, 0, 600, 300]
    assert _sample(logits[:1], torch.zeros(1)).tolist() == [0]


@pytest.mark.parametrize("family", DENSE)
def test_every_token_is_what_its_draw_picks_from_the_model(models, family):
    model = Ending(models(family), -1e9)
    own = generate(model, plain(), [40, 24, 33, 40], seed=5, batch_size=3)
    wanted = {}
    for i, length in enumerate([40, 40, 33, 24]):
        wanted[length, i] = torch.rand(length, generator=torch.Generator().manual_seed(5 * 1_000_003 + i))
    agree = total = 0
    assert sorted(map(len, own.sequences)) == [24, 33, 40, 40]
    for sequence in own.sequences:
        with torch.no_grad():
            logits = model(sequence.unsqueeze(0)).logits[0, :-1]
        picked = [_sample(logits, draws[: len(logits)]) for (n, _), draws in wanted.items() if n >= len(sequence)]
        agree += max(int((tokens == sequence[1:]).sum()) for tokens in picked)
        total += len(logits)
    assert agree >= 0.98 * total


def test_chat_text_keeps_the_template_s_frame(models):
    tokenizer = tiny_tokenizer()
    script = write_script(tokenizer, models("llama"), 200)
    assert tokenizer.decode(script.opening) == "<|im_start|>user\n"
    assert [tokenizer.decode(turn) for turn in script.turns] == [
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\n",
    ]
    own = generate(models("llama"), tokenizer, [200] * 6, seed=1)
    for sequence, sampled in zip(own.sequences, own.sampled):
        text = tokenizer.decode(sequence[: -len(script.turns[0])])
        assert text.startswith("<|im_start|>user\n") and "<|im_start|>assistant\n" in text
        assert not sampled[: len(script.opening)].any() and sampled.any() and len(sampled) == len(sequence)
        assert not sampled[tokenizer.decode(sequence) and _header(sequence, script.turns[0])].any()


def _header(sequence: torch.Tensor, turn: tuple[int, ...]) -> slice:
    ids = sequence.tolist()
    rest = list(turn[1:])
    start = next(i for i in range(len(ids)) if ids[i : i + len(rest)] == rest and i > 2)
    return slice(start, start + len(rest))


def test_the_same_seed_writes_the_same_text(models):
    one, again, other = (generate(models("llama"), plain(), [32, 48, 20], seed=s) for s in (7, 7, 8))
    assert [s.tolist() for s in one.sequences] == [s.tolist() for s in again.sequences]
    assert [s.tolist() for s in one.sequences] != [s.tolist() for s in other.sequences]


def test_texts_that_end_early_are_made_good(models):
    with torch.no_grad():
        spread = models("llama")(torch.ones(1, 1, dtype=torch.int64)).logits.std().item()
    model = Ending(models("llama"), 2 * spread)
    progress = Quiet()
    own = generate(model, plain(), [64] * 10, seed=0, progress=progress)
    assert len(own.sequences) > 10 and any(len(s) < 64 and s[-1] == 2 for s in own.sequences)
    assert 0.95 * 640 <= sum(map(len, own.sequences)) < 640 + 64
    with pytest.raises(HalfbyteError, match="ends its texts too early"):
        generate(Ending(models("llama"), 1e4), plain(), [64] * 4)


def test_nan_is_named(models):
    with pytest.raises(HalfbyteError, match="NaN"):
        generate(Ending(models("llama"), float("nan")), plain(), [32])


def test_build_writes_its_own_text(models):
    built = build(tiny_tokenizer(), CalibrationSpec(sequences=6, max_tokens=48), model=models("llama"))
    assert built.manifest["source"]["kind"] == "self-generated" and built.sampled is not None
    assert built.manifest["longest"] <= 48 and len(built.sequences) >= 6
