"""Statistics of gradients and updates against their definitions (SPEC D5)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmtune.optim.statistics import SAMPLED, GradientStatistics

LR = 1e-2


def measured(optimizer_of, shapes: dict[str, tuple[int, ...]], seed: int = 0):
    """(rows, gradients, weights before, weights after) of one step."""
    generator = torch.Generator().manual_seed(seed)
    named = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    optimizer = optimizer_of(list(named.values()))
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator) + 0.5
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    statistics = GradientStatistics(named)
    begun = statistics.begin()
    optimizer.step()
    return statistics.end(begun), named, before


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.1)


def test_every_number_is_what_it_says():
    """float32 sums in another order: 1e-5."""
    rows, named, before = measured(adamw, {"matrix": (20, 30), "bias": (30,)})
    for name, row in rows.items():
        gradient, weight = named[name].grad.double(), before[name].double()
        update = (named[name].detach() - before[name]).double()
        expected = {
            "mean": gradient.mean(), "std": gradient.std(correction=0), "largest": gradient.abs().max(),
            "norm": gradient.norm(), "weight": weight.square().mean().sqrt(), "update": update.square().mean().sqrt(),
        }  # fmt: skip
        for key, value in expected.items():
            assert getattr(row, key) == pytest.approx(float(value), rel=1e-5), (name, key)
    assert rows["matrix"].is_matrix and not rows["bias"].is_matrix


def test_the_first_update_of_adamw_is_its_learning_rate():
    """A closed form: with bias correction the first step moves every weight by lr, the decay aside (1 % of it here)."""
    rows, _, _ = measured(lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.0), {"matrix": (40, 50)})
    assert rows["matrix"].update == pytest.approx(LR, rel=1e-3)


def test_a_large_parameter_is_sampled():
    """Four times as many numbers as the sample: weight and update within 5 % (1 / sqrt(2 * 4096) is 1 %)."""
    rows, named, before = measured(lambda p: torch.optim.SGD(p, lr=LR), {"large": (128, 4 * SAMPLED // 128)})
    update = (named["large"].detach() - before["large"]).square().mean().sqrt()
    assert rows["large"].update == pytest.approx(float(update), rel=0.05)
    assert rows["large"].weight == pytest.approx(float(before["large"].square().mean().sqrt()), rel=0.05)
    assert rows["large"].norm == pytest.approx(float(named["large"].grad.norm()), rel=1e-5), "gradients are not sampled"


def test_what_has_no_gradient_is_absent():
    named = {"a": nn.Parameter(torch.ones(3, 3)), "b": nn.Parameter(torch.ones(3, 3))}
    named["a"].grad = torch.zeros(3, 3)
    statistics = GradientStatistics(named)
    rows = statistics.end(statistics.begin())
    assert set(rows) == {"a"} and rows["a"].norm == 0 and rows["a"].update == 0


def test_a_step_that_reaches_no_parameter_is_not_measured():
    assert GradientStatistics({"a": nn.Parameter(torch.ones(3, 3))}).begin() is None


def test_measuring_changes_nothing():
    named = {"a": nn.Parameter(torch.randn(5, 7))}
    named["a"].grad = torch.randn(5, 7)
    weight, gradient = named["a"].detach().clone(), named["a"].grad.clone()
    statistics = GradientStatistics(named)
    statistics.end(statistics.begin())
    assert torch.equal(weight, named["a"]) and torch.equal(gradient, named["a"].grad)


def test_the_optimizer_of_8_bits_is_measured_too():
    """The state of bitsandbytes is not looked at: the weights tell."""
    optim = pytest.importorskip("bitsandbytes").optim
    rows, named, before = measured(lambda p: optim.AdamW8bit(p, lr=LR), {"matrix": (80, 80)})
    update = (named["matrix"].detach() - before["matrix"]).square().mean().sqrt()
    assert rows["matrix"].update == pytest.approx(float(update), rel=0.05)
