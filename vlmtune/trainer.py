"""The loop. cli -> Trainer.fit -> Trainer.train_step -> optimizer.step: three frames of our own."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from vlmtune.adapt.plan import Plan
from vlmtune.adapt.state import trained_buffers
from vlmtune.background import Background
from vlmtune.checkpoint import (
    Draft,
    Recorded,
    TrainState,
    checkpoint_name,
    checkpoints,
    load_checkpoint,
    load_sampling,
    newest_whole_checkpoint,
    point,
    read_state,
    remove_checkpoint,
    remove_leftovers,
)
from vlmtune.checks.during import GradientWatch, LossWatch, Watch, judge_overflow
from vlmtune.interrupt import Interrupted, StopRequest
from vlmtune.losses.objective import Objective
from vlmtune.models.batchnorm import SharedTower
from vlmtune.models.trunk import CachedVision
from vlmtune.models.vlm import VLM, set_training_mode
from vlmtune.observer import Observer
from vlmtune.optim.clip import AddUp, clip_gradients
from vlmtune.optim.optimizer import set_learning_rates
from vlmtune.optim.precision import LossScale, Precision
from vlmtune.optim.statistics import GradientStatistics
from vlmtune.optim.unfreeze import set_active
from vlmtune.probe import Probe
from vlmtune.processes import ALONE, Processes, step_seed
from vlmtune.recovery import NonFinite, Recovery, Snapshot
from vlmtune.schedule import Rate
from vlmtune.shards import is_sharded
from vlmtune.soundness import Soundness
from vlmtune.step import StepLosses, StepShare, StepSums, TrainingModule
from vlmtune.types import Batch, Finding, VlmtuneError

NOTHING_FINITE = "the stored samples have no finite loss"
HISTORY = 200  # steps whose loss and norm are remembered for a diagnosis


@dataclass(frozen=True)
class Settings:
    """total_steps, checkpoint_every, eval_every (None: never during training), log_every, statistics_every: optimizer
    steps.

    rates: rule -> how its learning rate moves, and whether it trains; clip: limit of the joint gradient norm of rules
    that are not in clip_by_rule; patience: evaluations that are not better by `delta` before the run stops; seed: of
    what several processes draw; asked_every: steps between two times that an observer generates replies; background:
    a thread writes checkpoints.
    """

    total_steps: int
    rates: Mapping[str, Rate]
    clip: float | None
    clip_by_rule: Mapping[str, float]
    precision: Precision
    log_every: int
    checkpoint_every: int
    keep: int
    eval_every: int | None
    best: str
    best_is: Literal["lowest", "highest"]
    patience: int | None = None
    delta: float = 0.0
    statistics_every: int | None = None
    seed: int = 0
    asked_every: int | None = None
    background: bool = False

    def phases(self) -> set[int]:
        """Steps at which some rule starts or stops to train, 0 included."""
        changes = {step for rate in self.rates.values() for step in rate.phases}
        return {0} | {step for step in changes if step < self.total_steps}


class LossDriven(Protocol):
    """What draws samples by losses: it hears of every step, and its history is part of a checkpoint.

    shares: of tasks, of what is drawn; told: what else is recorded of it; observe: task -> mean loss of a step, and of
    its samples number, mean and largest token loss (`StepLosses.samples`); state: JSON values, and tensors.
    """

    @property
    def shares(self) -> dict[str, float]: ...

    @property
    def told(self) -> dict[str, Any]: ...

    def observe(self, losses: dict[str, float], samples: Sequence[tuple[int, float, float]]) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Past:
    """Of a step that was made: its loss, the gradient norms by rule ("total" of all), the loss scale, and its number,
    counted from 1."""

    loss: float
    norms: dict[str, float]
    scale: float
    step: int


class Trainer:
    """Runs optimizer steps.

    steps: (start, stop) -> iterator over lists of micro-batches; evaluate: step -> metrics (keys "loss" and
    "group/task/metric"); folder: where checkpoints go; fingerprint: of the config; sampling: what draws the samples
    of `steps`, where that depends on losses; recovery: what to do about numbers that are not finite; probe: samples
    whose losses every checkpoint records; companions: files of the run that every checkpoint copies; stop: asks the
    run to end; tower: runs the vision tower over all images of a step at once; investigate: is told of a step that is
    not finite, with the random state before it, and returns what caused it, in a sentence; vision: for steps whose
    images come in place of pixels; processes: all that train this model together, each with its share of every step;
    filler: of a sharded model, a micro-batch without a sample (`step.StepShare`).
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
        recovery: Recovery = Recovery(),  # noqa: B008  frozen
        probe: Probe | None = None,
        companions: Sequence[Path] = (),
        stop: StopRequest | None = None,
        tower: SharedTower | None = None,
        investigate: Callable[[NonFinite, dict[str, Any]], str] | None = None,
        vision: CachedVision | None = None,
        processes: Processes = ALONE,
        filler: Batch | None = None,
    ):
        self.model, self.plan, self.optimizer = model, plan, optimizer
        self.module = TrainingModule(VLM(model, vision), objective)
        self.steps, self.settings, self.folder, self.fingerprint = steps, settings, folder, fingerprint
        self.device, self.observers, self.evaluate = device, observers, evaluate
        self.sampling, self.recovery, self.companions = sampling, recovery, companions
        self.stop, self.tower, self.investigate = stop or StopRequest(), tower, investigate
        self.processes = processes
        self.share = StepShare(self.module, plan, settings.precision, device, tower, processes, filler)
        self.groups = plan.groups()
        self._writers = processes if is_sharded(model) else ALONE  # of checkpoints: who holds rows of them
        self.background = Background(processes)
        self.state = TrainState()
        self.scale = LossScale.of(settings.precision)
        self.watch, self.gradients = LossWatch(), GradientWatch()
        self.soundness = Soundness(probe, model, plan.parameters.values(), settings.precision, processes)
        self.statistics = GradientStatistics(
            plan.parameters, partial(processes.gather, "statistics") if is_sharded(model) else None
        )
        self.history: deque[Past] = deque(maxlen=HISTORY)
        self._phases = settings.phases()
        self._buffers = trained_buffers(model, plan)
        self._saved_step: int | None = None
        self._is_inside_step = False
        self.stop.is_patient = processes.size > 1
        self._wish: int | None = None  # the signal that asked one of several processes to stop

    def resume(self, checkpoint: Path) -> None:
        """Continue exactly where `checkpoint` was written."""
        self._load(checkpoint)
        written = self.folder / checkpoint_name(self.state.step)
        if self.processes.is_first and written.is_dir():  # a kill may have come between writing it and naming it
            point(self.folder / "latest", written)
            if self.state.best_step == self.state.step:
                point(self.folder / "best", written)

    def _load(self, checkpoint: Path) -> None:
        self.soundness.forget()
        step = read_state(checkpoint)["state"]["step"]
        self._activate(max(0, step - 1))  # as when it was written, so that every state in it has its parameter
        self.state = load_checkpoint(
            checkpoint, self.model, self.plan, self.optimizer, self.fingerprint, self.module.objective
        )
        if self.sampling is not None:
            self.sampling.restore(self.state.extra["sampling"] | load_sampling(checkpoint))
        if self.scale is not None and self.state.loss_scale is not None:
            self.scale = LossScale(**self.state.loss_scale)
        patience = self.settings.patience
        if patience is None or self.state.waited < patience:
            self.state.stopped = None  # somebody is more patient now
        for name, watch in self._watches().items():
            if name in self.state.extra:
                watch.restore(self.state.extra[name])

    def fit(self) -> TrainState:
        """Train to the last step; checkpoints and evaluations on the way. Resumes are bit-exact on CPU.

        Raises Interrupted after the step in which a stop was asked for, with a checkpoint written.
        """
        any_checkpoint = self.processes.on_first("leftovers", self._remove_leftovers)
        with self.stop.deferred():
            try:
                self._activate(self.state.step)
                set_training_mode(self.model)
                if self.state.step == 0:
                    self.soundness.begin()
                if self.recovery.rewinds and not any_checkpoint:
                    self.save()  # something to go back to
                if self._evaluation_is_due() and self.state.step != self.state.evaluated:
                    self.run_evaluation()  # a stop came between the step and its evaluation
                while self.state.step < self.settings.total_steps and self.state.stopped is None:
                    self._train_until_rewind()
                self.background.look(wait=True)
            except Interrupted as interrupted:
                if self._is_inside_step:  # a second signal: the weights may be those of the next step already
                    raise
                is_saved = self._saved_step == self.state.step or self._save_if_sound()
                self.background.look(wait=True)
                where = f"a checkpoint of step {self.state.step} is written" if is_saved else NOTHING_FINITE
                raise Interrupted(interrupted.number, f"{interrupted}; {where}.") from interrupted
            except VlmtuneError:
                if self.processes.size == 1:  # several may not be at the same place any more
                    self.background.look(wait=True)
                raise
        return self.state

    def _remove_leftovers(self) -> bool:
        """Returns whether there are checkpoints."""
        remove_leftovers(self.folder)
        return bool(checkpoints(self.folder))

    def _loaded(self) -> Iterator[list[Batch]]:
        """What `steps` gives. Data that one process cannot read stops all of them."""
        batches = iter(self.steps(self.state.step, self.settings.total_steps))
        while True:
            every = self.settings.asked_every  # the first process may have asked for samples, which takes its time
            with self.processes.agreed(
                f"data of step {self.state.step + 1}", patient=every is not None and self.state.step % every == 0
            ):
                micro_batches = next(batches, None)
            if micro_batches is None:
                return
            yield micro_batches

    def _stop_if_asked(self) -> None:
        """Raise Interrupted if a signal came: of several processes, if all of them know."""
        if self.processes.size == 1:
            self.stop.raise_if_asked()
        elif self._wish is not None:
            raise self.stop.interrupted(self._wish)

    def _train_until_rewind(self) -> None:
        """Steps until the last one, until the run stops early, or until it has gone back and needs earlier data."""
        state = self.state
        before, started = state.seconds, time.perf_counter()
        arrived = started
        for micro_batches in self._loaded():
            waited = time.perf_counter() - arrived
            self._is_inside_step = True
            try:
                metrics = self._attempt(micro_batches)
            except NonFinite as failure:
                self._is_inside_step = False
                self._give_up_or(failure)
                return
            self._is_inside_step = False
            state.seconds = before + time.perf_counter() - started
            self.background.look()
            metrics |= {"data_wait": waited, "step_seconds": time.perf_counter() - arrived}
            self._tell("on_step", metrics)
            if self._jumped(metrics):
                return
            if self._evaluation_is_due():
                self._stop_if_asked()
                self.run_evaluation()
            is_due = self._checkpoint_is_due() or state.stopped
            if is_due and self._saved_step != state.step:  # the evaluation saves what it finds best
                self._save_if_sound()
            if state.stopped:
                return
            self._stop_if_asked()
            arrived = time.perf_counter()

    def _evaluation_is_due(self) -> bool:
        step, every = self.state.step, self.settings.eval_every
        return bool(every) and step > 0 and step % every == 0 and step < self.settings.total_steps

    def _checkpoint_is_due(self) -> bool:
        step = self.state.step
        return step % self.settings.checkpoint_every == 0 or step == self.settings.total_steps

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _attempt(self, micro_batches: list[Batch]) -> dict[str, Any]:
        """A step, or what takes its place: nothing for a batch that is left out."""
        self.soundness.forget()
        if self.state.step in self._phases:
            self._activate(self.state.step)
        if self.state.step in self.state.skipped:
            return self._pass_over(micro_batches)
        if self.processes.size > 1:  # what dropout draws depends on no history, so that any number of ranks goes on
            torch.manual_seed(step_seed(self.settings.seed, self.state.step, self.processes.rank))
        before = Snapshot.of(self._buffers)
        try:
            return self.train_step(micro_batches)
        except NonFinite as failure:
            before.restore_buffers()
            failure.step, failure.micro_batches = self.state.step, micro_batches
            failure.sample_ids = self._sample_ids(failure)
            failure.cause = self._investigated(failure, before)
            before.restore_rng()
            self._forget_step()
            if self.recovery.nonfinite != "skip":
                raise
            self._require_patience(failure)
            if self.soundness.is_ruined():  # then every batch would be left out
                raise
            self.state.skipped.append(self.state.step)
            self._find("warn", "a step is not finite", f"{failure}".rstrip("."), "its batch is left out")
            return self._pass_over(micro_batches)

    def train_step(self, micro_batches: list[Batch]) -> dict[str, Any]:
        """One optimizer step: count weights, forward and backward each micro-batch, clip, refuse or update.

        Raises NonFinite, with nothing updated.
        """
        state, settings, objective = self.state, self.settings, self.module.objective
        lr = set_learning_rates(self.optimizer, lambda rule: state.lr_scale * settings.rates[rule].factor(state.step))
        parts = self.share.evened(micro_batches, state.step)
        weights = self.share.weigh(parts, state.step, settings.total_steps)
        scale = 1.0 if self.scale is None else self.scale.value
        made = self.share.gradients(parts, weights, scale, state.step, self.stop.number)
        sums, self._wish = made.losses, made.wish
        if state.step in self._phases:
            self.share.refuse_missing_gradients()
        if self.scale is not None:
            self.scale.unscale(self.plan.parameters.values())
        is_measured = settings.statistics_every and (state.step + 1) % settings.statistics_every == 0
        measured = self.statistics.begin() if is_measured else None
        norms = clip_gradients(self.groups, settings.clip, settings.clip_by_rule, self._add_up_norms())
        norms = dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True))  # one wait for the device
        overflowed = self._overflowed(sums, norms)
        if not overflowed:
            self._refuse_not_finite(made, norms)
        coefficients = objective.balance.coefficients(weights.tasks)
        if not overflowed:
            objective.balance.before_update(sums.tasks)
            self.optimizer.step()
            objective.balance.after_update()
        rows = self.statistics.end(measured) if measured is not None and not overflowed else None
        self._forget_step()
        shares, told = ({}, {}) if self.sampling is None else (self.sampling.shares, self.sampling.told)
        if self.sampling is not None:
            self.sampling.observe(sums.tasks, sums.samples)
        counted = self._count(micro_batches)
        self.history.append(Past(sums.total, norms, scale, state.step))
        for finding in self.gradients.observe(rows) if rows is not None else ():
            self._find(finding.level, finding.what, finding.evidence, finding.remedy)
        return {
            "loss": sums.total, "losses": sums.tasks, "plain": sums.plain, "weights": weights.tasks,
            "supervised": weights.tokens, "coefficients": coefficients,
            "shares": shares, "sampling": told, "terms": sums.terms, "term_counts": weights.counts,
            "exposure": weights.exposure,
            "norms": norms, "lr": lr, "scale": scale, "statistics": rows, **counted,
        }  # fmt: skip

    def _add_up_norms(self) -> AddUp | None:
        if not is_sharded(self.model):
            return None
        return lambda squares: self.processes.add_up(f"norms of step {self.state.step + 1}", [squares])

    def _sample_ids(self, failure: NonFinite) -> list[str]:
        """Of the step, of all processes; where some are to blame, of those."""
        own = [sample_id for batch in failure.micro_batches for sample_id in batch.sample_ids[: batch.size]]
        told = self.processes.gather("samples of a step that is not finite", own)
        return [sample_id for rank in failure.ranks or range(len(told)) for sample_id in told[rank]]

    def _investigated(self, failure: NonFinite, before: Snapshot) -> str:
        """What caused it: found by the processes whose share is not finite, or by all, where only gradients are not."""
        cause = ""
        if self.investigate is not None and (not failure.ranks or self.processes.rank in failure.ranks):
            cause = self.investigate(failure, before.rng_state())
        self.processes.wait_for_all("an investigation")
        told = self.processes.gather("causes", cause)
        return next((text for text in told if text), "")

    def _forget_step(self) -> None:
        """Gradients, and what the balance gathered of them."""
        self.optimizer.zero_grad()
        self.module.objective.balance.forget_step()

    def _count(self, micro_batches: list[Batch]) -> dict[str, int]:
        own = [
            sum(batch.size for batch in micro_batches),
            sum(int(batch.inputs["attention_mask"][: batch.size].sum()) for batch in micro_batches),
        ]
        samples, tokens = map(sum, zip(*self.processes.gather("samples and tokens", own), strict=True))
        self.state.step += 1
        self.state.samples += samples
        self.state.tokens += tokens
        return {"samples": samples, "tokens": tokens}

    def _pass_over(self, micro_batches: list[Batch]) -> dict[str, Any]:
        """A step without an update: its batch is left out, the data position and the schedules move on."""
        return {"skipped": True, **self._count(micro_batches)}

    def _activate(self, step: int) -> None:
        """Let the rules that train at `step` train, and freeze the others."""
        if set_active(self.optimizer, lambda rule: self.settings.rates[rule].is_active(step)):
            set_training_mode(self.model)

    # ---- numbers that are not finite, losses that jump ---------------------------------------------------------------

    def _overflowed(self, sums: StepLosses, norms: dict[str, float]) -> bool:
        """Of float16: whether only the scaled gradients overflowed: then the scale falls, and nothing is updated."""
        if self.scale is None or not math.isfinite(sums.total):
            return False
        overflow = not math.isfinite(norms["total"])
        if overflow and self.scale.value < 1:
            return False  # no scale helps: it is a failure like any other
        self.scale.update(overflow)
        self.state.overflows += overflow
        if overflow:
            for finding in judge_overflow([*(past.scale for past in self.history), self.scale.value]):
                self._find(finding.level, finding.what, finding.evidence, finding.remedy)
        return overflow

    @staticmethod
    def _refuse_not_finite(made: StepSums, norms: dict[str, float]) -> None:
        """Raise NonFinite before the update when a loss or gradient norm is NaN or infinite."""
        sums = made.losses
        if math.isfinite(norms["total"] + sums.total):
            return
        rules = [rule for rule, norm in norms.items() if rule != "total" and not math.isfinite(norm)]
        tasks = [name for name, loss in sums.tasks.items() if not math.isfinite(loss)]
        what = f"gradient of {', '.join(rules) or 'no rule'}, loss of {', '.join(tasks) or 'no task'}"
        raise NonFinite(what, made.broken)

    def _give_up_or(self, failure: NonFinite) -> None:
        """Go back a checkpoint if the policy says so. Raises what the user reads otherwise."""
        if self.recovery.nonfinite == "rewind":
            self._require_patience(failure)
            self.rewind(f"{failure}".rstrip("."))
            return
        said = f"{failure}" if failure.cause else f"{failure} {failure.remedy}"
        if self.soundness.is_ruined():
            raise VlmtuneError(f"{said} {self._ruined()}")
        if self._saved_step != self.state.step:
            self.save()  # everything needed to go on
        self.background.look(wait=True)
        raise VlmtuneError(said)

    def _require_patience(self, failure: Exception) -> None:
        """Raise VlmtuneError where the run has been mended as often as it may be."""
        mended = len(self.state.skipped)
        if mended >= self.recovery.limit:
            raise VlmtuneError(
                f"{failure} {mended} batches were left out already, as many as stability.limit allows; see what was "
                "found with `vlmtune doctor`, or raise it."
            )

    def _jumped(self, metrics: dict[str, Any]) -> bool:
        """Watch the loss, and now and then the stored samples; returns whether the run went back because of it."""
        if "loss" not in metrics:
            return False
        if self.recovery.nonfinite == "rewind" and self._probe_is_due() and self.soundness.is_ruined():
            said = f"step {self.state.step}: {NOTHING_FINITE}"
            self.state.step -= 1  # the step that is left out when it comes again
            self._require_patience(VlmtuneError(f"{said};"))
            self.rewind(said)
            return True
        finding = self.watch.observe(metrics["loss"])
        if finding is None and self._probe_is_due():
            finding = self.soundness.compare()
        if finding is None:
            return False
        if self.recovery.spikes == "warn":
            self._find(finding.level, finding.what, finding.evidence, finding.remedy)
            return False
        self.state.step -= 1  # the step that is left out when it comes again
        self._require_patience(VlmtuneError(f"step {self.state.step + 1}: {finding.what}, {finding.evidence};"))
        self.rewind(f"step {self.state.step + 1}: {finding.what}, {finding.evidence}")
        return True

    def _probe_is_due(self) -> bool:
        """After steps 1, 2, 4, 8, … (a rate that is too high ruins a model in its first steps), and before checkpoints,
        which hold these losses anyway."""
        return self.state.step & (self.state.step - 1) == 0 or self._checkpoint_is_due()

    def _ruined(self) -> str:
        """What is left of a run whose weights are ruined, and what helps."""
        newest = newest_whole_checkpoint(self.folder)[0]
        left = "no earlier one exists" if newest is None else f"{newest.name} is the newest"
        return (
            f"The weights themselves give no finite loss any more, so no checkpoint of step {self.state.step} is "
            f"written; {left}. Lower the learning rates in a new run, or continue this one with "
            "stability.nonfinite=rewind, which goes back and lowers them."
        )

    def _save_if_sound(self) -> bool:
        """Write a checkpoint, unless the weights are ruined: then the next step fails, and says why.

        Raises VlmtuneError where there is no next step.
        """
        if not self.soundness.is_ruined():
            self.save()
            return True
        said = f"step {self.state.step}: {NOTHING_FINITE}"
        if self.state.stopped or self.state.step == self.settings.total_steps:
            raise VlmtuneError(f"{said}. {self._ruined()}")
        self._find("warn", "no checkpoint is written", said, "lower the learning rates: the weights are ruined")
        return False

    def rewind(self, why: str) -> None:
        """Go back to the newest whole checkpoint with lower learning rates; the step at hand is left out when it comes
        again. The checkpoint is written again with that, so that a resume knows it."""
        self.background.look(wait=True)
        failed, seconds = self.state.step, self.state.seconds
        name, complaints = self.processes.on_first("rewind", self._newest)
        if name is None:
            raise VlmtuneError(f"{why}; there is no checkpoint to go back to.")
        skipped, rewinds = self.state.skipped, self.state.rewinds
        scale = self.state.lr_scale * self.recovery.lr_factor
        with self.processes.agreed("rewind"):
            self._load(self.folder / name)
        state = self.state
        state.skipped, state.rewinds = [*skipped, failed], [*rewinds, [failed, state.step]]
        state.lr_scale, state.seconds = scale, seconds
        self.history = deque((past for past in self.history if past.step <= state.step), HISTORY)
        self._activate(state.step)
        set_training_mode(self.model)
        self.save()
        self._tell("on_rewind")
        self._find(
            "warn", "the run went back", why + "".join(f"; {complaint}" for complaint in complaints),
            f"it continues from step {state.step} with {scale:g} x the learning rates, without the batch of step "
            f"{failed + 1}",
        )  # fmt: skip

    def _newest(self) -> tuple[str | None, list[str]]:
        """Name of the newest whole checkpoint, and what is wrong with newer ones."""
        checkpoint, complaints = newest_whole_checkpoint(self.folder)
        return None if checkpoint is None else checkpoint.name, complaints

    def _find(self, level: str, what: str, evidence: str, remedy: str) -> None:
        finding = Finding(level, what, evidence, remedy)
        for observer in self.observers:
            observer.on_finding(self.state, finding)

    # ---- evaluations and checkpoints ---------------------------------------------------------------------------------

    def run_evaluation(self) -> dict[str, Any] | None:
        """Evaluate without touching the training RNG, remember whether this is the best so far, and whether to stop.

        Raises Interrupted at any moment: then it counts as not evaluated.
        """
        if self.evaluate is None:
            return None
        rng = torch.get_rng_state()
        self.model.eval()
        try:
            # of several processes none may leave before the others know of it
            with self.stop.immediate() if self.processes.size == 1 else nullcontext():
                metrics = self.evaluate(self.state.step)
        finally:
            set_training_mode(self.model)
            torch.set_rng_state(rng)
        value = metrics.get(self.settings.best)
        if value is None:
            raise VlmtuneError(
                f"checkpoint.best is {self.settings.best!r}, but evaluation reports {', '.join(sorted(metrics))}."
            )
        state = self.state
        state.evaluated = state.step
        better = self._is_better(value, state.best)
        if better:
            state.best, state.best_step = value, state.step
        self._wait(value)
        self._tell("on_eval", metrics)
        if better and state.step:
            self.save(is_best=True)
        return metrics

    def _is_better(self, value: float, than: float | None, by: float = 0.0) -> bool:
        if than is None:
            return True
        return value < than - by if self.settings.best_is == "lowest" else value > than + by

    def _wait(self, value: float) -> None:
        """Early stopping: count evaluations since the last one that was better by delta."""
        state, patience = self.state, self.settings.patience
        if self._is_better(value, state.reference, self.settings.delta):
            state.reference, state.waited = value, 0
            return
        state.waited += 1
        if patience is not None and state.waited >= patience:
            state.stopped = (
                f"{self.settings.best} was not better than {state.reference:.4g}"
                + (f" by {self.settings.delta:g} (checkpoint.delta)" if self.settings.delta else "")
                + f" for {state.waited} evaluations (checkpoint.patience)"
            )

    def save(self, is_best: bool = False) -> Path:
        """Write a checkpoint, point `latest` at it (and `best`), delete what is neither best, latest nor among the
        newest kept. With `background` it has its name once it is written: see `Background.look`."""
        folder = self.folder / checkpoint_name(self.state.step)
        recorded = self._recorded()
        writes = self.processes.is_first or is_sharded(self.model)
        with self.processes.agreed(f"checkpoint of step {self.state.step}"):
            draft = self._draft(folder, recorded, copies=self.settings.background) if writes else None
            if draft is not None and not self.settings.background:
                draft.write()
            if not self.settings.background:
                self._point_at(folder, is_best)
        self._saved_step = self.state.step
        if self.settings.background:
            self.background.begin(draft, partial(self._point_at, folder, is_best))
        return folder

    def _point_at(self, folder: Path, is_best: bool) -> None:
        if self.processes.is_first:
            point(self.folder / "latest", folder)
            if is_best:
                point(self.folder / "best", folder)
            self._remove_old()

    def _remove_old(self) -> None:
        best = self.folder / "best"
        kept = {p.resolve() for p in checkpoints(self.folder)[-self.settings.keep :]}
        kept |= {best.resolve()} if best.exists() else set()
        for old in checkpoints(self.folder):
            if old.resolve() not in kept:
                remove_checkpoint(old)

    def write(self, folder: Path) -> None:
        """A checkpoint of this moment, anywhere."""
        self._draft(folder, None, copies=False).write()

    def _draft(self, folder: Path, recorded: Recorded | None, copies: bool) -> Draft:
        """recorded: what it holds besides the training."""
        drawn = {} if self.sampling is None else self.sampling.state()
        tensors = {name: value for name, value in drawn.items() if isinstance(value, torch.Tensor)}
        if self.sampling is not None:
            self.state.extra["sampling"] = {name: value for name, value in drawn.items() if name not in tensors}
        self.state.extra |= {name: watch.state() for name, watch in self._watches().items()}
        self.state.loss_scale = None if self.scale is None else dict(vars(self.scale))
        return Draft(
            folder,
            self.model,
            self.plan,
            self.optimizer,
            self.state,
            self.fingerprint,
            self.module.objective,
            recorded,
            self._writers,
            copies,
            tensors,
        )

    def _watches(self) -> dict[str, Watch]:
        """By their names in a checkpoint."""
        return {"watch": self.watch, "start": self.soundness.watch, "gradients": self.gradients}

    def _recorded(self) -> Recorded | None:
        probe = self.soundness.probe
        if probe is None:
            return None
        return Recorded(probe, self.soundness.losses(), self.settings.precision, self.companions)

    def _tell(self, event: str, *told: dict[str, Any]) -> None:
        for observer in self.observers:
            getattr(observer, event)(self.state, *told)
