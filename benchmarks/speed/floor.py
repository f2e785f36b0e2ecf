"""The products that a step cannot do without, each at its own shape and nothing between them: no arm can be faster.

Products write into memory that is there already; attention is torch's own, forward and, in the language model, also
backward. arms.py says for which model and samples (JSON, the first argument). An optimizer of one number ends every
step, so that the stop-watch sees it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from flops import RANK, WINDOW, Needed, Sample, needed
from torch import Tensor
from workload import SHAPES, Shape

Sizes = tuple[int, int, int]
"""Of a product [m, k] x [k, n]."""


class Memory:
    """Operands and results: a buffer for each role, as large as the largest of them."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.kept = dtype, {}

    def of(self, role: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if role not in self.kept or len(self.kept[role]) < size:
            self.kept[role] = torch.randn(size).to(self.dtype)
        return self.kept[role][:size].view(shape)

    def multiply(self, m: int, k: int, n: int) -> None:
        torch.mm(self.of("left", m, k), self.of("right", k, n), out=self.of("out", m, n))


def linear(rows: int, wide: int, out: int, in_full: bool) -> list[Sizes]:
    """Forward, the gradient of the input, and where it trains that of the weights."""
    return [(rows, wide, out), (rows, out, wide), *([(out, rows, wide)] if in_full else [])]


def adapter(rows: int, wide: int, out: int) -> list[Sizes]:
    """LoRA beside it: forward, the gradients of states and of both factors."""
    return [
        (rows, wide, RANK), (rows, RANK, out), (rows, out, RANK), (rows, RANK, wide), (out, rows, RANK),
        (RANK, rows, wide),
    ]  # fmt: skip


def decoder_block(shape: Shape, tokens: int, read: int, in_full: bool) -> Iterator[Sizes]:
    """read: positions whose states somebody reads behind the block."""
    narrow = shape.kv * shape.hidden // shape.heads
    for rows, wide, out in (
        (tokens, shape.hidden, shape.hidden), (tokens, shape.hidden, narrow), (tokens, shape.hidden, narrow),
        (tokens, shape.hidden, shape.hidden), (read, shape.hidden, shape.inner), (read, shape.hidden, shape.inner),
        (read, shape.inner, shape.hidden),
    ):  # fmt: skip
        yield from linear(rows, wide, out, in_full)
        yield from [] if in_full else adapter(rows, wide, out)


def tower_block(shape: Shape, patches: int) -> Iterator[Sizes]:
    wide, inner = shape.vision_hidden, shape.vision_inner
    yield patches, wide, 3 * wide
    yield patches, wide, wide
    yield patches, wide, inner
    yield patches, wide, inner
    yield patches, inner, wide


def merger(shape: Shape, patches: int) -> Iterator[Sizes]:
    """Trained: forward, gradients of both weights and of what lies between them."""
    rows, wide = patches // 4, 4 * shape.vision_hidden
    yield rows, wide, wide
    yield rows, wide, shape.hidden
    yield rows, shape.hidden, wide
    yield wide, rows, wide
    yield wide, rows, shape.hidden


def micro_batch(shape: Shape, memory: Memory, samples: list[Sample], in_full: bool) -> None:
    tokens, patches = sum(s.tokens for s in samples), sum(sum(s.patches) for s in samples)
    memory.multiply(patches, 3 * 2 * 14 * 14, shape.vision_hidden)
    for _ in range(shape.vision_depth):
        for sizes in tower_block(shape, patches):
            memory.multiply(*sizes)
    with torch.no_grad():
        heads, width = 4, shape.vision_hidden // 4
        windows = memory.of("windows", patches // WINDOW, heads, WINDOW, width)
        for _ in range(shape.vision_depth - 2):
            F.scaled_dot_product_attention(windows, windows, windows)
        for sample in samples:
            for count in sample.patches:
                whole = memory.of("image", 1, heads, count, width)
                for _ in range(2):
                    F.scaled_dot_product_attention(whole, whole, whole)
    for sizes in merger(shape, patches):
        memory.multiply(*sizes)
    supervised = sum(s.supervised for s in samples)
    for layer in range(shape.layers):
        for sizes in decoder_block(shape, tokens, supervised if layer == shape.layers - 1 else tokens, in_full):
            memory.multiply(*sizes)
        for sample in samples:
            attend(shape, memory, sample.tokens)
    for sizes in linear(supervised, shape.hidden, shape.vocabulary, in_full):
        memory.multiply(*sizes)


def attend(shape: Shape, memory: Memory, tokens: int) -> None:
    width = shape.hidden // shape.heads
    q, k, v = (
        memory.of(role, 1, heads, tokens, width).detach().requires_grad_()
        for role, heads in (("q", shape.heads), ("k", shape.kv), ("v", shape.kv))
    )
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.autograd.grad(out, (q, k, v), memory.of("upstream", *out.shape))


def main(wish: dict) -> None:
    torch.set_num_threads(wish["threads"])
    shape, per_step = SHAPES[wish["shape"]], wish["micro"] * wish["parts"]
    in_full = wish["method"] == "full"
    need: Needed = needed(Path(wish["model"]), Path(wish["data"]), shape, wish["steps"], per_step, in_full)
    memory = Memory(torch.bfloat16 if wish["bf16"] else torch.float32)
    one = torch.nn.Parameter(torch.zeros(1))
    one.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([one], lr=0.0)
    for step in range(wish["steps"]):
        for part in range(wish["parts"]):
            first = step * per_step + part * wish["micro"]
            samples = [need.samples[(first + k) % len(need.samples)] for k in range(wish["micro"])]
            micro_batch(shape, memory, samples, in_full)
        optimizer.step()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
