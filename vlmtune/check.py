"""`vlmtune check`: everything that a run needs, tried before it starts, in an order that fails fast (SPEC H1).

Sections: machine, plan, model, data, start, step, checkpoint. The first that fails ends it: what comes after rests on
it.
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from vlmtune.adapt.fused import own_forward
from vlmtune.adapt.memory import PeakMeter
from vlmtune.adapt.plan import assign_rules
from vlmtune.build import (
    Base,
    best_device,
    build_encoder,
    build_eval_groups,
    build_train,
    load_base,
    resolve_model,
    step_loader,
)
from vlmtune.build_course import build_optimizer, build_settings, build_tower, policies
from vlmtune.build_loss import wanted_readouts
from vlmtune.check_data import data_folder, examine_data, has_files
from vlmtune.checkpoint import rng_state
from vlmtune.checks.settings import generation_finding
from vlmtune.config import Chain, Config, dump_config
from vlmtune.data.check import CODES, OF_SOURCES
from vlmtune.failure import diagnose_step, examine_batches
from vlmtune.models.load import meta_model
from vlmtune.models.merging import model_inputs
from vlmtune.models.readouts import attach_readouts
from vlmtune.models.vocabulary import embedding_rows
from vlmtune.observe.data_report import CodeFindings
from vlmtune.optim.precision import Precision, autocast, resolve_precision
from vlmtune.paths import require_folder
from vlmtune.prepare import Prepared, largest_micro_batch, prepare, probe_of
from vlmtune.recovery import NonFinite
from vlmtune.start import MIB, TIGHT, disk_finding, first_micro_batches, held_bytes, memory_there
from vlmtune.trainer import Trainer
from vlmtune.types import Batch, Encoded, Finding, VlmtuneError
from vlmtune.use import load_run, products_of

LOOKED_AT = 16  # samples of each held-out source whose replies are measured
ALIKE = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 3e-2}
"""Logits after a reload, relative to the largest: the same operations on the same weights, in another memory layout."""


@dataclass(frozen=True)
class Section:
    """A part of the check. stage: of a chain; seconds: that it took."""

    name: str
    findings: list[Finding]
    seconds: float
    stage: str | None = None

    @property
    def fails(self) -> bool:
        return any(finding.level == "fail" for finding in self.findings)


def check(
    wish: Config | Chain, console: Console, as_json: bool = False, workers: int | None = None, data: bool = True
) -> int:
    """Check a run, or every stage of a chain, and print what was found; returns the exit code, 1 if anything fails.

    workers: processes that read the data (default: data.workers); data: False leaves out reading every row. A later
    stage is checked on the first one's model, which has the same parameters.
    """
    sections: list[Section] = []
    said = Console(quiet=True) if as_json else console
    runs = wish.stages.items() if isinstance(wish, Chain) else [(None, wish)]
    first = next(iter(runs))[1].model
    for stage, config in runs:
        if stage is not None:
            said.rule(f"stage {stage}")
        for section in check_run(config.model_copy(update={"model": first}), said, workers, data):
            section = replace(section, stage=stage)
            sections.append(section)
            for line in described(section):
                said.print(line, highlight=False, soft_wrap=True)
        if sections[-1].fails:
            break
    counts = {level: sum(f.level == level for s in sections for f in s.findings) for level in ("pass", "warn", "fail")}
    if as_json:
        print(json.dumps(as_record(sections), indent=1))
    said.print(f"{counts['pass']} pass, {counts['warn']} warn, {counts['fail']} fail", highlight=False)
    return int(counts["fail"] > 0)


def described(section: Section) -> list[str]:
    """Lines for people, in rich's markup."""
    lines = [f"  {finding_line(finding)}" for finding in section.findings]
    return [f"[bold]{section.name}[/]  {section.seconds:.1f} s", *lines]


def finding_line(finding: Finding) -> str:
    """In rich's markup."""
    colour = {"pass": "green", "warn": "yellow", "fail": "bold red"}[finding.level]
    text = f"{finding.what}: {finding.evidence}" + (f"; {finding.remedy}" if finding.remedy else "")
    return f"[{colour}]{finding.level}[/]  {escape(text)}"


def as_record(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """For machines: one object per finding."""
    return [
        {"stage": section.stage, "section": section.name, **asdict(finding)}
        for section in sections
        for finding in section.findings
    ]


def check_run(config: Config, console: Console, workers: int | None, data: bool) -> Iterator[Section]:
    """The sections of one run, one by one, until one fails."""
    run = _Run(config, console, workers)
    parts: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("machine", run.machine), ("plan", run.plan), ("model", run.model), ("data", run.data), ("start", run.start),
        ("step", run.step), ("checkpoint", run.checkpoint),
    ]  # fmt: skip
    try:
        for name, work in parts:
            if name == "data" and not data:
                continue
            section = _tried(name, work)
            yield section
            if section.fails:
                return
    finally:
        run.clean()


def _tried(name: str, work: Callable[[], list[Finding]]) -> Section:
    began = time.perf_counter()
    try:
        findings = work()
    except VlmtuneError as error:
        sentence, _, remedy = str(error).rstrip(".").rpartition("; ")
        findings = [Finding("fail", _WHAT[name], sentence or remedy, remedy if sentence else "")]
    except (MemoryError, torch.OutOfMemoryError) as error:
        remedy = "lower train.micro_batch_size or data.max_pixels, or set train.gradient_checkpointing"
        findings = [Finding("fail", "memory suffices", f"no: {' '.join(str(error).split())[:160]}", remedy)]
    return Section(name, findings, time.perf_counter() - began)


_WHAT = {
    "machine": "the run folder can be written",
    "plan": "data, lengths and rules fit together",
    "model": "the model can be loaded",
    "data": "every row can be used",
    "start": "the run can be built",
    "step": "the largest batch goes forward and backward",
    "checkpoint": "a checkpoint gives the same model back",
}
"""What a section that breaks off was about."""


class _Run:
    """One run while it is checked: what a section makes, the next ones use."""

    def __init__(self, config: Config, console: Console, workers: int | None):
        self.config, self.console, self.workers = config, console, workers
        self.device = best_device()
        self.base: Base | None = None
        self.made: Prepared | None = None
        self.trainer: Trainer | None = None
        self.draft: Path | None = None  # a run folder beside the run's, so that it is the disk of the run that is tried

    def clean(self) -> None:
        if self.draft is not None:
            shutil.rmtree(self.draft)

    def machine(self) -> list[Finding]:
        run = Path(self.config.run)
        require_folder(run, "run folder", "set run=…")
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        there = f"{name}, {memory_there(self.device) / 2**30:,.1f} GiB, torch {torch.__version__}"
        return [Finding("pass", "the run folder can be written", str(run)), Finding("pass", "the machine", there)]

    def plan(self) -> list[Finding]:
        """Without weights: seconds, whatever the size of the model."""
        config = self.config
        members = build_train(config.data)
        groups = build_eval_groups(config)
        precision = resolve_precision(config.train.precision, self.device)
        settings = build_settings(config, [member.source.size for member in members], precision)
        model = meta_model(resolve_model(config.model))
        attach_readouts(model, sorted(wanted_readouts(config)), config.train.seed)
        assigned = assign_rules(model, policies(config))
        count = sum(len(sources) for sources in groups.values())
        return [
            Finding("pass", "data files open", f"{len(members)} to train on, {count} held out"),
            Finding("pass", "every parameter has a rule", f"{len(assigned)} parameters, {len(config.plan)} rules"),
            Finding("pass", "lengths fit", f"{settings.total_steps:,} steps of {config.train.batch_size} samples"),
        ]

    def model(self) -> list[Finding]:
        """Weights, tokenizer, template, coordinates."""
        self.base = base = load_base(self.config)
        build_encoder(base.processor, base.model, self.config.data)
        size = sum(parameter.numel() for parameter in base.model.parameters())
        found = [Finding("pass", "the model can be loaded", f"{base.path}, {size:,} parameters")]
        what = "the chat template is the model's own"
        if base.remark is None:
            return [*found, Finding("pass", what, f"data.template {self.config.data.template}")]
        return [*found, Finding("warn", what, base.remark, "set data.template to auto")]

    def data(self) -> list[Finding]:
        folder = data_folder(self.config)
        if not has_files(self.config):
            return [Finding("pass", "every row can be used", "generated scenes: there is no file to read")]
        report = examine_data(self.config, self.console, folder, self.workers, self.base)
        found = [self._of_rows(codes, folder) for codes in report.ordered()]
        if not any(finding.level == "fail" for finding in found):
            longest = max(int(source.tokens.max(initial=0)) for source in report.sources)
            evidence = f"{report.rows:,} rows read, decoded and encoded, the longest has {longest:,} tokens"
            found.insert(0, Finding("pass", "every row can be used", evidence))
        return found

    def _of_rows(self, codes: CodeFindings, folder: Path) -> Finding:
        left_out = self.config.data.on_bad_row == "drop" and codes.code not in (*OF_SOURCES, "too_long")
        level = "fail" if codes.severity == "error" and not left_out else "warn"
        evidence = f"{codes.total:,} times" + (", left out" if left_out else "")
        return Finding(
            level, CODES[codes.code][1], f"{evidence}, first: {codes.examples[0].sentence.rstrip('.')}",
            f"all: {folder / 'findings.jsonl'}",
        )  # fmt: skip

    def start(self) -> list[Finding]:
        quiet = Console(quiet=True)
        self.made = prepare(self.config, self.device, quiet, base=self.base)
        self.base = None
        disk = disk_finding(Path(self.config.run) / "checkpoints", self.made.model, self.made.plan, self.config)
        return [*self.made.findings, *self.made.judged, disk, *self._generation()]

    def _generation(self) -> list[Finding]:
        """Whether the held-out replies could be generated to their ends."""
        wish, encoder = self.config.evaluate, self.made.encoder
        samples = [source[row] for sources in self.made.groups.values() for source in sources
                   for row in range(min(LOOKED_AT, source.size))]  # fmt: skip
        if not samples or not wish.generate:
            return []
        return [generation_finding([_reply_tokens(encoder.encode(s)) for s in samples], wish.max_new_tokens)]

    def step(self) -> list[Finding]:
        """With the largest micro-batch and those of the first step, in which every part that trains is reached."""
        config, made = self.config, self.made
        self.draft = Path(tempfile.mkdtemp(prefix=".check-", dir=_existing(Path(config.run).absolute().parent)))
        largest = largest_micro_batch(made)
        meter = PeakMeter(self.device, held_bytes(made.model))
        self.trainer = Trainer(
            made.model, made.plan, made.objective, build_optimizer(config, made.plan, made.objective, self.device),
            step_loader(made.steps, 0), made.settings, self.draft / "checkpoints", "check", self.device,
            probe=probe_of(made.steps), tower=build_tower(made.model, config),
        )  # fmt: skip
        micro_batches, rng = [largest, *first_micro_batches(made.steps)], rng_state()
        examined = examine_batches(made.model, micro_batches, embedding_rows(made.model), made.encoder)
        if any(finding.level == "fail" for finding in examined):
            return examined
        meter.start()
        try:
            metrics = self.trainer.train_step(micro_batches)
        except NonFinite:
            return diagnose_step(self.trainer, micro_batches, rng, made.encoder).causes
        count, length = largest.inputs["input_ids"].shape
        norms = ", ".join(f"{rule} {norm:.3g}" for rule, norm in metrics["norms"].items() if rule != "total")
        findings = [
            *examined,
            Finding(
                "pass", "the largest batch goes forward and backward",
                f"{count} samples of {length:,} tokens; loss {metrics['loss']:.4g}, gradient norms: {norms}",
            ),
        ]  # fmt: skip
        peak = meter.peak()
        if peak is not None:
            there = memory_there(self.device)
            level = "pass" if peak < TIGHT * there else "warn"
            remedy = "" if level == "pass" else "lower train.micro_batch_size: a longer run takes a little more"
            findings.append(
                Finding(level, "its memory fits", f"measured {peak / MIB:,.0f} MiB of {there / MIB:,.0f}", remedy)
            )
        return findings

    def checkpoint(self) -> list[Finding]:
        """Save, forget, load as anybody would, and answer the same."""
        made, trainer = self.made, self.trainer
        batch = first_micro_batches(made.steps)[0]
        precision = products_of(self.config)
        before = _logits(made.model, batch, precision)
        saved = trainer.save()
        size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
        (self.draft / "config.yaml").write_text(dump_config(self.config))
        self.made = self.trainer = made = trainer = None  # two models may not fit beside each other
        gc.collect()
        loaded = load_run(self.draft, "latest")
        after = _logits(loaded.model, batch, precision)
        gap = float((after - before).abs().max() / before.abs().max())
        evidence = f"{size / MIB:,.1f} MiB; logits of a fresh model differ by {gap:.1e} of the largest"
        what = "a checkpoint gives the same model back"
        if gap <= ALIKE[precision]:
            return [Finding("pass", what, evidence)]
        return [Finding("fail", what, evidence, "report it with the config: what was trained would be lost")]


def _reply_tokens(encoded: Encoded) -> int:
    """Of the last reply, its end included."""
    return int(encoded.supervised()[encoded.turn == encoded.turn.max()].sum())


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in [folder, *folder.parents] if path.is_dir())


@torch.inference_mode()
def _logits(model: torch.nn.Module, batch: Batch, precision: Precision) -> torch.Tensor:
    """float32[B, T, V] on the CPU, of tokens that are no padding; in eval mode, as transformers computes them."""
    model.eval()
    batch = batch.to(model.device)
    with own_forward(model), autocast(precision, model.device):
        logits = model(**model_inputs(model, batch), use_cache=False).logits
    return logits[batch.inputs["attention_mask"].bool()].float().cpu()
