"""What is verified and said around the first step of a run: the table of what trains, how it begins, where the result
can be used, and memory, predicted and measured."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from vlmtune.adapt.fused import is_fused
from vlmtune.adapt.memory import PeakMeter, predict_step
from vlmtune.adapt.plan import Plan, Policy
from vlmtune.adapt.prediction import Prediction, StepSettings
from vlmtune.adapt.serving import serving_notes
from vlmtune.adapt.sharding import Parts
from vlmtune.adapt.state import trained_buffers
from vlmtune.build_course import policies_at
from vlmtune.checks.before import identity_findings, initial_findings
from vlmtune.config import Config
from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.feature_store import FeatureStore
from vlmtune.data.loader import Steps
from vlmtune.models.anatomy import canonical_parameters
from vlmtune.models.packing import is_packing
from vlmtune.models.quantise import stored_bytes
from vlmtune.models.trunk import CachedVision
from vlmtune.models.vlm import VLM, evaluating
from vlmtune.models.vocabulary import NewTokens
from vlmtune.observer import Observer
from vlmtune.optim.precision import SAME_LOSS, Precision, autocast
from vlmtune.paths import write_text
from vlmtune.sizes import bytes_text
from vlmtune.trainer import Settings
from vlmtune.types import Batch, Finding, Sample, VlmtuneError

MIB = 2**20
TIGHT, TOO_LARGE = 0.9, 1.2  # of the memory that is there
ACCURATE = 1.2  # of what was predicted
PROCESS_KEEPS = 256 * MIB  # of what it freed, for libraries and threads: up to 161 were seen (docs/guide/plan.md)


def first_micro_batches(steps: Steps) -> list[Batch]:
    """Those of the first optimizer step. Raises VlmtuneError for a sample that cannot be encoded."""
    steps.order.decide(0)
    found = steps[0]
    if isinstance(found, VlmtuneError):
        raise found
    return found


def assignment_table(rows: list[dict]) -> Table:
    table = Table(title="what trains, and how", title_justify="left")
    for name in ("part", "rule", "method", "modules", "tensors", "parameters", "trainable", "lr", "weight decay"):
        is_text = name in ("part", "rule", "method")  # folded, because a rule that is cut could be any other
        table.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for row in rows:
        sizes = [f"{row[name]:,}" for name in ("modules", "tensors", "parameters", "trainable")]
        rates = ["" if row[name] is None else f"{row[name]:g}" for name in ("lr", "weight_decay")]
        table.add_row(row["part"], row["rule"], row["method"], *sizes, *rates)
    total, trainable = sum(r["parameters"] for r in rows), sum(r["trainable"] for r in rows)
    table.add_section()
    table.add_row("all", "", "", "", "", f"{total:,}", f"{trainable:,}", "", "")
    return table


def check_weights(model: torch.nn.Module, plan: Plan, encoder: Encoder) -> list[Finding]:
    """How everything that learns begins (SPEC D6), by its numbers. Raises VlmtuneError for the first finding that
    fails."""
    findings = initial_findings(model, plan, len(encoder.processor.tokenizer))
    require_no_failure(findings, "start")
    return findings


def check_start(model: torch.nn.Module, plan: Plan, batch: Batch, precision: Precision) -> list[Finding]:
    """Whether the adapted model begins as the base model (SPEC D6), on this batch."""
    batch = batch.to(model.device)
    rng = torch.get_rng_state()
    with autocast(precision, model.device):
        findings = identity_findings(model, plan, batch)
    torch.set_rng_state(rng)
    return findings


def halves_finding(
    model: torch.nn.Module, encoder: Encoder, samples: Sequence[Sample], precision: Precision
) -> Finding:
    """Whether the model with tower and projector apart computes what it does in one (`data.vision_cache`).

    samples: with images.
    """
    what = "kept features give the model's own states"
    if not samples:
        return Finding(
            "warn", what, "not compared: none of the first samples has an image", "leave data.vision_cache out"
        )
    looking = encoder.looking_up(FeatureStore(Path(os.devnull), 0))  # keeps nothing
    vision = CachedVision(model, lambda key, features: None)
    plain, halves = (
        collate([of.encode(sample) for sample in samples], encoder.pad_token_id).to(model.device)
        for of in (encoder, looking)
    )
    with evaluating(model), torch.no_grad(), autocast(precision, model.device):
        whole, apart = VLM(model)(plain).sequence.float(), VLM(model, vision)(halves).sequence.float()
    gap = float((whole - apart).abs().max() / whole.abs().max())
    size = sum(value.nbytes for image in halves.images for value in image.features.values()) / len(halves.images)
    evidence = f"largest difference {gap:.1e} of the largest state; about {bytes_text(size)} an image"
    if not gap <= SAME_LOSS[precision]:
        return Finding("fail", what, evidence, "leave data.vision_cache out, and report it")
    return Finding("pass", what, evidence)


def require_no_failure(findings: Sequence[Finding], where: str) -> None:
    """Raise VlmtuneError for the first finding that fails."""
    for finding in findings:
        if finding.level == "fail":
            raise VlmtuneError(f"{where}: {finding.what}: no, {finding.evidence}; {finding.remedy}.")


def describe_findings(findings: list[Finding]) -> list[str]:
    """One line each."""
    return [
        f"start: {finding.level}: {finding.what}: {finding.evidence}"
        + (f"; {finding.remedy}" if finding.remedy else "")
        for finding in findings
    ]


def describe_judged(findings: Sequence[Finding]) -> list[str]:
    """A line for each value that should be looked at, and one that counts the others."""
    odd = [finding for finding in findings if finding.level != "pass"]
    lines = [f"check: {f.level}: {f.what}: {f.evidence}; {f.remedy}" for f in odd]
    if fine := len(findings) - len(odd):
        lines.append(f"check: pass: {fine}{' other' if odd else ''} figures are as usual, see start.json")
    return lines


def describe_start(
    model: torch.nn.Module, plan: Plan, findings: list[Finding], judged: list[Finding], console: Console
) -> None:
    """The table of what trains, lines for the findings, and a line for each way of using the result."""
    console.print(assignment_table(plan.rows))
    notes = [f"use it: {note}" for note in serving_notes(model, plan)]
    for line in [*describe_findings(findings), *describe_judged(judged), *notes]:
        console.print(line, highlight=False, markup=False)


# ---- memory -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A time of the run in which the same rules train. first: step; predicted: memory of a step, or why it is not."""

    first: int
    active: list[str]
    predicted: Prediction | str


def predict_phases(
    config: Config,
    settings: Settings,
    model: torch.nn.Module,
    batches: list[Batch],
    new_tokens: NewTokens,
    device: torch.device,
    parts: Parts | None = None,
    processes: int = 1,
) -> list[Phase]:
    """What trains when, and the memory of a step of each phase (SPEC F1, C9); one phase where nothing is unfrozen.

    parts: of a model that `processes` hold together.
    """
    phases = []
    for first in sorted(settings.phases()):
        rules = policies_at(config, settings, first)
        active = [rule for rule, policy in rules if policy.train != "frozen"]
        if not active:
            raise VlmtuneError(
                f"plan: from step {first + 1} on nothing trains, every rule is frozen; give one rule a learning rate "
                "above 0 at that time."
            )
        found = _predict(config, rules, model, batches, new_tokens, settings.precision, device)
        if parts is not None and isinstance(found, Prediction):
            found = parts.held(found, processes)
        phases.append(Phase(first, active, found))
    return phases


def memory_finding(phases: Sequence[Phase], device: torch.device) -> Finding:
    """Whether the largest step of the run fits into this machine. Predictions are right to about a fifth."""
    what = "memory suffices"
    sizes = [phase.predicted.total for phase in phases if not isinstance(phase.predicted, str)]
    if not sizes:
        return Finding("pass", what, f"unknown: {phases[0].predicted}")
    predicted, there = max(sizes), memory_there(device)
    evidence = f"predicted {predicted / MIB:,.0f} MiB of {there / MIB:,.0f}"
    remedy = "lower train.micro_batch_size or data.max_pixels, set train.gradient_checkpointing, or ask `vlmtune plan`"
    if predicted > TOO_LARGE * there:
        return Finding("fail", what, evidence, remedy)
    if predicted > TIGHT * there:
        return Finding("warn", what, f"barely: {evidence}", remedy)
    return Finding("pass", what, evidence)


def memory_there(device: torch.device) -> int:
    """Bytes that this process can have: of the GPU, or what is free and its own, within its control group's limit."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    there = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return there if text == "max" else min(there, int(text))


def describe_phases(phases: list[Phase], settings: Settings) -> list[str]:
    """A line for each phase, where there are several."""
    if len(phases) == 1:
        return []
    lines = []
    for phase, last in zip(phases, [*(later.first for later in phases[1:]), settings.total_steps], strict=True):
        memory = phase.predicted
        size = memory if isinstance(memory, str) else f"predicted {memory.total / MIB:,.0f} MiB"
        lines.append(f"steps {phase.first + 1} to {last}: {', '.join(phase.active)} train; {size}")
    return lines


def _predict(
    config: Config,
    rules: Sequence[tuple[str, Policy]],
    model: torch.nn.Module,
    batches: list[Batch],
    new_tokens: NewTokens,
    precision: Precision,
    device: torch.device,
) -> Prediction | str:
    """Of a step with the largest of these micro-batches; a sentence where this model or plan cannot be predicted."""
    settings = StepSettings(
        precision=precision, gradient_checkpointing=config.train.gradient_checkpointing, optimizer=config.optim.name,
        double=config.quantise.double, micro_batches=len(batches), device=device.type,
        packing=is_packing(model), fused=is_fused(model),
    )  # fmt: skip
    largest = max(batches, key=lambda batch: batch.inputs["input_ids"].numel())
    try:
        return predict_step(model.config, rules, largest, settings, new_tokens)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, VlmtuneError) as error:
        # the run itself does not depend on it
        return f"not predicted for this model ({type(error).__name__}: {' '.join(str(error).split())[:160]})"


def require_disk(folder: Path, model: torch.nn.Module, plan: Plan, config: Config, console: Console) -> None:
    """Say what the checkpoints of a run will take, and refuse to start where they cannot fit (SPEC H1).

    At the most there are `checkpoint.keep` of them, the best one, and one that is being written.
    """
    finding = disk_finding(folder, model, plan, config)
    if finding.level == "fail":
        raise VlmtuneError(f"{folder}: {finding.evidence}; {finding.remedy}.")
    console.print(f"checkpoints: {finding.evidence}", highlight=False)


def disk_finding(folder: Path, model: torch.nn.Module, plan: Plan, config: Config) -> Finding:
    """Whether the disk holds the checkpoints of a run. folder: of the checkpoints; what is in it counts."""
    what = "the disk holds the checkpoints"
    count = config.checkpoint.keep + 2
    size = checkpoint_bytes(model, plan, config.optim.name)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    place = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(place).free
    if count * size - there > free:
        return Finding(
            "fail", what,
            f"{count} checkpoints of {size / MIB:,.0f} MiB need {count * size / MIB:,.0f} MiB, but "
            f"{free / MIB:,.0f} MiB are free on that disk",
            "free some space, set run to another disk, or lower checkpoint.keep",
        )  # fmt: skip
    evidence = f"about {size / MIB:,.1f} MiB each, at most {count} at a time; {free / 2**30:,.1f} GiB are free"
    return Finding("pass", what, evidence)


def checkpoint_bytes(model: torch.nn.Module, plan: Plan, optimizer: str) -> int:
    """What trains in float32, what adapters brought besides, statistics, and both moments of the optimizer."""
    trained = sum(parameter.numel() for parameter in plan.parameters.values())
    fixed = sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in canonical_parameters(model).items()
        if name in plan.adapter_parameters and name not in plan.parameters
    )
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in trained_buffers(model, plan).values())
    moments = 2 if optimizer.endswith("8bit") else 8
    return trained * (4 + moments) + fixed + buffers


def held_bytes(model: torch.nn.Module) -> int:
    """What the model's weights and buffers take, constants of quantised weights included."""
    weights, constants = stored_bytes(model)
    return weights + constants + sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


class MemoryReport(Observer):
    """Compares the prediction with what the first step of this process took, prints a line and writes memory.json, and
    again whenever a later step took more.

    A resumed run has the optimizer's state from the beginning, so its first step is like any later one.
    """

    def __init__(self, prediction: Prediction | str, meter: PeakMeter, console: Console, file: Path, is_resumed: bool):
        self.prediction, self.meter, self.console, self.file = prediction, meter, console, file
        self.is_resumed = is_resumed
        self.record: dict[str, Any] = {}

    def on_step(self, state: Any, metrics: dict[str, Any]) -> None:
        peak = self.meter.peak()
        if not self.record:
            self.record = self._of_first_step(peak)
        elif peak is None or peak <= self.record["highest"]:
            return
        write_text(self.file, json.dumps(self.record | {"highest": peak}, indent=1))
        self.record["highest"] = peak

    def _of_first_step(self, measured: int | None) -> dict[str, Any]:
        record: dict[str, Any] = {"measured": measured}
        if isinstance(self.prediction, str):
            record["predicted"], said = None, self.prediction
        else:
            found = self.prediction
            predicted = found.total if self.is_resumed else found.first_step
            record |= {"predicted": predicted, "predicted_later": found.total, "at": found.peak[0],
                       "items": found.peak[1].items, "image_share": found.image_share}  # fmt: skip
            said = f"predicted {predicted / MIB:,.0f} MiB for this step, {found.total / MIB:,.0f} for later ones"
        seen = "not measured on this system" if measured is None else f"measured {measured / MIB:,.0f} MiB"
        if measured is not None and record["predicted"]:
            seen += f" ({measured / record['predicted'] - 1:+.0%})"
            if ACCURATE * record["predicted"] < measured <= record["predicted"] + PROCESS_KEEPS:
                seen += ", within what a process keeps for libraries and threads"
        self.console.print(f"memory: {said}; {seen}", highlight=False, markup=False)
        return record
