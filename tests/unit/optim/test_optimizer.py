"""Clipping, learning rates, and an optimizer state that is stored by name (SPEC D1, D4)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmtune.optim.clip import clip_gradients, gradient_norms
from vlmtune.optim.optimizer import build_adamw, load_optimizer_tensors, optimizer_tensors, set_learning_rates
from vlmtune.optim.unfreeze import set_active
from vlmtune.types import VlmtuneError


def groups_of(sizes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    groups = {name: [nn.Parameter(torch.zeros(n)) for n in lengths] for name, lengths in sizes.items()}
    for parameter in (p for parameters in groups.values() for p in parameters):
        parameter.grad = torch.randn(len(parameter), generator=generator)
    return groups


@pytest.mark.parametrize("maximum", [0.1, 1.0, 3.0, 1e6])
def test_clipping_equals_torch(maximum):
    """`clip_grad_norm_` over all parameters; norms reported are those before. float32 sums of 30 numbers: 1e-6."""
    ours, theirs = (groups_of({"language": (3, 8), "projector": (4, 7, 8)}) for _ in range(2))
    separate = {name: torch.cat([p.grad for p in ps]).norm() for name, ps in ours.items()}
    norms = clip_gradients(ours, maximum)
    total = torch.nn.utils.clip_grad_norm_([p for ps in theirs.values() for p in ps], maximum)
    torch.testing.assert_close(norms, {**separate, "total": total}, atol=0, rtol=1e-6)
    for name, parameters in ours.items():
        for mine, reference in zip(parameters, theirs[name], strict=True):
            torch.testing.assert_close(mine.grad, reference.grad, atol=0, rtol=1e-6)


def test_a_group_the_data_did_not_reach():
    """No gradient at all: norm 0, and the others are clipped as if it were not there."""
    groups = groups_of({"language": (3,), "projector": (4,)})
    groups["projector"][0].grad = None
    norms = clip_gradients(groups, 0.5)
    assert float(norms["projector"]) == 0 and groups["projector"][0].grad is None
    assert float(norms["total"]) == pytest.approx(float(norms["language"]))
    assert float(gradient_norms(groups)["language"]) == pytest.approx(0.5, rel=1e-5)  # torch adds 1e-6 to the norm


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_group_and_the_total(bad):
    groups = groups_of({"language": (3,), "projector": (4,)})
    groups["projector"][0].grad[1] = bad
    norms = clip_gradients(groups, 1.0)
    assert [bool(torch.isfinite(norms[n])) for n in ("language", "projector", "total")] == [True, False, False]


def test_a_rule_with_a_limit_of_its_own_is_clipped_alone():
    """SPEC D4: vision at 0.5, the rest together at 1.0; each as torch clips that part alone."""
    sizes = {"vision": (5, 6), "language": (3, 8), "projector": (4,)}
    ours, theirs = groups_of(sizes), groups_of(sizes)
    norms = clip_gradients(ours, 1.0, {"vision": 0.5})
    torch.nn.utils.clip_grad_norm_(theirs["vision"], 0.5)
    torch.nn.utils.clip_grad_norm_([*theirs["language"], *theirs["projector"]], 1.0)
    for name, parameters in ours.items():
        for mine, reference in zip(parameters, theirs[name], strict=True):
            torch.testing.assert_close(mine.grad, reference.grad, atol=0, rtol=1e-6)
    everything = torch.cat([p.grad for ps in groups_of(sizes).values() for p in ps]).norm()
    torch.testing.assert_close(norms["total"], everything, atol=0, rtol=1e-6)


def test_without_a_limit_nothing_is_scaled():
    ours, before = groups_of({"language": (3, 8)}), groups_of({"language": (3, 8)})
    norms = clip_gradients(ours, None)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours["language"], before["language"], strict=True))
    assert float(norms["total"]) > 1


def test_what_starts_to_train_has_a_fresh_state():
    """SPEC F1: frozen parameters have no state and take no part; unfrozen ones start at AdamW's first step."""
    optimizer, a, b = optimizer_of(0)
    assert set_active(optimizer, lambda rule: rule == "language")
    assert a.requires_grad and not b.requires_grad
    for n in range(3):
        step(optimizer, a, seed=n)
    assert b not in optimizer.state
    assert not set_active(optimizer, lambda rule: rule == "language"), "nothing changed"
    assert set_active(optimizer, lambda rule: True)
    step(optimizer, a, b, seed=4)
    assert float(optimizer.state[a]["step"]) == 4 and float(optimizer.state[b]["step"]) == 1
    assert set_active(optimizer, lambda rule: rule == "projector")
    assert a not in optimizer.state and not a.requires_grad and a.grad is None


def optimizer_of(seed: int):
    torch.manual_seed(seed)
    a, b = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))
    groups = [
        {"params": [a], "names": ["language.a"], "rule": "language", "lr": 1e-2, "weight_decay": 0.1},
        {"params": [b], "names": ["projector.b"], "rule": "projector", "lr": 1e-3, "weight_decay": 0.0},
    ]
    return build_adamw(groups, (0.9, 0.99), 1e-8), a, b


def step(optimizer, *parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


def test_state_survives_by_name_bit_for_bit():
    """Save after 3 steps, load into a fresh optimizer over the same weights, take a fourth step with both."""
    one, a, b = optimizer_of(0)
    for n in range(3):
        step(one, a, b, seed=n)
    stored = {name: value.clone() for name, value in optimizer_tensors(one).items()}
    assert set(stored) == {f"{p}/{k}" for p in ("language.a", "projector.b") for k in ("step", "exp_avg", "exp_avg_sq")}
    other, c, d = optimizer_of(1)
    with torch.no_grad():
        c.copy_(a), d.copy_(b)
    load_optimizer_tensors(other, stored)
    step(one, a, b, seed=9), step(other, c, d, seed=9)
    assert torch.equal(a, c) and torch.equal(b, d)
    later = optimizer_tensors(other)
    assert all(torch.equal(value, later[name]) for name, value in optimizer_tensors(one).items())
    assert not torch.equal(stored["language.a/exp_avg"], later["language.a/exp_avg"]), "the stored tensors are copies"


def test_a_parameter_that_never_had_a_gradient_has_no_state():
    """A projector that no batch has reached yet: nothing is stored, and it starts from nothing after the resume."""
    one, a, _ = optimizer_of(0)
    step(one, a, seed=0)
    stored = optimizer_tensors(one)
    assert {name.split("/")[0] for name in stored} == {"language.a"}
    other, c, d = optimizer_of(0)
    load_optimizer_tensors(other, stored)
    step(other, c, d, seed=1)
    assert float(optimizer_tensors(other)["projector.b/step"]) == 1
    assert float(optimizer_tensors(other)["language.a/step"]) == 2


def test_state_of_an_unknown_parameter_is_refused():
    one, a, b = optimizer_of(0)
    step(one, a, b, seed=0)
    stored = {name.replace("projector.b", "projector.c"): value for name, value in optimizer_tensors(one).items()}
    with pytest.raises(VlmtuneError, match=r"projector\.c"):
        load_optimizer_tensors(optimizer_of(1)[0], stored)


def test_learning_rates_scale_from_the_peak():
    optimizer, _, _ = optimizer_of(0)
    for factor in (0.1, 1.0, 0.5):
        expected = {"language": 1e-2 * factor, "projector": 1e-3 * factor}
        assert set_learning_rates(optimizer, lambda rule, factor=factor: factor) == expected
        assert {group["rule"]: group["lr"] for group in optimizer.param_groups} == expected
