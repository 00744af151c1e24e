"""A roofline for decoding: what the hardware's peaks allow, for platforms and shapes without a measurement.

With bandwidth B (bytes/s), dense BF16 peak P (FLOP/s), and for each kernel the shares m of B and p of P that it
reaches (the platform's `roofline` data), a step that adds a token to each of c sequences of n tokens takes

    t(c, n) = W4/(m4·B) + 2·N4·c/(p4·P)                     4-bit linears: bytes W4, weights N4; unpacking and
                                                            multiplying do not overlap, so their times add up
            + max(W16/(m16·B), 2·N16·c/(p16·P))             linears in BF16, the head among them
            + c · KV(n)/(m16·B)                             keys and values that attention reads
            + blocks · overhead                             launches, norms, attention, sampling
            + c · token                                     the server on the host: reading, writing, streaming

and a batch of c prompts of i tokens with o tokens each to write takes prefill + o · t(c, i + o/2), where

    prefill = c·i · (2·N4/(p4·P) + 2·N16/(p16·P)) + attention.

Everything is per tensor-parallel rank; the time of communication is left out, for BF16 as for 4 bits. Of a mixture of
experts with k of E experts for a token, c tokens are expected to read E·(1 - (1 - k/E)^c) experts of each block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.plan.inventory import Footprint
from halfbyte.plan.memory import KVShape
from halfbyte.platforms import Efficiency, Platform


@dataclass(frozen=True)
class Mass:
    """Weights that a step may read: their bytes and their number."""

    bytes: float = 0.0
    weights: float = 0.0

    def __add__(self, other: Mass) -> Mass:
        return Mass(self.bytes + other.bytes, self.weights + other.weights)


@dataclass(frozen=True)
class Work:
    """What one rank reads and multiplies: 4-bit and BF16 linears, experts apart, and its keys and values."""

    four_bit: Mass
    bf16: Mass
    experts_four_bit: Mass
    experts_bf16: Mass
    head: Mass
    experts: int
    experts_used: int
    blocks: int
    heads: int
    kv: KVShape
    kv_cache_dtype: str

    def read(self, tokens: float) -> tuple[Mass, Mass]:
        """4-bit and BF16 masses of a step of so many tokens: bytes are read once, `weights` is per token."""
        if not self.experts:
            return self.four_bit, self.bf16
        share = self.experts_used / self.experts
        touched = 1 - (1 - share) ** tokens
        four, sixteen = self.experts_four_bit, self.experts_bf16
        return (
            self.four_bit + Mass(four.bytes * touched, four.weights * share),
            self.bf16 + Mass(sixteen.bytes * touched, sixteen.weights * share),
        )


@dataclass(frozen=True)
class Load:
    """Sequences at once, tokens of each prompt, tokens that each one writes."""

    concurrency: int
    prompt: int
    output: int


def work_of(
    linears: Sequence[Footprint],
    head_bytes: int,
    blocks: int,
    heads: int,
    kv: KVShape,
    kv_cache_dtype: str,
    tp: int = 1,
    experts: tuple[int, int] = (0, 0),
) -> tuple[Work, Work]:
    """The work of the recipe's model and of the BF16 one. `head_bytes`: of a tied head, which is read as the head."""

    def mass(kept: bool | None, expert: bool, before: bool) -> Mass:
        rows = [
            linear
            for linear in linears
            if linear.plan.kind != "lm_head"
            and (kept is None or (linear.plan.scheme is None) == kept)
            and linear.expert == expert
        ]
        size = sum(linear.before if before else linear.after for linear in rows)
        return Mass(size / tp, sum(linear.parameters for linear in rows) / tp)

    heads_rows = [linear for linear in linears if linear.plan.kind == "lm_head"]
    size = sum(linear.before for linear in heads_rows) or head_bytes
    head = Mass(size / tp, size / 2 / tp)
    common = (head, *experts, blocks, heads, kv, kv_cache_dtype)
    quantized = Work(
        mass(False, False, False), mass(True, False, False), mass(False, True, False), mass(True, True, False), *common
    )
    plain = Work(Mass(), mass(None, False, True), Mass(), mass(None, True, True), *common)
    return quantized, plain


def batch_seconds(work: Work, platform: Platform, kernel: Efficiency, load: Load) -> float | None:
    """Seconds of a batch by the roofline; None where the platform's data has no peaks or no shares."""
    if platform.roofline is None or not platform.bandwidth_gbs or not platform.bf16_tflops:
        return None
    middle = load.prompt + load.output // 2
    step = _step(work, platform, kernel, load.concurrency, middle)
    return _prefill(work, platform, kernel, load.concurrency, load.prompt) + load.output * step


def _step(work: Work, platform: Platform, kernel: Efficiency, concurrency: int, tokens: int) -> float:
    assert platform.roofline and platform.bandwidth_gbs and platform.bf16_tflops
    bandwidth, peak, plain = platform.bandwidth_gbs * 1e9, platform.bf16_tflops * 1e12, platform.roofline.bf16
    four, sixteen = work.read(concurrency)
    sixteen = sixteen + work.head
    packed = four.bytes / (kernel.memory * bandwidth) + 2 * four.weights * concurrency / (kernel.compute * peak)
    reading = sixteen.bytes / (plain.memory * bandwidth)
    multiplying = 2 * sixteen.weights * concurrency / (plain.compute * peak)
    cache = concurrency * work.kv.block_token_bytes(work.kv_cache_dtype) * work.kv.kept(tokens)
    overhead = (work.blocks * platform.roofline.overhead_us + concurrency * platform.roofline.token_us) * 1e-6
    return packed + max(reading, multiplying) + cache / (plain.memory * bandwidth) + overhead


def _prefill(work: Work, platform: Platform, kernel: Efficiency, prompts: int, tokens: int) -> float:
    assert platform.roofline and platform.bf16_tflops
    peak, plain = platform.bf16_tflops * 1e12, platform.roofline.bf16
    four, sixteen = work.read(prompts * tokens)
    linears = 2 * four.weights / (kernel.compute * peak) + 2 * sixteen.weights / (plain.compute * peak)
    attention = 2 * work.heads * work.kv.head_dim * work.kv.kept(tokens) / (plain.compute * peak)
    return prompts * tokens * (linears + attention)
