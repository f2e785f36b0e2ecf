"""The loop. cli -> Trainer.fit -> Trainer.train_step -> optimizer.step: three frames of our own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from vlmtune.adapt.plan import Plan
from vlmtune.checkpoint import (
    TrainState,
    checkpoint_name,
    checkpoints,
    load_checkpoint,
    point,
    remove_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from vlmtune.losses.objective import Losses, Objective, StepWeights
from vlmtune.models.readouts import readouts_of
from vlmtune.models.vlm import VLM, set_training_mode
from vlmtune.optim.clip import clip_gradients
from vlmtune.optim.optimizer import set_learning_rates
from vlmtune.optim.precision import autocast
from vlmtune.types import Batch, VlmtuneError


@dataclass(frozen=True)
class Settings:
    """total_steps, checkpoint_every, eval_every (None: never during training), log_every: optimizer steps."""

    total_steps: int
    schedule: Callable[[int], float]  # step -> factor on every learning rate
    clip: float
    precision: Literal["bf16", "fp32"]
    log_every: int
    checkpoint_every: int
    keep: int
    eval_every: int | None
    best: str
    best_is: Literal["lowest", "highest"]


class Observer(Protocol):
    """Watches, never changes the update."""

    def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None: ...

    def on_eval(self, state: TrainState, metrics: dict[str, Any]) -> None: ...


class LossDriven(Protocol):
    """What draws samples by the losses of tasks: it hears of every step, and its history is part of a checkpoint."""

    @property
    def shares(self) -> dict[str, float]: ...

    def observe(self, losses: dict[str, float]) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class TrainingModule(nn.Module):
    """Model and objective as one module: what a distributed engine wraps."""

    def __init__(self, vlm: VLM, objective: Objective):
        super().__init__()
        self.vlm, self.objective = vlm, objective

    def forward(self, batch: Batch, step: StepWeights) -> Losses:
        states = self.vlm(batch, step.kinds, self.objective.read(self.vlm, batch, step))
        return self.objective(states, self.vlm.head, batch, step, readouts_of(self.vlm.model))


@dataclass(frozen=True)
class StepLosses:
    """Of one optimizer step: what was minimised, the mean of every task, weighted by kind of token and plain, and the
    means of further terms."""

    total: float
    tasks: dict[str, float]
    plain: dict[str, float]
    terms: dict[str, float]

    @classmethod
    def of(cls, parts: Sequence[Losses]) -> StepLosses:
        """Add up the micro-batches, with one wait for the device."""
        named = [
            (key, value)
            for part in parts
            for key, value in [
                (("total", ""), part.total),
                *((("task", name), value) for name, value in part.tasks.items()),
                *((("plain", name), value) for name, value in part.plain.items()),
                *((("term", name), value) for name, value in part.terms.items()),
            ]
        ]
        sums: dict[tuple[str, str], float] = {}
        values = torch.stack([value for _, value in named]).tolist()
        for (key, _), value in zip(named, values, strict=True):
            sums[key] = sums.get(key, 0.0) + value
        return cls(
            sums[("total", "")],
            {name: value for (group, name), value in sums.items() if group == "task"},
            {name: value for (group, name), value in sums.items() if group == "plain"},
            {name: value for (group, name), value in sums.items() if group == "term"},
        )


class Trainer:
    """Runs optimizer steps.

    steps: (start, stop) -> iterator over lists of micro-batches; evaluate: step -> metrics (keys "loss" and
    "group/task/metric"); folder: where checkpoints go; fingerprint: of the config; sampling: what draws the samples
    of `steps`, where that depends on losses.
    """

    def __init__(
        self,
        model,
        plan: Plan,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        steps: Callable[[int, int], Iterator[list[Batch]]],
        settings: Settings,
        folder: Path,
        fingerprint: str,
        device: torch.device,
        observers: Sequence[Observer] = (),
        evaluate: Callable[[int], dict[str, Any]] | None = None,
        sampling: LossDriven | None = None,
    ):
        self.model, self.plan, self.optimizer = model, plan, optimizer
        self.module = TrainingModule(VLM(model), objective)
        self.steps, self.settings, self.folder, self.fingerprint = steps, settings, folder, fingerprint
        self.device, self.observers, self.evaluate = device, observers, evaluate
        self.sampling = sampling
        self.groups = plan.groups()
        self.state = TrainState()
        self._saved_step: int | None = None

    def resume(self, checkpoint: Path) -> None:
        """Continue exactly where `checkpoint` was written."""
        self.state = load_checkpoint(
            checkpoint, self.model, self.plan, self.optimizer, self.fingerprint, self.module.objective
        )
        if self.sampling is not None:
            self.sampling.restore(self.state.extra["sampling"])
        written = self.folder / checkpoint_name(self.state.step)
        if written.is_dir():  # a kill may have come between writing it and naming it
            point(self.folder / "latest", written)
            if self.state.best_step == self.state.step:
                point(self.folder / "best", written)

    def fit(self) -> TrainState:
        """Train to the last step; checkpoints and evaluations on the way. Resumes are bit-exact on CPU."""
        settings, state = self.settings, self.state
        remove_leftovers(self.folder)
        set_training_mode(self.model)
        before = state.seconds
        started = arrived = time.perf_counter()
        for micro_batches in self.steps(state.step, settings.total_steps):
            waited = time.perf_counter() - arrived
            metrics = self.train_step(micro_batches)
            state.seconds = before + time.perf_counter() - started
            metrics |= {"data_wait": waited, "step_seconds": time.perf_counter() - arrived}
            self._tell("on_step", metrics)
            if settings.eval_every and state.step % settings.eval_every == 0 and state.step < settings.total_steps:
                self.run_evaluation()
            is_due = state.step % settings.checkpoint_every == 0 or state.step == settings.total_steps
            if is_due and self._saved_step != state.step:  # the evaluation saves what it finds best
                self.save()
            arrived = time.perf_counter()
        return state

    def train_step(self, micro_batches: list[Batch]) -> dict[str, Any]:
        """One optimizer step: count weights, forward and backward each micro-batch, clip, refuse or update."""
        lr = set_learning_rates(self.optimizer, self.settings.schedule(self.state.step))
        objective = self.module.objective
        weights = objective.weights(micro_batches, self.state.step / self.settings.total_steps)
        parts: list[Losses] = []
        for batch in micro_batches:
            with autocast(self.settings.precision, self.device):
                losses = self.module(batch.to(self.device), weights)  # sums / global weight: they add up
            losses.total.backward()
            parts.append(losses.detach())
        sums = StepLosses.of(parts)
        if self.state.step == 0:
            self.refuse_missing_gradients()
        norms = clip_gradients(self.groups, self.settings.clip)
        self.refuse_not_finite(sums, norms, micro_batches)
        coefficients = objective.balance.coefficients(weights.tasks)
        objective.balance.before_update(sums.tasks)
        self.optimizer.step()
        objective.balance.after_update()
        self.optimizer.zero_grad()
        shares = {} if self.sampling is None else self.sampling.shares
        if self.sampling is not None:
            self.sampling.observe(sums.tasks)
        self.state.step += 1
        samples = sum(len(batch.sample_ids) for batch in micro_batches)
        tokens = sum(int(batch.inputs["attention_mask"].sum()) for batch in micro_batches)
        self.state.samples += samples
        self.state.tokens += tokens
        return {
            "loss": sums.total, "losses": sums.tasks, "plain": sums.plain, "weights": weights.tasks,
            "supervised": weights.tokens, "coefficients": coefficients,
            "shares": shares, "terms": sums.terms, "term_counts": weights.counts, "exposure": weights.exposure,
            "norms": norms, "lr": lr, "samples": samples, "tokens": tokens,
        }  # fmt: skip

    def refuse_missing_gradients(self) -> None:
        """After the first backward every parameter meant to train has a gradient, or the run stops and names it."""
        missing = [name for name, p in self.plan.parameters.items() if p.grad is None]
        if missing:
            raise VlmtuneError(
                f"plan: {len(missing)} of {len(self.plan.parameters)} parameters meant to train got no gradient, "
                f"first {missing[0]}; freeze them, or check that the data reaches that part (vision needs images)."
            )

    def refuse_not_finite(self, sums: StepLosses, norms: dict[str, Tensor], batches: list[Batch]) -> None:
        """Stop before the update when a loss or gradient norm is NaN or infinite."""
        if math.isfinite(float(norms["total"]) + sums.total):
            return
        bad = [rule for rule, norm in norms.items() if rule != "total" and not bool(torch.isfinite(norm))]
        tasks = [name for name, loss in sums.tasks.items() if not math.isfinite(loss)]
        ids = [sample_id for batch in batches for sample_id in batch.sample_ids]
        shown = ", ".join(ids[:8]) + (" …" if len(ids) > 8 else "")
        raise VlmtuneError(
            f"step {self.state.step + 1}: not finite: gradient of {', '.join(bad) or 'no rule'}, "
            f"loss of {', '.join(tasks) or 'no task'}; nothing was updated. Samples of this step: {shown}. "
            "Lower optim.lr, look at these samples with `vlmtune inspect`, or try train.precision=fp32."
        )

    def run_evaluation(self) -> dict[str, Any] | None:
        """Evaluate without touching the training RNG, and remember whether this is the best so far."""
        if self.evaluate is None:
            return None
        rng = torch.get_rng_state()
        self.model.eval()
        metrics = self.evaluate(self.state.step)
        set_training_mode(self.model)
        torch.set_rng_state(rng)
        value = metrics.get(self.settings.best)
        if value is None:
            raise VlmtuneError(
                f"checkpoint.best is {self.settings.best!r}, but evaluation reports {', '.join(sorted(metrics))}."
            )
        better = self.state.best is None or (
            value < self.state.best if self.settings.best_is == "lowest" else value > self.state.best
        )
        if better:
            self.state.best, self.state.best_step = value, self.state.step
        self._tell("on_eval", metrics)
        if better and self.state.step:
            self.save()
            point(self.folder / "best", self.folder / checkpoint_name(self.state.step))
        return metrics

    def save(self) -> Path:
        """Write a checkpoint, point `latest` at it, delete what is neither best, latest nor among the newest kept."""
        folder = self.folder / checkpoint_name(self.state.step)
        if self.sampling is not None:
            self.state.extra["sampling"] = self.sampling.state()
        save_checkpoint(
            folder, self.model, self.plan, self.optimizer, self.state, self.fingerprint, self.module.objective
        )
        point(self.folder / "latest", folder)
        best = self.folder / "best"
        kept = {p.resolve() for p in checkpoints(self.folder)[-self.settings.keep :]}
        kept |= {best.resolve()} if best.exists() else set()
        for old in checkpoints(self.folder):
            if old.resolve() not in kept:
                remove_checkpoint(old)
        self._saved_step = self.state.step
        return folder

    def _tell(self, event: str, metrics: dict[str, Any]) -> None:
        for observer in self.observers:
            getattr(observer, event)(self.state, metrics)
