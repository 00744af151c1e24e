"""Memory against cases computed by hand: Llama-3.1-8B, Gemma2-9B with alternating windows, tensor parallel 70B."""

import tracemalloc

import pytest

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.models import Checkpoint
from halfbyte.plan import make_plan
from halfbyte.plan.memory import Device, KVShape, activation_bytes, memory_estimate
from halfbyte.plan.parallel import odd_widths, rank_shape, refuse_bad_tp
from halfbyte.plan.windows import windows
from halfbyte.platforms import load_platform
from halfbyte.recipe.schema import Recipe
from tests.unit.sparse import GEMMA2_9B, LLAMA_8B, LLAMA_70B, make_sparse

H100, MI325X, CPU = (load_platform(name) for name in ("h100", "mi325x", "cpu"))
GPTQ = Recipe.model_validate({"method": "gptq", "group_size": 128})
MODEL = {"kv_heads": 2, "head_dim": 32, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 320,
         "context_limit": 4096}  # fmt: skip


@pytest.fixture(scope="module")
def of(tmp_path_factory):
    made = {}

    def get(config):
        key = config["model_type"], config["hidden_size"]
        if key not in made:
            made[key] = Checkpoint(make_sparse(tmp_path_factory.mktemp("sparse"), config))
        return made[key]

    return get


def row_of(checkpoint, platform, *, recipe=GPTQ, **others):
    return make_plan(checkpoint, recipe, [platform], **others)["memory"][0]


def test_llama_8b_by_hand(of):
    row = row_of(of(LLAMA_8B), H100, context=8192, concurrency=[1, 16, 64])
    in_blocks = 32 * (4096 * 4096 * 2 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    assert in_blocks == 6_979_321_856
    codes, scales_and_zeros = in_blocks // 2, in_blocks // 128 * 2 + in_blocks // 128 // 2
    order = 32 * 4 * (6 * 4096 + 14336)
    embeddings, norms = 2 * 2 * 128256 * 4096, 65 * 4096 * 2
    assert row["weights_bytes"] == codes + scales_and_zeros + order + embeddings + norms == 5_732_835_328
    assert row["bf16_weights_bytes"] == 2 * in_blocks + embeddings + norms == 16_060_522_496
    assert row["kv_cache_dtype"] == "fp8"
    assert row["kv_bytes_per_token"] == 2 * 8 * 128 * 32 == 65_536
    assert row["kv_bytes_per_sequence"] == 512 * 2**20
    assert [level["kv_bytes"] for level in row["levels"]] == [n * 512 * 2**20 for n in (1, 16, 64)]
    assert row["activation_bytes"] == 2 * 8192 * (4 * 4096 + 3 * 14336) + 4 * 64 * 128256
    assert row["usable_bytes"] == int(int(79.6 * 2**30) * 0.9)
    room = row["usable_bytes"] - row["weights_bytes"] - row["activation_bytes"] - 2 * 2**30
    assert row["max_concurrency"] == room // (512 * 2**20) == 126
    assert row["max_context"] == room // 64 // 65_536 // 16 * 16
    assert row["fits"] and row["total_bytes"] == row["usable_bytes"] - room + 64 * 512 * 2**20


def test_a_16_bit_cache_holds_half(of):
    ours, other = (row_of(of(LLAMA_8B), p, context=8192, concurrency=8) for p in (H100, MI325X))
    assert (ours["kv_cache_dtype"], other["kv_cache_dtype"]) == ("fp8", "auto")
    assert 2 * ours["kv_bytes"] == other["kv_bytes"]
    assert other["utilization"] == 0.92 and ours["utilization"] == 0.9


def test_gemma2_alternates_without_saying_so(of):
    assert windows(GEMMA2_9B, 42)[:3] == [4096, None, 4096] and windows(GEMMA2_9B, 42).count(None) == 21
    row = row_of(of(GEMMA2_9B), MI325X, context=8192, concurrency=4)
    token_and_block = 2 * 8 * 256 * 2
    assert row["kv_bytes_per_sequence"] == token_and_block * 21 * (8192 + 4096) == 2_113_929_216
    assert row["kv_bytes_per_token"] == token_and_block * 42
    short = row_of(of(GEMMA2_9B), MI325X, context=4096, concurrency=4)
    assert short["kv_bytes_per_sequence"] == token_and_block * 42 * 4096
    assert row["max_context"] == 8192


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"model_type": "llama", "sliding_window": 16}, [None] * 4),
        ({"model_type": "mistral", "sliding_window": 16}, [16] * 4),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 4),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False}, [None] * 4),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3},
         [None, None, None, 16]),
        ({"model_type": "gemma3_text", "sliding_window": 16, "sliding_window_pattern": 4}, [16, 16, 16, None]),
        ({"model_type": "gemma3_text", "sliding_window": 16, "layer_types": ["sliding_attention", "full"] * 2},
         [16, None, 16, None]),
    ],
)  # fmt: skip
def test_windows_of_the_families(config, expected):
    assert windows(config, 4) == expected


def test_pages_and_the_longest_sequence():
    kv = KVShape(2, 32, (None, None, 16, 16))
    token_and_block = 2 * 2 * 32 * 2
    assert kv.sequence_bytes(16, "auto") == token_and_block * 4 * 16
    assert kv.sequence_bytes(17, "auto") == token_and_block * (2 * 32 + 2 * 16)
    for tokens in (16, 160, 1600):
        room = kv.sequence_bytes(tokens, "auto")
        assert kv.longest(room, "auto") == tokens and kv.longest(room - 1, "auto") == tokens - 16
    assert kv.longest(0, "fp8") == 0


def test_memory_fits_up_to_its_own_maximum():
    kv = KVShape(2, 32, (None,) * 4)

    def estimate(concurrency, memory=100_000_000):
        device = Device(memory, 0.9, 500_000, 8192)
        return memory_estimate(MODEL, kv, 1_000_000, device, 512, concurrency, "auto")

    most = estimate(8)["max_concurrency"]
    budget = 90_000_000 - 1_500_000 - activation_bytes(MODEL, 512, 8, 8192)
    assert most == budget // kv.sequence_bytes(512, "auto") > 8
    assert estimate(8)["fits"] and not estimate(200)["fits"]
    assert estimate(8)["max_context"] >= 512 > estimate(200)["max_context"]
    assert [estimate(8, memory=None)[key] for key in ("fits", "max_concurrency", "max_context")] == [None] * 3


def test_seventy_billion_over_eight_ranks(of):
    whole, eighth = (row_of(of(LLAMA_70B), H100, context=4096, concurrency=16, tp=tp) for tp in (1, 8))
    assert not whole["bf16_fits"] and eighth["fits"] and eighth["bf16_fits"]
    norms = 161 * 8192 * 2
    assert eighth["weights_bytes"] == pytest.approx((whole["weights_bytes"] - norms) / 8 + norms, abs=8)
    assert eighth["kv_bytes_per_token"] == 2 * 1 * 128 * 80
    sixteenth = row_of(of(LLAMA_70B), H100, context=4096, concurrency=16, tp=16)
    assert sixteenth["kv_bytes_per_token"] == eighth["kv_bytes_per_token"], "a KV head is not cut: it is repeated"
    assert sixteenth["weights_bytes"] > eighth["weights_bytes"] / 2


def test_ranks_that_cut_a_group(of):
    with pytest.raises(UsageError, match=r"--tp 3 does not divide the 32 attention heads .* use 1, 2, 4, 8, 16"):
        row_of(of(LLAMA_8B), H100, tp=3)
    refuse_bad_tp({"heads": 32, "kv_heads": 8}, 16)
    plan = make_plan(of(LLAMA_8B), GPTQ, [H100], tp=16)
    assert [w["text"] for w in plan["warnings"] if w["rule"] == "tensor-parallel"] == []
    narrow = dict(LLAMA_8B, intermediate_size=14336 // 2 + 256, hidden_size=2048, num_attention_heads=16)
    checkpoint = of(narrow)
    told = [w["text"] for w in make_plan(checkpoint, GPTQ, [H100], tp=8)["warnings"] if w["rule"] == "tensor-parallel"]
    assert len(told) == 1 and "has 928 inputs on a rank" in told[0] and "32 linears" in told[0]
    chosen = make_plan(checkpoint, None, [H100, MI325X], tp=8)["recipe"]
    assert chosen["group_size"] == 32 and 928 % 32 == 0
    assert make_plan(checkpoint, None, [H100, MI325X])["recipe"]["group_size"] == 128


def test_shapes_on_a_rank(of):
    from halfbyte.plan import footprints

    prints = footprints(GPTQ, of(LLAMA_8B))
    block = [one.plan for one in prints if one.plan.block == 0]
    assert rank_shape([p for p in block if p.kind == "qkv"], 4) == (6144 // 4, 4096)
    assert rank_shape([p for p in block if p.kind == "down"], 4) == (4096, 14336 // 4)
    assert odd_widths(prints, 8) == [] and len(odd_widths(prints, 64)) == 64


def test_seventy_billion_takes_little_memory(tmp_path, monkeypatch):
    checkpoint = Checkpoint(make_sparse(tmp_path, LLAMA_70B))
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("a plan reads no weight"))
    monkeypatch.setattr(Checkpoint, "load_all", lambda *_: pytest.fail("a plan reads no weight"))
    tracemalloc.start()
    plan = make_plan(checkpoint, None, [H100, MI325X], 8192, [1, 16, 64])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plan["bytes"]["before"] > 130 * 2**30 and peak < 50 * 2**20


def test_a_broken_rank_count_is_a_line(of):
    odd = dict(LLAMA_8B, intermediate_size=14337, hidden_size=1024, num_attention_heads=8)
    with pytest.raises(HalfbyteError, match="does not divide the 14337 inputs"):
        make_plan(of(odd), None, [CPU], tp=2)
