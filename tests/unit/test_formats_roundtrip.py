"""Formats against a slow, obvious packer, and there and back again."""

from __future__ import annotations

import pytest
import torch

from halfbyte.algo import dequantize
from halfbyte.formats import FormatError, get_format
from halfbyte.formats.awq import ORDER
from halfbyte.formats.bits import pack_bytes, pack_int32, unpack_bytes, unpack_int32
from halfbyte.types import QuantizedLinear, Scheme

NAME = "model.layers.3.mlp.down_proj"


def make(grid: str, out: int, width: int, group: int, seed: int = 0, **extra: float) -> QuantizedLinear:
    """A linear with all 16 codes in it, random scales that every format can store."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (out, width), generator=g, dtype=torch.uint8)
    codes[0, :16] = torch.arange(16)
    shape = (out, width // group)
    if grid == "nvfp4":
        scales = (torch.rand(shape, generator=g) * 400 + 2**-9).to(torch.float8_e4m3fn).float()
        return QuantizedLinear(codes, scales, group, grid, global_scale=2.0**-9, **extra)
    scales = (torch.rand(shape, generator=g) + 2**-6).to(torch.bfloat16).float()
    zeros = torch.randint(0, 16, shape, generator=g, dtype=torch.uint8) if grid == "int4_asym" else None
    return QuantizedLinear(codes, scales, group, grid, zeros)


def slow_words(rows: list[list[int]], order: tuple[int, ...] = tuple(range(8))) -> list[list[int]]:
    """Eight codes a word, one bit at a time; words as signed 32-bit integers."""
    packed = []
    for row in rows:
        words = []
        for start in range(0, len(row), 8):
            word = 0
            for nibble, place in enumerate(order):
                for bit in range(4):
                    word += ((row[start + place] >> bit) & 1) << (4 * nibble + bit)
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        packed.append(words)
    return packed


CASES = [
    ("gptq", "int4_sym"),
    ("awq", "int4_asym"),
    ("compressed-tensors", "int4_sym"),
    ("compressed-tensors", "int4_asym"),
]


@pytest.mark.parametrize("shape", [(576, 576), (192, 1536), (576, 1536), (8, 128)])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize(("kind", "grid"), CASES)
def test_int4_there_and_back(kind: str, grid: str, group: int, shape: tuple[int, int]) -> None:
    out, width = shape
    if group != -1 and width % group:
        pytest.skip("the group does not divide")
    q = make(grid, out, width, width if group == -1 else group)
    kept_as = get_format(kind)
    tensors = kept_as.pack(NAME, q)
    stated = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    assert stated == kept_as.expected(NAME, out, width, Scheme(grid, group))
    assert all(t.is_contiguous() for t in tensors.values())
    for stored_group in (group, q.group_size):
        back = kept_as.unpack(NAME, tensors, Scheme(grid, stored_group))
        assert torch.equal(back.codes, q.codes) and torch.equal(back.scales, q.scales)
        assert (back.group_size, back.grid) == (q.group_size, grid)
        assert q.zeros is None if back.zeros is None else torch.equal(back.zeros, q.zeros)


@pytest.mark.parametrize("kind", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize(("out", "width"), [(576, 576), (192, 1536), (7, 128)])
def test_nvfp4_there_and_back(kind: str, group: int, out: int, width: int) -> None:
    if width % group:
        pytest.skip("the group does not divide")
    q = make("nvfp4", out, width, group)
    kept_as = get_format(kind)
    tensors = kept_as.pack(NAME, q)
    stated = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    assert stated == kept_as.expected(NAME, out, width, Scheme("nvfp4", group))
    back = kept_as.unpack(NAME, tensors, Scheme("nvfp4", group))
    assert back.group_size == 16 and torch.equal(back.codes, q.codes)
    assert torch.equal(back.scales, q.scales.repeat_interleave(group // 16, 1))
    assert torch.equal(dequantize(back), dequantize(q))


def test_words_and_bytes_match_the_slow_packer() -> None:
    codes = torch.randint(0, 16, (5, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert pack_int32(codes).tolist() == slow_words(codes.tolist())
    assert torch.equal(unpack_int32(pack_int32(codes)), codes)
    assert pack_bytes(codes).tolist() == [[r[i] + 16 * r[i + 1] for i in range(0, 48, 2)] for r in codes.tolist()]
    assert torch.equal(unpack_bytes(pack_bytes(codes)), codes)
    transposed = codes.t().contiguous().t()
    assert torch.equal(pack_int32(transposed), pack_int32(codes))


def test_gptq_lies_as_the_slow_packer_lays_it() -> None:
    q = make("int4_sym", 16, 64, 32)
    tensors = get_format("gptq").pack(NAME, q)
    rows = slow_words(q.codes.tolist())
    assert tensors[f"{NAME}.qweight"].tolist() == [list(column) for column in zip(*rows)]
    assert tensors[f"{NAME}.qzeros"].tolist() == [[0x77777777] * 2] * 2
    assert tensors[f"{NAME}.g_idx"].tolist() == [0] * 32 + [1] * 32


def test_awq_lies_as_the_slow_packer_lays_it() -> None:
    q = make("int4_asym", 16, 64, 32)
    tensors = get_format("awq").pack(NAME, q)
    assert ORDER == (0, 2, 4, 6, 1, 3, 5, 7)
    assert tensors[f"{NAME}.qweight"].tolist() == slow_words(q.codes.t().tolist(), ORDER)
    assert q.zeros is not None
    assert tensors[f"{NAME}.qzeros"].tolist() == slow_words(q.zeros.t().tolist(), ORDER)


def test_compressed_zero_points_pad_the_outputs() -> None:
    q = make("int4_asym", 12, 64, 32)
    kept_as = get_format("compressed-tensors")
    tensors = kept_as.pack(NAME, q)
    assert q.zeros is not None
    padded = q.zeros.t().tolist()
    slow = slow_words([row + [0] * 4 for row in padded])
    assert tensors[f"{NAME}.weight_zero_point"].tolist() == [list(column) for column in zip(*slow)]
    back = kept_as.unpack(NAME, tensors, Scheme("int4_asym", 32))
    assert back.zeros is not None and torch.equal(back.zeros, q.zeros)


@pytest.mark.parametrize("kind", ["modelopt", "compressed-tensors"])
def test_minus_zero_and_zero_blocks_stay(kind: str) -> None:
    codes = torch.full((2, 32), 8, dtype=torch.uint8)
    scales = torch.tensor([[1.0, 448.0], [2.0**-9, 0.0]])
    q = QuantizedLinear(codes, scales, 16, "nvfp4", global_scale=0.5)
    kept_as = get_format(kind)
    back = kept_as.unpack(NAME, kept_as.pack(NAME, q), Scheme("nvfp4", 16))
    assert torch.equal(back.codes, codes) and torch.equal(back.scales, scales)
    assert bool(torch.signbit(dequantize(back)).all()) and not dequantize(back).any()


@pytest.mark.parametrize("scale", [449.0, 512.0, 2.0**-10, 1.03, float("nan")])
def test_a_block_scale_that_e4m3_cannot_hold_is_refused(scale: float) -> None:
    q = QuantizedLinear(torch.zeros(1, 16, dtype=torch.uint8), torch.tensor([[scale]]), 16, "nvfp4", global_scale=1.0)
    with pytest.raises(FormatError, match="exactly in float8_e4m3fn"):
        get_format("modelopt").pack(NAME, q)


@pytest.mark.parametrize(("kind", "grid"), CASES)
def test_a_scale_that_would_be_rounded_is_refused(kind: str, grid: str) -> None:
    q = make(grid, 8, 64, 32)
    q.scales[0, 0] = 1 + 2**-20
    with pytest.raises(FormatError, match="cannot be stored exactly"):
        get_format(kind).pack(NAME, q)


def test_input_scales_go_with_fp4_activations_alone() -> None:
    q = make("nvfp4", 8, 32, 16, input_scale=0.25)
    weight_only, both = get_format("modelopt"), get_format("modelopt", "fp4")
    assert f"{NAME}.input_scale" not in weight_only.pack(NAME, q)
    tensors = both.pack(NAME, q)
    assert both.unpack(NAME, tensors, Scheme("nvfp4", 16)).input_scale == 0.25
    assert set(tensors) == set(both.expected(NAME, 8, 32, Scheme("nvfp4", 16)))
    with pytest.raises(FormatError, match="no input_scale"):
        both.pack(NAME, make("nvfp4", 8, 32, 16))
    with pytest.raises(FormatError, match="fp4 activations"):
        get_format("gptq", "fp4")


def test_a_reciprocal_global_scale_comes_back_to_the_bit_or_is_refused() -> None:
    kept_as = get_format("compressed-tensors")
    codes, scales = torch.zeros(1, 16, dtype=torch.uint8), torch.ones(1, 1)
    refused = 0
    for value in torch.rand(300, generator=torch.Generator().manual_seed(2)).mul(1e-3):
        stable = float(1 / (1 / value))
        q = QuantizedLinear(codes, scales, 16, "nvfp4", global_scale=stable)
        assert kept_as.unpack(NAME, kept_as.pack(NAME, q), Scheme("nvfp4", 16)).global_scale == stable
        raw = QuantizedLinear(codes, scales, 16, "nvfp4", global_scale=float(value))
        try:
            assert kept_as.unpack(NAME, kept_as.pack(NAME, raw), Scheme("nvfp4", 16)).global_scale == float(value)
        except FormatError:
            refused += 1
    assert 0 < refused < 100


def test_what_does_not_fit_is_refused() -> None:
    gptq, awq = get_format("gptq"), get_format("awq")
    with pytest.raises(FormatError, match="cannot hold the grid int4_asym"):
        gptq.pack(NAME, make("int4_asym", 8, 64, 32))
    with pytest.raises(FormatError, match="multiple of 8"):
        gptq.pack(NAME, make("int4_sym", 12, 64, 32))
    with pytest.raises(FormatError, match="multiple of 8"):
        awq.pack(NAME, make("int4_asym", 12, 64, 32))
    with pytest.raises(FormatError, match="no int4 group size of 16"):
        gptq.pack(NAME, make("int4_sym", 8, 64, 16))
    with pytest.raises(FormatError, match="multiple of 16"):
        get_format("modelopt").expected(NAME, 8, 40, Scheme("nvfp4", 16))
    with pytest.raises(FormatError, match="no format 'gguf'"):
        get_format("gguf")


def test_tensors_that_contradict_themselves_are_refused() -> None:
    gptq, q = get_format("gptq"), make("int4_sym", 8, 64, 32)
    for tensor, value in ((f"{NAME}.qzeros", 0x66666666), (f"{NAME}.g_idx", 1)):
        tensors = gptq.pack(NAME, q)
        tensors[tensor].fill_(value)
        with pytest.raises(FormatError, match=tensor.rpartition(".")[2]):
            gptq.unpack(NAME, tensors, Scheme("int4_sym", 32))
    compressed = get_format("compressed-tensors")
    tensors = compressed.pack(NAME, q)
    tensors[f"{NAME}.weight_shape"][0] = 9
    with pytest.raises(FormatError, match="weight_shape"):
        compressed.unpack(NAME, tensors, Scheme("int4_sym", 32))
