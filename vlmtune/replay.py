"""A step that was not finite, run again: the same tensors, weights and random state, watched from module to module
(SPEC F5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from vlmtune.adapt.plan import Plan, apply_plan
from vlmtune.build import best_device, build_encoder, build_train, load_base
from vlmtune.build_course import apply_formats, build_tower, training_policies
from vlmtune.build_loss import build_objective
from vlmtune.checkpoint import load_weights
from vlmtune.config import Config, load_config
from vlmtune.data.encode import Encoder
from vlmtune.failure import Diagnosis, Failure, diagnose
from vlmtune.losses.objective import Objective
from vlmtune.models.quantise import place
from vlmtune.models.vlm import VLM, checkpoint_activations, set_training_mode
from vlmtune.models.vocabulary import embedding_rows
from vlmtune.optim.precision import resolve_precision
from vlmtune.paths import require_run
from vlmtune.schedule import learning_rates
from vlmtune.step import TrainingModule
from vlmtune.types import Finding, VlmtuneError

SHOWN = 8  # values of a history, samples of a step


@dataclass(frozen=True)
class Replay:
    """A saved failure, and what its rerun showed."""

    failure: Failure
    now: Diagnosis

    @property
    def reproduced(self) -> bool:
        return self.now.origin is not None

    @property
    def same_module(self) -> bool:
        """Whether the rerun begins where the run said. False where the run could not say it."""
        then = self.failure.diagnosis
        return (
            self.reproduced
            and then is not None
            and then.origin is not None
            and ((then.origin.kind, then.origin.module) == (self.now.origin.kind, self.now.origin.module))
        )


def find_failure(run: Path, name: str | None) -> Path | None:
    """The folder of a failure; None where a run has none and none was asked for. name: None for the newest."""
    require_run(run)
    saved = sorted(path for path in (run / "failures").glob("step_*") if path.is_dir())
    if name is None:
        return saved[-1] if saved else None
    chosen = run / "failures" / name
    if chosen not in saved:
        if not saved:
            raise VlmtuneError(f"{run} has saved no failure; leave --failure out.")
        known = ", ".join(path.name for path in saved)
        raise VlmtuneError(f"{run} has no failure {name!r}; pass --failure with one of: {known}.")
    return chosen


def replay(run: Path, failure: Failure) -> Replay:
    """Run the saved step again with the weights it had. Raises VlmtuneError where model or checkpoint do not fit."""
    config = load_config(str(run / "config.yaml"))
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    record = failure.record
    model, plan, encoder, objective = _rebuilt(config, failure.checkpoint)
    _let_train(plan, config, record["progress"])
    set_training_mode(model)
    module = TrainingModule(VLM(model), objective)
    weights = objective.weights(failure.micro_batches, record["progress"])
    now = diagnose(
        model, module, failure.micro_batches, weights, record["precision"], record["scale"], failure.rng,
        record["norm_history"], record["loss_history"], record["lr"], embedding_rows(model), encoder,
        build_tower(model, config),
    )  # fmt: skip
    return Replay(failure, now)


def _rebuilt(config: Config, checkpoint: Path) -> tuple[torch.nn.Module, Plan, Encoder, Objective]:
    """Model, plan, encoder and loss of a run, with the weights of a checkpoint."""
    rules = training_policies(config, resolve_precision(config.train.precision, best_device()))
    base = load_base(config, rules=rules)
    encoder = build_encoder(base.processor, base.model, config.data)
    plan = apply_plan(base.model, rules, config.model, config.train.seed, base.new_tokens)
    # only a balance between tasks asks the data, for their names
    sources = [] if config.loss.balance.by == "tokens" else [member.source for member in build_train(config.data)]
    objective = build_objective(config, sources, plan, encoder)
    load_weights(checkpoint, base.model, plan)
    if objective.state_dict():
        objective.load_state_dict(load_file(checkpoint / "objective.safetensors"))
    if config.train.gradient_checkpointing:
        checkpoint_activations(base.model, config.train.gradient_checkpointing)
    place(base.model, best_device())
    apply_formats(base.model, plan, config)
    return base.model, plan, encoder, objective


def _let_train(plan: Plan, config: Config, progress: float) -> None:
    """The rules that trained at that time: a part that is frozen for a while has no dropout either."""
    groups = plan.groups()
    for rule in config.plan:
        lr = config.optim.lr if rule.lr is None else rule.lr
        for parameter in groups.get(rule.match, ()):
            parameter.requires_grad_(learning_rates(lr)(progress) > 0)


# ---- for people and machines -------------------------------------------------------------------------------------


def as_record(run: Path, found: Replay) -> dict:
    """For machines: what the run said then, what the replay says now."""
    then = found.failure.diagnosis
    return {
        "run": str(run),
        "failure": found.failure.folder.name,
        "reproduced": found.reproduced,
        "same_module": found.same_module,
        "then": None if then is None else then.record(),
        "now": found.now.record(),
        "norm_history": found.failure.record["norm_history"],
        "loss_history": found.failure.record["loss_history"],
        "scale": found.failure.record["scale"],
        "precision": found.failure.record["precision"],
    }


def described(run: Path, found: Replay) -> list[str]:
    """For people: what happened, where first, why, what was ruled out."""
    failure, now = found.failure, found.now
    record = failure.record
    ids = [name for batch in failure.micro_batches for name in batch.sample_ids]
    shown = ", ".join(ids[:SHOWN]) + (" …" if len(ids) > SHOWN else "")
    lines = [
        f"failure: {failure.folder}",
        f"what: step {record['step'] + 1} was not finite, in {record['precision']}"
        + (f" with a loss scale of {record['scale']:g}" if record["precision"] == "fp16" else ""),
        f"samples: {shown}",
        *_history(record),
        f"replay: {_compared(found)}",
    ]
    if now.origin is not None:
        number = "" if now.micro_batch is None else f"micro-batch {now.micro_batch + 1} ({', '.join(now.samples)}): "
        lines.append(f"first: {number}{now.origin.sentence()}")
        if now.origin.samples:
            lines.append(f"in samples: {', '.join(now.origin.samples)}")
    lines += [f"cause {place}: {_sentence(cause)}" for place, cause in enumerate(now.causes, start=1)]
    lines += [f"{finding.level}: {_sentence(finding)}" for finding in now.examined if finding.level != "pass"]
    lines += [f"in order: {_sentence(finding)}" for finding in now.examined if finding.level == "pass"]
    return lines


def _compared(found: Replay) -> str:
    then = found.failure.diagnosis
    if not found.reproduced:
        return "the same step is finite here; hardware, threads, library versions, or the base model's files differ"
    if then is None or then.origin is None:
        return "not finite again; the run itself had not found where it began"
    if found.same_module:
        return "not finite again, in the same place"
    return f"not finite again, but the run had found another place: {then.origin.sentence()}"


def _history(record: dict) -> list[str]:
    totals = [step["total"] for step in record["norm_history"] if "total" in step]
    scales = record.get("scale_history", []) if record["precision"] == "fp16" else []
    return [
        f"{name} before: {_numbers(values)}"
        for name, values in (("gradient norm", totals), ("loss", record["loss_history"]), ("loss scale", scales))
        if values
    ]


def _numbers(values: Sequence[float]) -> str:
    front = "… " if len(values) > SHOWN else ""
    return front + " ".join(f"{value:.4g}" for value in values[-SHOWN:])


def _sentence(finding: Finding) -> str:
    return f"{finding.what}: {finding.evidence}" + (f"; {finding.remedy}" if finding.remedy else "")
