"""Our cross-entropy against PyTorch's own on full logits (SPEC B1)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from vlmtune.losses import language
from vlmtune.losses.language import chunk_rows, token_cross_entropy

FP32 = 1e-5
"""SPEC B1. Values here are of order 1 and sums have at most 40 terms, so float32 rounding stays near 1e-6."""


def problem(n: int, d: int, v: int, bias: bool, seed: int = 0, dtype: torch.dtype = torch.float32):
    """(hidden, head, targets, upstream): `upstream` is an arbitrary gradient for each token's loss."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=dtype, requires_grad=True)
    head = nn.Linear(d, v, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) / d**0.5)
    targets = torch.randint(v, (n,), generator=generator)
    return hidden, head, targets, torch.randn(n, generator=generator, dtype=dtype)


def outcome(loss: Tensor, upstream: Tensor, *leaves: Tensor) -> list[Tensor | None]:
    """[loss, gradient of each leaf that trains]."""
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, upstream)]


def plain(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


def assert_agree(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.dtype == reference.dtype
        torch.testing.assert_close(mine, reference, atol=tolerance, rtol=tolerance)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 17),
    d=st.integers(1, 16),
    v=st.integers(1, 40),
    rows=st.integers(1, 20),
    bias=st.booleans(),
    trainable=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_plain_formula(n, d, v, rows, bias, trainable, seed):
    """Loss, and gradients of hidden states, weight and bias, under arbitrary upstream gradients and any chunk size."""
    hidden, head, targets, upstream = problem(n, d, v, bias, seed)
    head.requires_grad_(trainable)
    ours = outcome(token_cross_entropy(hidden, head, targets, rows), upstream, hidden, *head.parameters())
    theirs = outcome(plain(hidden, head, targets), upstream, hidden, *head.parameters())
    assert len(ours) == 2 + trainable * (1 + bias)
    assert_agree(ours, theirs, FP32)


@pytest.mark.parametrize("trainable", [False, True])
def test_every_chunk_size_gives_the_same(trainable):
    """1 … N rows per chunk, and more rows than tokens; the last chunk is short for most of them."""
    hidden, head, targets, upstream = problem(13, 8, 31, bias=True)
    head.requires_grad_(trainable)
    theirs = outcome(plain(hidden, head, targets), upstream, hidden, *head.parameters())
    for rows in range(1, 15):
        ours = outcome(token_cross_entropy(hidden, head, targets, rows), upstream, hidden, *head.parameters())
        assert_agree(ours, theirs, FP32)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_only_one_of_weight_and_bias_trains(which):
    hidden, head, targets, upstream = problem(7, 8, 31, bias=True)
    getattr(head, "weight" if which == "bias" else "bias").requires_grad_(False)
    ours = outcome(token_cross_entropy(hidden, head, targets, 3), upstream, hidden, getattr(head, which))
    theirs = outcome(plain(hidden, head, targets), upstream, hidden, getattr(head, which))
    assert_agree(ours, theirs, FP32)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_finite_differences(trainable, bias):
    """float64, where a difference quotient has about 8 exact digits (gradcheck's own tolerances: 1e-5 and 1e-3)."""
    hidden, head, targets, _ = problem(5, 4, 7, bias, dtype=torch.float64)
    leaves = [hidden, *(p for p in head.parameters() if trainable)]
    head.requires_grad_(trainable)
    assert token_cross_entropy(hidden, head, targets).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda *_: token_cross_entropy(hidden, head, targets, rows=2), leaves)


@pytest.mark.parametrize("frozen_hidden", [False, True])
def test_a_head_wrapped_by_lora(frozen_hidden):
    """Not a plain Linear any more: run and recomputed chunk by chunk; gradients of the adapter too."""
    hidden, head, targets, upstream = problem(11, 8, 31, bias=False)
    model = nn.ModuleDict({"lm_head": head})
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), model)
    hidden.requires_grad_(not frozen_hidden)
    wrapped = model["lm_head"]
    lora = [p for name, p in wrapped.named_parameters() if "lora_" in name]
    assert type(wrapped) is not nn.Linear and len(lora) == 2
    theirs = outcome(plain(hidden, wrapped, targets), upstream, hidden, *lora)
    for rows in (1, 3, 4, 11, 12, None):
        ours = outcome(token_cross_entropy(hidden, wrapped, targets, rows), upstream, hidden, *lora)
        assert_agree(ours, theirs, FP32)


@pytest.mark.parametrize("kind", ["frozen", "trainable", "wrapped"])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_autocast_equals_autocast_of_the_plain_formula(kind, hidden_dtype):
    """Losses: the same bfloat16 logits, so only float32 rounding apart.

    Gradients: both round softmax - onehot (at most 1) and the products to bfloat16, each to 2^-9 relative; ours adds
    chunks in float32. Four roundings in all: 2^-7 of the largest entry. A LoRA factor's gradient passes the other
    factor, four more: 2^-6 (the worst of 300 seeds is 1.6 x 2^-7).
    """
    torch.manual_seed(0)  # of the adapter
    hidden, head, targets, upstream = problem(24, 16, 50, bias=False)
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    head.requires_grad_(kind == "trainable")
    if kind == "wrapped":
        model = nn.ModuleDict({"lm_head": head})
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), model)
        head = model["lm_head"]
    with torch.autocast("cpu", torch.bfloat16):
        ours = outcome(token_cross_entropy(hidden, head, targets, 7), upstream, hidden, *head.parameters())
        theirs = outcome(plain(hidden, head, targets), upstream, hidden, *head.parameters())
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], theirs[0], atol=FP32, rtol=FP32)
    for mine, reference in zip(ours[1:], theirs[1:], strict=True):
        assert mine.dtype == reference.dtype
        tolerance = 2**-6 if mine is not ours[1] and kind == "wrapped" else 2**-7
        assert float((mine - reference).abs().max()) <= tolerance * float(reference.abs().max())


@pytest.mark.parametrize("trainable", [False, True])
def test_bfloat16_weights_without_autocast(trainable):
    """A model held in bfloat16: logits are bfloat16 products, losses float32."""
    hidden, head, targets, upstream = problem(24, 16, 50, bias=True)
    hidden, head = hidden.detach().bfloat16().requires_grad_(), head.bfloat16().requires_grad_(trainable)
    ours = outcome(token_cross_entropy(hidden, head, targets, 7), upstream, hidden, *head.parameters())
    exact = [t.detach().float().requires_grad_() for t in (hidden, *head.parameters())]
    loss = F.cross_entropy(exact[0] @ exact[1].T + exact[2], targets, reduction="none")
    theirs = outcome(loss, upstream, *exact)
    # logits up to 4 are rounded to 8 bits (error up to 2^-7 each), so is the loss that comes from them
    torch.testing.assert_close(ours[0], theirs[0], atol=2**-6, rtol=0)
    for mine, reference in zip(ours[1:], theirs[1:], strict=False):
        assert float((mine.float() - reference).abs().max()) <= 2**-5 * float(reference.abs().max())


@pytest.mark.parametrize("trainable", [False, True])
def test_no_targets(trainable):
    """A micro-batch without supervised tokens: no losses, and a backward that gives zeros."""
    hidden, head, targets, _ = problem(0, 8, 31, bias=True)
    head.requires_grad_(trainable)
    losses = token_cross_entropy(hidden, head, targets)
    assert losses.shape == (0,) and losses.dtype == torch.float32
    losses.sum().backward()
    assert hidden.grad.shape == (0, 8)


@pytest.mark.parametrize("trainable", [False, True])
def test_huge_logits_stay_finite(trainable):
    """exp(1e4) overflows; log-sum-exp must not."""
    hidden, head, targets, upstream = problem(6, 4, 9, bias=True)
    head.requires_grad_(trainable)
    hidden = (hidden.detach() * 1e4).requires_grad_()
    ours = outcome(token_cross_entropy(hidden, head, targets, 2), upstream, hidden, *head.parameters())
    theirs = outcome(plain(hidden, head, targets), upstream, hidden, *head.parameters())
    assert all(bool(tensor.isfinite().all()) for tensor in ours)
    # logits are of order 1e4, where neighbouring float32 numbers are 1e-3 apart
    assert_agree(ours, theirs, 4e-3)


@pytest.mark.parametrize("trainable", [False, True])
def test_never_holds_more_logits_than_a_chunk(trainable, monkeypatch):
    seen: list[int] = []
    logits = language._logits
    monkeypatch.setattr(language, "_logits", lambda h, *others: seen.append(len(h)) or logits(h, *others))
    hidden, head, targets, upstream = problem(23, 8, 31, bias=False)
    head.requires_grad_(trainable)
    outcome(token_cross_entropy(hidden, head, targets, 5), upstream, hidden)
    one_pass = [5, 5, 5, 5, 3]
    assert seen == (one_pass * 2 if trainable else one_pass)  # frozen: the backward needs no second pass


def test_chunk_rows_bound_the_logits():
    for vocabulary in (1, 640, 49_152, 262_144, 10**9):
        rows = chunk_rows(vocabulary)
        assert rows == 1 or rows * vocabulary * 4 <= language.CHUNK_BYTES


@pytest.mark.parametrize("trainable", [False, True])
def test_training_after_an_evaluation(trainable):
    """Memory for logits is kept between calls, and an evaluation (in inference mode) may be the first."""
    hidden, head, targets, upstream = problem(300, 8, 977, bias=False)  # larger than any other problem here
    head.requires_grad_(trainable)
    with torch.inference_mode():
        token_cross_entropy(hidden, head, targets)
    ours = outcome(token_cross_entropy(hidden, head, targets), upstream, hidden)
    assert_agree(ours, outcome(plain(hidden, head, targets), upstream, hidden), 1e-5)
