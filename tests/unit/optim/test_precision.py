"""The loss scale of float16 against torch's own, and which format is chosen (SPEC F3)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmtune.optim.precision import LossScale, autocast, resolve_precision

CPU = torch.device("cpu")


def test_only_float16_has_a_scale():
    assert LossScale.of("fp32") is None and LossScale.of("bf16") is None
    assert LossScale.of("fp16") == LossScale(2.0**16, 2.0, 0.5, 2000)  # the numbers of SPEC F3


@pytest.mark.parametrize("interval", [1, 3, 2000])
def test_the_scale_moves_as_torchs(interval):
    """The same overflows through `torch.amp.GradScaler` and through ours: the same scale after every step."""
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=interval)
    ours = LossScale(interval=interval)
    for overflow in (False, True, True, False, False, False, False, True, False, False, False):
        theirs.scale(parameter.sum()).backward()
        if overflow:
            parameter.grad.fill_(float("inf"))
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(overflow)
        assert ours.value == theirs.get_scale()


def test_unscaling_divides_and_keeps_what_overflowed():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    a.grad = torch.tensor([2.0**16, float("inf")])
    LossScale().unscale([a, b])
    assert a.grad.tolist() == [1.0, float("inf")] and b.grad is None


def test_auto_never_chooses_float16():
    assert resolve_precision("auto", CPU) in ("bf16", "fp32")
    assert resolve_precision("fp16", CPU) == "fp16"


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_products_run_in_the_format(precision, dtype):
    a = torch.ones(4, 4)
    with autocast(precision, CPU):
        assert (a @ a).dtype == (dtype or torch.float32)
