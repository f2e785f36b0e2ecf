"""The linear probe against closed forms, finite differences, another solver, and data whose answer is known (A7)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, check_grad

from vlmtune.evaluate.linear_probe import PENALTIES, fit_probe, log_loss, solve, span


def clusters(seed: int, count: int, dimensions: int, noise: float) -> tuple[np.ndarray, list[str]]:
    """Three clusters around corners."""
    draw = np.random.default_rng(seed)
    centres = np.zeros((3, dimensions))
    centres[np.arange(3), np.arange(3)] = 4.0
    kinds = draw.integers(0, 3, count)
    return centres[kinds] + noise * draw.normal(size=(count, dimensions)), [f"kind {kind}" for kind in kinds]


@pytest.mark.parametrize("wrong, penalty", [(0.1, 0.3), (0.25, 0.01), (0.4, 1e-3)])
def test_one_feature_of_two_values_by_hand(wrong, penalty):
    """x = +1 or -1; the label follows it but for a share q, `wrong`. By symmetry weights are (w, -w), the bias 0; the
    derivative of -(1-q) log s(2w) - q log s(-2w) + penalty w^2 is 0 where 1 - q - s(2w) = penalty w."""
    count = 40
    x = np.repeat([1.0, -1.0], count)
    flipped = np.tile(np.arange(count) < wrong * count, 2)
    targets = np.where((x > 0) ^ flipped, 0, 1)
    expected = brentq(lambda w: 1 - wrong - 1 / (1 + np.exp(-2 * w)) - penalty * w, 0, 100)
    weights, bias = solve(x[:, None], targets, 2, penalty)
    # L-BFGS stops at a gradient of 1e-7; the curvature here is at least 1e-3
    assert weights.ravel() == pytest.approx([expected, -expected], abs=1e-4)
    assert bias == pytest.approx([0, 0], abs=1e-4)


def test_the_gradient_by_finite_differences():
    draw = np.random.default_rng(0)
    x, targets = draw.normal(size=(12, 5)), draw.integers(0, 3, 12)
    flat = draw.normal(size=3 * 5 + 3)

    def part(which: int):
        return lambda at: log_loss(at, x, targets, 3, 0.1)[which]

    assert check_grad(part(0), part(1), flat) < 1e-6  # steps of 1.5e-8: half of the digits of float64


def test_another_solver_finds_the_same_weights():
    """torch's LBFGS on cross_entropy in all dimensions; ours in the span of the samples."""
    x, answers = clusters(1, 30, 50, 2.0)
    targets = np.array([int(answer[-1]) for answer in answers])
    coordinates, basis = span(x)
    assert coordinates.shape[1] <= 30 and np.allclose(coordinates @ basis.T, x, atol=1e-9)
    weights, bias = solve(coordinates, targets, 3, 0.05)

    theirs, offset = torch.zeros(3, 50, dtype=torch.double), torch.zeros(3, dtype=torch.double)
    parameters = [theirs.requires_grad_(), offset.requires_grad_()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")
    inputs, wanted = torch.tensor(x), torch.tensor(targets)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(inputs @ theirs.T + offset, wanted) + 0.025 * (theirs**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert np.allclose(weights @ basis.T, theirs.detach().numpy(), atol=1e-4)
    assert np.allclose(bias, (offset - offset.mean()).detach().numpy(), atol=1e-4)


def test_what_is_separable_is_found_and_what_is_noise_is_not():
    x, answers = clusters(2, 90, 20, 0.5)
    probe = fit_probe(x[:60], answers[:60])
    assert probe.predict(x[60:]) == answers[60:]
    shuffled = list(np.random.default_rng(3).permutation(answers[:60]))
    hits = np.mean([a == b for a, b in zip(fit_probe(x[:60], shuffled).predict(x[60:]), answers[60:], strict=True)])
    assert hits < 0.75, "labels without a relation to the features cannot be predicted"


def test_noise_gets_a_strong_penalty_and_signal_a_weak_one():
    x, answers = clusters(4, 80, 300, 0.3)
    draw = np.random.default_rng(5)
    noise = fit_probe(draw.normal(size=(80, 300)), answers).penalty
    assert fit_probe(x, answers).penalty < noise and noise >= 0.1 * PENALTIES[0]


def test_units_and_features_that_never_vary_do_not_matter():
    x, answers = clusters(6, 60, 8, 1.5)
    scaled = x * np.array([1e4, 1e-4, 1, 1, 1, 1, 1, 1]) + 1.0
    wider = np.concatenate([scaled, np.full((60, 3), 7.0)], axis=1)
    assert fit_probe(wider, answers).predict(wider) == fit_probe(x, answers).predict(x)


def test_a_small_block_counts_as_much_as_a_large_one():
    """One column that tells the answer beside 2000 of noise: lost among them in one block, seen in one of its own."""
    draw = np.random.default_rng(7)
    kinds = draw.integers(0, 2, 120)
    x = np.concatenate([draw.normal(size=(120, 2000)), kinds[:, None] * 2.0], axis=1)
    answers = [str(kind) for kind in kinds]

    def hits(blocks: list[int]) -> float:
        said = fit_probe(x[:60], answers[:60], blocks).predict(x[60:])
        return float(np.mean([a == b for a, b in zip(said, answers[60:], strict=True)]))

    assert hits([2000]) == 1.0 and hits([]) < 0.9


def test_one_answer_and_none():
    assert fit_probe(np.ones((3, 4)), ["yes"] * 3).predict(np.zeros((2, 4))) == ["yes", "yes"]
    with pytest.raises(ValueError, match="got 2, 1"):
        fit_probe(np.ones((2, 3)), ["yes"])
    with pytest.raises(ValueError):
        fit_probe(np.ones((0, 3)), [])


def test_the_same_data_give_the_same_probe():
    x, answers = clusters(8, 40, 60, 2.0)
    one, other = fit_probe(x, answers), fit_probe(x.copy(), list(answers))
    assert np.array_equal(one.weights, other.weights) and one.penalty == other.penalty
