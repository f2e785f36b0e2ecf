"""Several tasks, one number: every balance against its closed form, its paper or autograd (SPEC B5-B8)."""

from __future__ import annotations

import pytest
import torch
from sizes_of_tests import by_default
from torch import Tensor, nn

from vlmtune.errors import VlmtuneError
from vlmtune.losses.balance import (
    Balance,
    ByTokens,
    Fixed,
    GradNorm,
    InitialLosses,
    InverseInitial,
    Uncertainty,
)

NAMES = ["a", "b", "c"]
ONES = dict.fromkeys(NAMES, 1.0)


def tensors(**losses: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in losses.items()}


def test_by_tokens_is_the_mean_over_tokens():
    total = ByTokens()(tensors(a=2.0, b=5.0), {"a": 30.0, "b": 10.0, "c": 0.0}, 1)
    assert float(total) == pytest.approx((2 * 30 + 5 * 10) / 40)


def test_fixed_is_the_weighted_sum():
    balance = Fixed({"a": 2.0, "b": 0.0, "c": 1.0})
    assert float(balance(tensors(a=2.0, b=5.0), ONES, 1)) == 4.0
    assert balance.coefficients({"a": 1.0}) == {"a": 2.0, "b": 0.0, "c": 1.0}


@pytest.mark.parametrize("weights", [{"a": -1.0, "b": 2.0}, {"a": 0.0, "b": 0.0}, {}])
def test_fixed_refuses_weights_that_cannot_be(weights):
    with pytest.raises(VlmtuneError, match="none may be negative, and one must be above 0"):
        Fixed(weights)


def test_inverse_initial_gives_the_weights_of_the_handbook():
    """SPEC B8: 2.5, 3.2, 1.8 -> 0.32, 0.25, 0.43, from the first steps in which each task appears."""
    balance = InverseInitial(InitialLosses(NAMES, steps=2))
    assert balance.weights().tolist() == pytest.approx([1 / 3] * 3)
    for losses in ({"a": 2.0, "b": 3.0}, {"a": 3.0}, {"b": 3.4, "c": 1.8}, {"c": 1.8}, {"a": 9.0, "b": 9.0, "c": 9.0}):
        balance.before_update(losses)
    # 1/2.5, 1/3.2, 1/1.8 over their sum are .315, .246, .438; the handbook rounds so that they sum to 1
    assert balance.weights().tolist() == pytest.approx([0.32, 0.25, 0.43], abs=0.01)
    known = InverseInitial(InitialLosses(NAMES, 2, given={"a": 2.5, "b": 3.2, "c": 1.8}))
    assert known.weights().tolist() == pytest.approx(balance.weights().tolist())
    again = InverseInitial(InitialLosses(NAMES, steps=2))
    again.load_state_dict(balance.state_dict())
    assert again.coefficients(ONES) == balance.coefficients(ONES)


def test_uncertainty_settles_where_the_variance_is_the_loss():
    """d/ds of L/2 e^-s + s/2 is zero at e^s = L."""
    balance = Uncertainty(NAMES)
    optimizer = torch.optim.AdamW(balance.parameters(), lr=0.05, weight_decay=0)
    for _ in range(600):
        balance(tensors(a=0.1, b=1.0, c=7.0), ONES, 1).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.exp(balance.log_variance).tolist() == pytest.approx([0.1, 1.0, 7.0], rel=1e-3)


def test_the_gradient_of_uncertainty_by_finite_differences():
    balance = Uncertainty(NAMES).double()
    with torch.no_grad():
        balance.log_variance.copy_(torch.tensor([0.3, -1.0, 2.0]))
    losses = {name: torch.tensor(value, dtype=torch.float64) for name, value in zip(NAMES, (0.5, 2, 4), strict=True)}

    def value(s: Tensor) -> Tensor:
        return torch.func.functional_call(balance, {"log_variance": s}, (losses, ONES, 1))

    assert torch.autograd.gradcheck(value, balance.log_variance.detach().clone().requires_grad_())


def test_uncertainty_moves_nothing_of_an_absent_task():
    balance = Uncertainty(NAMES)
    balance(tensors(a=3.0), {"a": 4.0, "b": 0.0}, 1).backward()
    moved = balance.log_variance.grad
    assert moved[0] != 0 and not moved[1:].any()


class Trunk(nn.Module):
    """A shared body and a head for each task; losses are squared errors."""

    def __init__(self, inputs: int, hidden: int, outputs: int, tasks: int):
        super().__init__()
        body = [layer for n in range(3) for layer in (nn.Linear(inputs if n == 0 else hidden, hidden), nn.ReLU())]
        self.body = nn.Sequential(*body)
        self.heads = nn.ModuleList(nn.Linear(hidden, outputs) for _ in range(tasks))

    @property
    def shared(self) -> list[nn.Parameter]:
        return list(self.body[-2].parameters())

    def losses(self, x: Tensor, targets: list[Tensor]) -> dict[str, Tensor]:
        state = self.body(x)
        return {
            name: (head(state) - target).square().mean()
            for name, head, target in zip(NAMES, self.heads, targets, strict=False)
        }


def trunk_and_data(tasks: int = 3) -> tuple[Trunk, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(16, 6)
    return Trunk(6, 8, 4, tasks), x, [scale * torch.randn(16, 4) for scale in (1.0, 3.0, 0.5)[:tasks]]


def test_gradnorms_gradient_is_autograds():
    """The second source: G_i(w) written out with a graph, targets detached, differentiated by autograd."""
    trunk, x, targets = trunk_and_data()
    initial = {"a": 0.7, "b": 20.0, "c": 0.4}
    balance = GradNorm(InitialLosses(NAMES, 1, given=initial), trunk.shared, alpha=1.5)
    with torch.no_grad():
        balance.weights.copy_(torch.tensor([0.5, 0.3, 2.2]))
    losses = trunk.losses(x, targets)
    balance(losses, ONES, 1).backward(retain_graph=True)
    balance.before_update({name: loss.item() for name, loss in losses.items()})

    w = balance.weights.detach().clone().requires_grad_()
    norms = []
    for n, loss in enumerate(losses.values()):
        gradients = torch.autograd.grad(w[n] * loss, trunk.shared, create_graph=True, retain_graph=True)
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
    norms = torch.stack(norms)
    rates = torch.stack([losses[name].detach() / initial[name] for name in NAMES])
    target = (norms.mean() * (rates / rates.mean()) ** 1.5).detach()
    (norms - target).abs().sum().backward()
    torch.testing.assert_close(balance.weights.grad, w.grad, rtol=1e-5, atol=1e-7)
    assert w.grad.abs().min() > 0


def test_the_weights_of_gradnorm_sum_to_the_number_of_tasks_and_stay_positive():
    trunk, _, _ = trunk_and_data()
    balance = GradNorm(InitialLosses(NAMES, 1), trunk.shared)
    with torch.no_grad():
        balance.weights.copy_(torch.tensor([-0.5, 1.0, 4.0]))
    balance.after_update()
    assert float(balance.weights.sum()) == pytest.approx(3.0) and float(balance.weights.min()) > 0


@pytest.mark.parametrize("kind", ["tokens", "fixed", "inverse", "uncertainty", "gradnorm"])
def test_micro_batches_add_up(kind):
    """Halves of a step give the value and the gradients of the whole step, those of the balance's own included."""
    results = []
    for parts in (1, 2):
        trunk, x, targets = trunk_and_data()
        balance = _balance(kind, trunk)
        total = 0.0
        for part in range(parts):
            rows = slice(part * 16 // parts, (part + 1) * 16 // parts)
            losses = trunk.losses(x[rows], [target[rows] for target in targets])
            value = balance({name: loss / parts for name, loss in losses.items()}, ONES, parts)
            value.backward()
            total += value.item()
        with torch.no_grad():
            means = {name: loss.item() for name, loss in trunk.losses(x, targets).items()}
        balance.before_update(means)
        gradients = [p.grad for p in [*trunk.parameters(), *balance.parameters()]]
        results.append((total, gradients))
    # float32: sums of 16 in another order
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def _balance(kind: str, trunk: Trunk) -> Balance:
    initial = InitialLosses(NAMES, 1, given={"a": 0.7, "b": 20.0, "c": 0.4})
    match kind:
        case "tokens":
            return ByTokens()
        case "fixed":
            return Fixed({"a": 0.3, "b": 1.0, "c": 2.0})
        case "inverse":
            return InverseInitial(initial)
        case "uncertainty":
            return Uncertainty(NAMES)
        case _:
            return GradNorm(initial, trunk.shared)


SCALES = (1.0, 10.0)


def _toy(balanced: bool, seed: int, steps: int = 500) -> tuple[list[float], list[float], float]:
    """Chen et al. section 4, smaller: tasks σ_i tanh((B + ε_i) x) of different scale on one trunk.

    Returns each task's loss relative to where it began, the weights, and how many times larger the gradient of the
    second task is at the shared block.
    """
    torch.manual_seed(seed)
    common = torch.randn(10, 20) * 10**0.5
    own = [torch.randn(10, 20) * 3.5**0.5 for _ in SCALES]
    trunk = Trunk(20, 60, 10, len(SCALES))
    names = NAMES[: len(SCALES)]
    balance = GradNorm(InitialLosses(names, 1), trunk.shared, alpha=0.12)
    groups = [{"params": list(trunk.parameters()), "lr": 2e-3}]
    if balanced:
        groups.append({"params": [balance.weights], "lr": 0.025})
    optimizer = torch.optim.Adam(groups)
    ones = dict.fromkeys(names, 1.0)

    def batch() -> tuple[Tensor, list[Tensor]]:
        x = torch.randn(100, 20) * 0.1
        return x, [s * torch.tanh(x @ (common + mine).T) for s, mine in zip(SCALES, own, strict=True)]

    for _ in range(steps):
        losses = trunk.losses(*batch())
        balance(losses, ones, 1).backward()
        balance.before_update({name: loss.item() for name, loss in losses.items()})
        optimizer.step()
        optimizer.zero_grad()
        balance.after_update()
    x, targets = zip(*(batch() for _ in range(10)), strict=True)
    losses = trunk.losses(torch.cat(x), [torch.cat(parts) for parts in zip(*targets, strict=True)])
    norms = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, trunk.shared, retain_graph=True)]).norm().item()
        for loss in losses.values()
    ]
    first = balance.initial.values().tolist()
    relative = [loss.item() / begin for loss, begin in zip(losses.values(), first, strict=True)]
    return relative, balance.weights.tolist(), norms[1] / norms[0]


@pytest.mark.parametrize("seed", by_default([0], range(3)))
def test_gradnorm_on_the_toy_of_its_paper(seed):
    """Tasks of scale 1 and 10: with equal weights the small one stays behind, with GradNorm both losses fall together.

    The paper's figure 2 in small: the relative losses end closer to each other and lower in sum, and the weights make
    up for the ratio of the gradients (α is small), within the noise of single batches.
    """
    equal, _, _ = _toy(False, seed)
    balanced, (small, large), ratio = _toy(True, seed)
    assert sum(balanced) < 0.8 * sum(equal)
    assert balanced[0] / balanced[1] < 0.8 * equal[0] / equal[1]
    assert 0.5 < (small / large) / ratio < 2
