"""How the mean losses of several tasks become one number (SPEC B5-B8).

Every balance takes shares of the tasks' mean losses, one micro-batch at a time, so that what it returns adds up over
the micro-batches of a step. All are of the size of a mean over tasks (weights divided by their number), so a learning
rate that fits one fits the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vlmtune.losses.wishes import require_task_weights

SMALLEST_WEIGHT = 1e-3  # of GradNorm: a weight at or below zero would ask for a larger loss


class Balance(nn.Module):
    """The interface: forward per micro-batch, then `before_update` and `after_update` once per step."""

    def forward(self, losses: dict[str, Tensor], weights: dict[str, float], micro_batches: int) -> Tensor:
        """Scalar to differentiate. losses: task -> share of its mean loss that this micro-batch holds, float32 scalar;
        weights: task -> sum of token weights in the whole step (0: nothing to learn); micro_batches: of the step."""
        raise NotImplementedError

    def coefficients(self, weights: dict[str, float]) -> dict[str, float]:
        """What each task's mean loss is multiplied with; weights: sum of token weights of each task in the step."""
        raise NotImplementedError

    def gathered(self, weights: dict[str, float]) -> list[Tensor]:
        """What the micro-batches so far added up to besides gradients, to be added up over processes in place; the same
        tensors in all of them. weights: task -> sum of token weights in the whole step."""
        return []

    def before_update(self, losses: dict[str, float]) -> None:
        """After the backward of the last micro-batch. losses: task -> mean loss of the step, for the tasks in it."""

    def forget_step(self) -> None:
        """The step is over, with or without an update: drop what was gathered of its gradients."""

    def after_update(self) -> None:
        """After the optimizer has moved what the balance learns."""


class ByTokens(Balance):
    """Every token counts the same: the mean over all tokens of the step, whatever their task."""

    def forward(self, losses: dict[str, Tensor], weights: dict[str, float], micro_batches: int) -> Tensor:
        return _weighted(losses, self.coefficients(weights))

    def coefficients(self, weights: dict[str, float]) -> dict[str, float]:
        total = sum(weights.values())
        return {task: weight / total for task, weight in weights.items() if weight > 0}


class Fixed(Balance):
    """The sum of w_i L_i with the given weights. Raises VlmtuneError for negative or all-zero weights."""

    def __init__(self, tasks: Mapping[str, float]):
        super().__init__()
        require_task_weights(tasks)
        self.tasks = dict(tasks)

    def forward(self, losses: dict[str, Tensor], weights: dict[str, float], micro_batches: int) -> Tensor:
        return _weighted(losses, self.tasks)

    def coefficients(self, weights: dict[str, float]) -> dict[str, float]:
        return dict(self.tasks)


class InitialLosses(nn.Module):
    """The loss every task began with: its mean over the first `steps` steps in which it appeared; saved with the run.

    given: where they are known already, such as from an evaluation of the base model.
    """

    def __init__(self, tasks: Sequence[str], steps: int, given: Mapping[str, float] | None = None):
        super().__init__()
        self.tasks, self.steps = list(tasks), steps
        self.register_buffer("sums", torch.zeros(len(tasks), dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(len(tasks), dtype=torch.int64))
        if given is not None:
            self.sums += torch.tensor([given[task] * steps for task in tasks], dtype=torch.float64)
            self.seen += steps

    @property
    def complete(self) -> bool:
        return bool((self.seen >= self.steps).all())

    def values(self) -> Tensor:
        """float64[tasks]; meaningful once `complete`."""
        return self.sums / self.seen.clamp(min=1)

    def add(self, losses: Mapping[str, float]) -> None:
        for n, task in enumerate(self.tasks):
            if task in losses and self.seen[n] < self.steps:
                self.sums[n] += losses[task]
                self.seen[n] += 1


class InverseInitial(Balance):
    """Weights in inverse proportion to the losses the tasks began with, summing to 1 (SPEC B8).

    Losses 2.5, 3.2, 1.8 give .32, .25, .43. Until every task's initial loss is known, all count the same.
    """

    def __init__(self, initial: InitialLosses):
        super().__init__()
        self.initial = initial

    def weights(self) -> Tensor:
        """float64[tasks], sum 1."""
        inverse = 1 / self.initial.values() if self.initial.complete else torch.ones_like(self.initial.sums)
        return inverse / inverse.sum()

    def forward(self, losses: dict[str, Tensor], weights: dict[str, float], micro_batches: int) -> Tensor:
        return _weighted(losses, self.coefficients(weights))

    def coefficients(self, weights: dict[str, float]) -> dict[str, float]:
        return _by_task(self.initial.tasks, self.weights())

    def before_update(self, losses: dict[str, float]) -> None:
        self.initial.add(losses)


class Uncertainty(Balance):
    """L_i / (2 σ_i²) + log σ_i with learned s_i = log σ_i², 0 at first (Kendall et al. 2018; SPEC B6).

    For a loss that stands still the optimum is σ_i² = L_i.
    """

    def __init__(self, tasks: Sequence[str]):
        super().__init__()
        self.tasks = list(tasks)
        self.log_variance = nn.Parameter(torch.zeros(len(self.tasks)))

    def forward(self, losses: dict[str, Tensor], weights: dict[str, float], micro_batches: int) -> Tensor:
        of_step = [n for n, task in enumerate(self.tasks) if weights.get(task, 0) > 0]
        total = 0.5 * self.log_variance[of_step].sum() / micro_batches
        for task, loss in losses.items():
            total = total + 0.5 * torch.exp(-self.log_variance[self.tasks.index(task)]) * loss
        return total / len(self.tasks)

    def coefficients(self, weights: dict[str, float]) -> dict[str, float]:
        return _by_task(self.tasks, 0.5 * torch.exp(-self.log_variance.detach()) / len(self.tasks))


class GradNorm(Balance):
    """Learned weights that let all tasks train at the same rate (Chen et al. 2018; SPEC B7).

    G_i is the norm of the gradient of w_i L_i at the shared parameters. Its target is mean(G) · r_i^α, where r_i is the
    inverse training rate L_i / L_i(0) relative to the mean of the tasks. The weights go down the gradient of the sum of
    |G_i - target_i|, targets held constant, and are renormalised to sum to the number of tasks.

    shared: parameters of the last block that all tasks train; alpha: how strongly slow tasks are pulled up.
    """

    def __init__(self, initial: InitialLosses, shared: Sequence[nn.Parameter], alpha: float = 1.5):
        super().__init__()
        self.tasks, self.initial, self.alpha = initial.tasks, initial, alpha
        self.weights = nn.Parameter(torch.ones(len(self.tasks)))
        self._shared = tuple(shared)  # in a tuple, nn.Module does not take them for its own
        self._gradients: dict[str, list[Tensor]] = {}

    def forward(self, losses: dict[str, Tensor], weights: dict[str, float], micro_batches: int) -> Tensor:
        if torch.is_grad_enabled() and self.initial.complete:
            for task, loss in losses.items():
                self._add(task, torch.autograd.grad(loss, self._shared, retain_graph=True, allow_unused=True))
        return _weighted(losses, self.coefficients(weights))

    def _add(self, task: str, gradients: Sequence[Tensor | None]) -> None:
        """Gradients, not norms: the norm of a step's gradient is not the sum of its micro-batches' norms."""
        for total, gradient in zip(self._sums(task), gradients, strict=True):
            if gradient is not None:
                total += gradient

    def _sums(self, task: str) -> list[Tensor]:
        return self._gradients.setdefault(task, [torch.zeros_like(p) for p in self._shared])

    def gathered(self, weights: dict[str, float]) -> list[Tensor]:
        if not self.initial.complete:
            return []
        return [total for task in self.tasks if weights.get(task, 0) > 0 for total in self._sums(task)]

    def coefficients(self, weights: dict[str, float]) -> dict[str, float]:
        return _by_task(self.tasks, self.weights.detach() / len(self.tasks))

    def before_update(self, losses: dict[str, float]) -> None:
        """Sets the gradient of the weights; tasks that the step did not have keep theirs."""
        if not self.initial.complete:
            self.initial.add(losses)
            return
        index = [n for n, task in enumerate(self.tasks) if task in self._gradients]
        present = [self.tasks[n] for n in index]
        norms = torch.stack([_norm(self._gradients[task]) for task in present]).to(self.weights.device)
        rates = torch.tensor([losses[task] for task in present], dtype=torch.float64) / self.initial.values()[index]
        scaled = self.weights.detach()[index] * norms
        targets = scaled.mean() * (rates / rates.mean()).float().to(norms.device) ** self.alpha
        gradient = torch.zeros_like(self.weights)
        gradient[index] = torch.sign(scaled - targets) * norms
        self.weights.grad = gradient
        self._gradients = {}

    def forget_step(self) -> None:
        self._gradients = {}

    @torch.no_grad()
    def after_update(self) -> None:
        self.weights.clamp_(min=SMALLEST_WEIGHT)
        self.weights *= len(self.tasks) / self.weights.sum()


def _weighted(losses: dict[str, Tensor], coefficients: Mapping[str, float]) -> Tensor:
    return sum((coefficients[task] * loss for task, loss in losses.items()), torch.zeros(()))


def _by_task(tasks: Sequence[str], values: Tensor) -> dict[str, float]:
    return dict(zip(tasks, values.tolist(), strict=True))


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients]))
