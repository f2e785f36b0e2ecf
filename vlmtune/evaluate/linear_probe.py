"""A linear probe: multinomial logistic regression on frozen features (Alain & Bengio 2017; SPEC A7).

Features have more dimensions than there are samples, so the regression is solved in the span of the training samples:
with a quadratic penalty the best weights lie in it, and nothing is lost (the representer theorem). N samples,
D dimensions, K labels, R <= N coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

Array = NDArray[np.float64]

PENALTIES = tuple(10.0**power for power in np.arange(0.0, -5.5, -0.5))
"""Tried from the strongest to the weakest, each starting from the last: features are scaled to a mean square of 1 per
sample, so that these mean the same whatever the tower."""
FOLDS = 4
TINY = 1e-10  # of the largest eigenvalue: below it there is rounding only


@dataclass(frozen=True)
class LinearProbe:
    """labels: of the K rows of weights float64[K, D] and bias float64[K]. mean, scale float64[D]: of the features that
    it was fitted on. penalty: the one chosen."""

    labels: tuple[str, ...]
    weights: Array
    bias: Array
    mean: Array
    scale: Array
    penalty: float

    def predict(self, features: Array) -> list[str]:
        """The most probable label of each of float[N, D]."""
        logits = ((features - self.mean) * self.scale) @ self.weights.T + self.bias
        return [self.labels[best] for best in logits.argmax(1)]


def fit_probe(
    features: Array,
    answers: Sequence[str],
    blocks: Sequence[int] = (),
    penalties: Sequence[float] = PENALTIES,
) -> LinearProbe:
    """float[N, D] and the answer of each sample -> the probe, of the answers there are.

    The penalty with the smallest log loss in cross-validation is chosen (FOLDS folds of neighbouring samples: questions
    about one image stay together), then all samples are fitted. Features are centred and scaled first: to unit
    variance, and each block (of so many columns; default: one) to a mean square of 1 per sample, however many columns
    it has. Deterministic. ValueError without any.
    """
    if not answers or len(answers) != len(features):
        raise ValueError(f"a probe needs features and answers, as many of both; got {len(features)}, {len(answers)}")
    labels = tuple(sorted(set(answers)))
    targets = np.array([labels.index(answer) for answer in answers])
    mean = features.mean(0, dtype=np.float64)
    spread = features.std(0, dtype=np.float64)
    varies = spread > 1e-6 * np.abs(mean)  # else rounding only
    scale = np.where(varies, 1.0 / np.where(varies, spread, 1.0), 0.0)
    for part in np.split(np.arange(len(scale)), np.cumsum(blocks)):
        scale[part] /= np.sqrt(max(1, varies[part].sum()))
    if len(labels) == 1:
        return LinearProbe(labels, np.zeros((1, features.shape[1])), np.zeros(1), mean, scale, penalties[0])
    scaled = (features - mean) * scale
    coordinates, basis = span(scaled)
    penalty = _chosen(coordinates, targets, len(labels), penalties)
    weights, bias = solve(coordinates, targets, len(labels), penalty)
    return LinearProbe(labels, weights @ basis.T, bias, mean, scale, penalty)


def span(features: Array) -> tuple[Array, Array]:
    """float64[N, D] -> coordinates float64[N, R] and an orthonormal basis float64[D, R], whose product it is."""
    if features.shape[1] <= features.shape[0]:
        return features, np.eye(features.shape[1])
    values, vectors = np.linalg.eigh(features @ features.T)
    kept = values > TINY * values[-1]
    lengths = np.sqrt(values[kept])
    return vectors[:, kept] * lengths, features.T @ (vectors[:, kept] / lengths)


def solve(
    features: Array, targets: NDArray[np.int64], labels: int, penalty: float, start: tuple[Array, Array] | None = None
) -> tuple[Array, Array]:
    """The weights float64[K, D] and bias float64[K] with the least mean log loss + penalty / 2 * |weights|^2.

    The bias is not penalised; it is made to sum to 0, which changes no probability.
    """
    count, dimensions = features.shape
    first = (np.zeros((labels, dimensions)), np.zeros(labels)) if start is None else start

    def objective(flat: Array) -> tuple[float, Array]:
        return log_loss(flat, features, targets, labels, penalty)

    found = minimize(
        objective, np.concatenate([first[0].ravel(), first[1]]), jac=True, method="L-BFGS-B",
        options={"maxiter": 500, "ftol": 1e-12, "gtol": 1e-7},
    ).x  # fmt: skip
    weights, bias = found[: labels * dimensions].reshape(labels, dimensions), found[labels * dimensions :]
    return weights, bias - bias.mean()


def log_loss(
    flat: Array, features: Array, targets: NDArray[np.int64], labels: int, penalty: float
) -> tuple[float, Array]:
    """The objective of `solve` and its gradient. flat: weights float64[K, D], then bias float64[K]."""
    count, dimensions = features.shape
    weights, bias = flat[: labels * dimensions].reshape(labels, dimensions), flat[labels * dimensions :]
    logits = features @ weights.T + bias
    rows = np.arange(count)
    logits -= logits.max(1, keepdims=True)  # by hand: scipy's softmax costs more than all else at these sizes
    excess = np.exp(logits)
    sums = excess.sum(1, keepdims=True)
    loss = float((np.log(sums[:, 0]) - logits[rows, targets]).mean() + penalty / 2 * np.vdot(weights, weights))
    excess /= sums
    excess[rows, targets] -= 1.0
    excess /= count
    return loss, np.concatenate([(excess.T @ features + penalty * weights).ravel(), excess.sum(0)])


def _chosen(coordinates: Array, targets: NDArray[np.int64], labels: int, penalties: Sequence[float]) -> float:
    """Of the penalties, from the strongest to the weakest, the one with the smallest log loss on what was left out."""
    losses = np.zeros(len(penalties))
    folds = np.arange(len(targets)) * FOLDS // len(targets)
    for fold in range(FOLDS):
        kept, left_out = folds != fold, folds == fold
        if not left_out.any() or not kept.any():
            continue
        solution = None
        for number, penalty in enumerate(penalties):
            solution = solve(coordinates[kept], targets[kept], labels, penalty, solution)
            said = log_softmax(coordinates[left_out] @ solution[0].T + solution[1], axis=1)
            losses[number] -= said[np.arange(left_out.sum()), targets[left_out]].sum()
    return float(penalties[int(losses.argmin())])
