"""`vlmtune train`: one run folder from a config, resumable at any moment.

runs/NAME/ config.yaml environment.json assignment.json data.json start.json memory.json history.jsonl dropped.jsonl
           changed.jsonl suspects.jsonl report.html summary.json samples.json tensorboard/
           checkpoints/step_000100 checkpoints/best checkpoints/latest
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console

from vlmtune import __version__
from vlmtune.adapt.memory import PeakMeter
from vlmtune.build import best_device, changes, count_samples, fingerprint_tree, source_names, step_loader
from vlmtune.build_course import build_optimizer, build_recovery, build_tower, lr_scaling, samples_every
from vlmtune.checkpoint import (
    TrainState,
    checkpoint_folders,
    config_fingerprint,
    newest_whole_checkpoint,
    read_state,
    set_aside,
)
from vlmtune.composition import composition, composition_table, data_record
from vlmtune.config import Config, differing_keys, dump_config, load_config
from vlmtune.data.active import ActiveOrder
from vlmtune.data.loader import Steps
from vlmtune.data.sampling import TemperatureOrder
from vlmtune.data.survey import fitted_sample
from vlmtune.evaluate.choices import ChoiceRule
from vlmtune.evaluate.evaluation import Evaluation, evaluate
from vlmtune.failure import investigator
from vlmtune.interrupt import StopRequest
from vlmtune.observe.health import Health, used_bytes
from vlmtune.observe.log import History, ProgressLine, TensorBoard, duration
from vlmtune.observe.loss_table import loss_table
from vlmtune.observe.page import write_page
from vlmtune.observe.token_view import write_token_view
from vlmtune.observer import Observer
from vlmtune.outcome import evaluation_record, metrics_table, summarise, write_suspects
from vlmtune.paths import alone_in, require_folder, write_text
from vlmtune.prepare import Prepared, prepare, probe_of
from vlmtune.probe import require_same_losses
from vlmtune.processes import ALONE, Processes
from vlmtune.same_run import require_same_config, require_same_data
from vlmtune.samples import Gallery, SampleWriter
from vlmtune.sealed import finite, read_json
from vlmtune.shards import fold, is_sharded
from vlmtune.start import (
    MemoryReport,
    describe_phases,
    describe_start,
    held_bytes,
    require_disk,
    require_no_failure,
)
from vlmtune.trainer import Trainer
from vlmtune.types import Finding, VlmtuneError
from vlmtune.view import histograms, token_view
from vlmtune.vision_cache import VisionCache

KEYS_NAMED = 4  # of two configs that differ
LOSS_SAMPLES = 32  # of the loss table, about
FIRST_BATCH_SHOWN = 8  # samples of the first batch in first_batch.html
IN_PARTS = (
    "The cause was not looked for, because each process holds a part of the model; go on with one process, or with "
    "train.shard: false."
)
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "pillow", "numpy", "pydantic")


def train(
    config: Config,
    console: Console,
    restart: bool = False,
    observers: Sequence[Observer] = (),
    stop: StopRequest | None = None,
    check: bool = True,
    processes: Processes = ALONE,
) -> dict:
    """Run (or continue) the training a config describes; returns the summary that is also written to summary.json.

    observers: told of the run besides those that write its folder. stop: asks it to end; by default nobody does.
    check: look at the start, the settings and memory first, and refuse what cannot go well. processes: all that train
    together, each of which calls this with the same arguments; the first one writes and talks.
    Raises VlmtuneError before anything is written for a config whose run folder cannot be written or belongs to
    another config, and during the run for whatever stops it; Interrupted where `stop` was asked to.
    """
    require_same_config(processes, config, restart, check)
    with ExitStack() as held:
        with processes.agreed("run folder"):
            if processes.is_first:
                require_folder(Path(config.run), "run folder", "set run=…")
                held.enter_context(alone_in(Path(config.run)))
        console = console if processes.is_first else Console(quiet=True)
        return _train(config, console, restart, observers, stop, check, processes)


def _train(
    config: Config,
    console: Console,
    restart: bool,
    observers: Sequence[Observer],
    stop: StopRequest | None,
    check: bool,
    processes: Processes,
) -> dict:
    folder = Path(config.run)
    fingerprint = config_fingerprint(fingerprint_tree(config))
    checkpoint = _common_checkpoint(config, fingerprint, restart, console, processes)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    if checkpoint is not None:
        read_before(folder / "before.json")  # a damaged one is said now, not after the training
    device = best_device()
    torch.manual_seed(config.train.seed)
    with processes.agreed("preparation"):
        made = prepare(config, device, console, check, processes=processes)
        require_no_failure(made.judged, "check")
    require_same_data(processes, made, device)
    with processes.agreed("start"):
        if processes.is_first:
            require_disk(folder / "checkpoints", made.model, made.plan, config, console)
            open_folder(config, made, checkpoint, restart, device, check)
            _describe(config, made, device, check, processes.size, console)
    _measure_before(config, made, checkpoint, console, processes)

    optimizer = build_optimizer(config, made.plan, made.objective, device)
    with processes.agreed("vision cache"):
        cache = None if config.data.vision_cache is None else VisionCache.of(config, made)
    if cache is not None:
        console.print(cache.described(), highlight=False, markup=False)
    tower = build_tower(made.model, config)
    if tower is not None and processes.size > 1:
        raise VlmtuneError(
            "plan: batchnorm: sync normalises over the images of one process, and there are several; say batchnorm: "
            "frozen."
        )
    with processes.agreed("run folder"):
        own = _Told.of(config, made, optimizer, checkpoint, device, console, observers) if processes.is_first else None

    def evaluated(step: int) -> dict[str, float]:
        measured = measure(config, made, config.evaluate.limit, processes)
        if own is not None:
            own.samples.take(step, measured.scored)
        return measured.metrics

    trainer = Trainer(
        made.model, made.plan, made.objective, optimizer,
        step_loader(made.steps if cache is None else cache.steps, config.data.workers), made.settings,
        folder / "checkpoints", fingerprint, device, () if own is None else own.observers,
        evaluated if made.groups else None,
        made.steps.order if isinstance(made.steps.order, (TemperatureOrder, ActiveOrder)) else None,
        build_recovery(config), probe_of(made.steps),
        () if own is None else (own.history.path, own.history.gradients), stop,
        tower, vision=None if cache is None else cache.vision, processes=processes, filler=made.filler,
    )  # fmt: skip
    if is_sharded(made.model):  # a part of a model runs nothing by itself
        trainer.investigate = lambda failure, rng: IN_PARTS
    else:
        trainer.investigate = investigator(folder, trainer, made.encoder, made.steps)
    if checkpoint is not None:
        with processes.agreed("resume"):
            trainer.resume(checkpoint)
            require_same_losses(checkpoint, read_state(checkpoint), made.model, made.settings.precision)
        console.print(f"continuing from {checkpoint} (step {trainer.state.step})")
        if trainer.state.step >= made.settings.total_steps or trainer.state.stopped:
            console.print("this run has finished already: nothing is left to train, and it is evaluated again")
    with ExitStack() as watching:
        if own is not None:
            watching.callback(own.board.close)
            own.meter.start()
        try:
            with nullcontext() if own is None else own.progress:
                state = trainer.fit()
        finally:
            if cache is not None:
                console.print(cache.close(), highlight=False, markup=False)
        if state.stopped:
            console.print(f"stopped early at step {state.step}: {state.stopped}", highlight=False, markup=False)
        return finish(config, made, state, console, own, processes)


def _common_checkpoint(
    config: Config, fingerprint: str, restart: bool, console: Console, processes: Processes
) -> Path | None:
    """What the first process continues from, if all can read it."""

    def chosen() -> str | None:
        found = prepare_folder(config, fingerprint, restart, console)
        return None if found is None else found.name

    name = processes.on_first("checkpoint", chosen)
    checkpoint = None if name is None else Path(config.run) / "checkpoints" / name
    with processes.agreed("checkpoint"):
        if checkpoint is not None and not checkpoint.is_dir():
            raise VlmtuneError(
                f"{checkpoint} is not on {platform.node()}; put the run folder on a file system that all machines "
                "share."
            )
    return checkpoint


def _describe(
    config: Config, made: Prepared, device: torch.device, check: bool, processes: int, console: Console
) -> None:
    """Say what will happen, and keep what the sources are made of."""
    folder, sources, steps, settings = Path(config.run), made.sources, made.steps, made.settings
    describe_start(made.model, made.plan, made.findings, made.judged, console)
    if not check:
        console.print("check: not looked at (--no-check)", highlight=False)
    some = [(source, made.encoder.encode(sources[source][row])) for source, row in loss_samples(steps)]
    rows = composition(steps, sources, some)
    write_text(folder / "composition.json", json.dumps(rows, indent=1))
    console.print(composition_table(rows))
    console.print(loss_table(made.objective, [sample for _, sample in some]))
    for line in describe_phases(made.predictions, settings):
        console.print(line, highlight=False, markup=False)
    scaling = lr_scaling(config)
    console.print(
        f"{settings.total_steps} steps of {config.train.batch_size} samples "
        f"({steps.room}), {settings.precision} on "
        f"{device.type}, {torch.get_num_threads()} threads"
        + (f", {processes} processes share every step" if processes > 1 else "")
        + (f", learning rates x {scaling:g} for the batch size" if scaling != 1 else "")
        + f"; run folder {folder}",
        highlight=False,
    )


def _measure_before(
    config: Config, made: Prepared, checkpoint: Path | None, console: Console, processes: Processes
) -> None:
    """Evaluate before the first step, where there is something to evaluate and nobody has."""
    before_file = Path(config.run) / "before.json"

    def is_wanted() -> bool:
        if checkpoint is None:  # a run killed before its first checkpoint may have had another config
            before_file.unlink(missing_ok=True)
        return bool(made.groups) and checkpoint is None

    if not processes.on_first("whether to evaluate", is_wanted):
        return
    console.print("evaluation before training …")
    measured = measure(config, made, None, processes)
    require_best(config.checkpoint.best, measured.metrics)
    with processes.agreed("evaluation before training"):
        if processes.is_first:
            write_text(before_file, json.dumps(finite(evaluation_record(measured))))


@dataclass(frozen=True)
class _Told:
    """Whoever is told of a run by the process that writes its folder. observers: all of them."""

    gallery: Gallery
    meter: PeakMeter
    history: History
    board: TensorBoard
    progress: ProgressLine
    samples: SampleWriter
    observers: list[Observer]

    @classmethod
    def of(
        cls,
        config: Config,
        made: Prepared,
        optimizer: torch.optim.Optimizer,
        checkpoint: Path | None,
        device: torch.device,
        console: Console,
        others: Sequence[Observer],
    ) -> _Told:
        folder, settings, wish = Path(config.run), made.settings, config.evaluate
        gallery = Gallery(made.groups, wish.limit, wish.gallery if wish.generate else 0)
        gallery.write(folder, gallery.recorded(read_before(folder / "before.json")))
        meter = PeakMeter(device, held_bytes(made.model))
        from_step = read_state(checkpoint)["state"]["step"] if checkpoint else 0
        by_source = count_samples(made.steps.order, made.sources)
        every, total = settings.log_every, settings.total_steps
        history = History(folder / "history.jsonl", every, from_step, by_source, partial(used_bytes, device), total)
        board = TensorBoard(folder / "tensorboard", every, from_step, by_source, total)
        progress = ProgressLine(console, total, every)
        samples = SampleWriter(
            gallery, made.model, made.encoder, history, console,
            samples_every(config, [source.size for source in made.sources]),
            wish.max_new_tokens, wish.batch_size, settings.precision,
        )  # fmt: skip
        told = [
            history, board, progress, samples, PageWriter(folder, every_seconds=20),
            MemoryReport(made.predictions[0].predicted, meter, console, folder / "memory.json", checkpoint is not None),
            *others,
        ]  # fmt: skip
        health = Health(told, optimizer, settings.rates, total, settings.phases(), device)
        return cls(gallery, meter, history, board, progress, samples, [*told, health])


def open_folder(
    config: Config, made: Prepared, checkpoint: Path | None, restart: bool, device: torch.device, checked: bool
) -> None:
    """Write what a run folder holds before its first step. Raises VlmtuneError where the data changed meanwhile."""
    folder = Path(config.run)
    changed = {
        name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for name, rows in changes(config, made.fitted).items()
    }
    if checkpoint is not None:
        require_same_rows(folder, changed)
        for name in ("history.jsonl", "gradients.jsonl"):  # somebody may have deleted them; the checkpoint has a copy
            if (checkpoint / name).is_file() and not (folder / name).exists():
                shutil.copyfile(checkpoint / name, folder / name)
    if restart and folder.exists():  # only now: whatever is wrong with the new config, the old run is still there
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "assignment.json", json.dumps(made.plan.rows, indent=1))  # first: it marks a run folder
    write_text(folder / "config.yaml", dump_config(config))
    environ = environment(made.settings.precision, device) | {"checked": checked, "steps": made.settings.total_steps}
    write_text(folder / "environment.json", json.dumps(environ, indent=1))
    for name, text in changed.items():
        write_text(folder / name, text)
    if not (folder / "data.json").exists():  # of the data that the run began with
        write_text(folder / "data.json", json.dumps(data_record(config), indent=1))
    first = [made.steps.order[k] for k in range(min(FIRST_BATCH_SHOWN, config.train.samples_per_forward))]
    write_token_view(
        folder / "first_batch.html",
        [token_view(made.encoder, fitted_sample(made.sources[s], row)) for s, row in first],
        histograms(config, made.fitted),
    )
    findings = [asdict(finding) for finding in [*made.findings, *made.judged]]
    write_text(folder / "start.json", json.dumps(findings, indent=1))


def measure(config: Config, made: Prepared, limit: int | None, processes: Processes) -> Evaluation:
    """Of all held-out groups. limit: samples per source."""
    made.model.eval()
    wish = config.evaluate
    measured = evaluate(
        made.model, made.encoder, made.groups, limit=limit, batch_size=wish.batch_size,
        max_new_tokens=wish.max_new_tokens if wish.generate else None, precision=made.settings.precision,
        choices=ChoiceRule(wish.choices, wish.alpha), chosen=wish.metrics,
        processes=ALONE if is_sharded(made.model) else processes,  # all run every forward of a sharded one together
    )  # fmt: skip
    fold(made.model)
    # what is decided by them is decided alike
    return replace(measured, metrics=processes.gather("metrics", measured.metrics)[0])


def finish(
    config: Config, made: Prepared, state: TrainState, console: Console, own: _Told | None, processes: Processes
) -> dict:
    """Evaluate what was trained, and write the samples, the summary and the report. own: of the first process."""
    folder, after = Path(config.run), None
    if made.groups:
        console.print("evaluation after training …")
        rng = torch.get_rng_state()
        after = measure(config, made, None, processes)
        torch.set_rng_state(rng)
    before = read_before(folder / "before.json")
    by_source = count_samples(made.steps.order, made.sources)
    summary = summarise(before, after, state, made.settings.total_steps, by_source(state.samples))
    with processes.agreed("summary"):
        if own is not None:
            if isinstance(made.steps.order, ActiveOrder):
                suspects, names = made.steps.order.suspects(), source_names(made.sources)
                said = write_suspects(folder / "suspects.jsonl", suspects, made.sources, names)
                console.print(said, highlight=False, markup=False, soft_wrap=True)
            _write_summary(folder, summary, before, after, state, console, own)
    return summary


def _write_summary(
    folder: Path,
    summary: dict,
    before: dict | None,
    after: Evaluation | None,
    state: TrainState,
    console: Console,
    own: _Told,
) -> None:
    if after is not None:
        for observer in (own.history, own.board):
            observer.on_eval(state, after.metrics)
        own.gallery.write(folder, own.gallery.recorded(before), own.gallery.answers(after.scored))
    write_text(folder / "summary.json", json.dumps(finite(summary), indent=1))  # last: it says that the run is finished
    page = write_page(folder)
    if summary["metrics"]:
        console.print(metrics_table(summary["metrics"]))
    if state.skipped:
        console.print(
            f"{len(state.skipped)} of {state.step} steps made no update, {len(state.rewinds)} times the run went back: "
            "what was found is on the page", highlight=False,
        )  # fmt: skip
    console.print(f"trained {state.step} steps in {duration(state.seconds)}; report: {page}", highlight=False)


def prepare_folder(config: Config, fingerprint: str, restart: bool, console: Console) -> Path | None:
    """Check that the run folder can be used; returns the checkpoint to continue from: the newest without damage.

    Damaged ones that are newer are named and set aside; nothing else is changed.
    """
    folder = Path(config.run)
    # hidden names are drafts of a run that was killed while it wrote its first file
    used = folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())
    if used and not (folder / "assignment.json").exists():
        raise VlmtuneError(
            f"{folder} is not empty and not a run folder of vlmtune (no assignment.json): its files could be "
            "overwritten; set run=… to a new folder."
        )
    if restart:
        return None
    checkpoint, complaints = newest_whole_checkpoint(folder / "checkpoints")
    if checkpoint is not None and read_state(checkpoint)["config"] != fingerprint:
        raise VlmtuneError(
            f"{folder} holds a run of another config{_what_differs(folder, config)}; give this one another folder "
            "(run=…), or delete that run with --restart."
        )
    for complaint in complaints:
        console.print(f"warning: {complaint}; {checkpoint.name} is used", highlight=False, markup=False, soft_wrap=True)
    for newer in [path for path in checkpoint_folders(folder / "checkpoints") if path.name > checkpoint.name]:
        set_aside(newer)
    return checkpoint


def _what_differs(folder: Path, config: Config) -> str:
    """The keys in which a run's config and this one differ; nothing when the run was written by another version."""
    try:
        before = fingerprint_tree(load_config(str(folder / "config.yaml")))
    except VlmtuneError:
        return " (of another version of vlmtune: its config.yaml cannot be read)"
    keys = differing_keys(before, fingerprint_tree(config))
    more = f" and {len(keys) - KEYS_NAMED} more" if len(keys) > KEYS_NAMED else ""
    return (
        f": {', '.join(keys[:KEYS_NAMED])}{more}" if keys else " (no key differs: another version of vlmtune wrote it)"
    )


def read_before(path: Path) -> dict | None:
    """What was measured before training; None where nothing was. Raises VlmtuneError for a damaged file."""
    if not path.exists():
        return None
    return read_json(path, "delete it and run the same command again: the report then has none of before training")


def loss_samples(steps: Steps) -> list[tuple[int, int]]:
    """(source, row) of the samples that the loss table counts: the first of the run, whole batches."""
    batch = steps.batch_size
    return [steps.order[k] for k in range(min(steps.order.decide(0), batch * max(1, LOSS_SAMPLES // batch)))]


def require_same_rows(folder: Path, changed: dict[str, str]) -> None:
    """Refuse to continue where other rows are left out or trimmed than when the run began: its order would be another.

    changed: name of a file of the run folder -> what would stand in it now.
    """
    for name, text in changed.items():
        path = folder / name
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            raise VlmtuneError(
                f"{folder}: other rows of the data are left out or trimmed than when this run began ({name} would "
                "change), because files changed meanwhile; put them back, or start over with --restart."
            )


def require_best(best: str, metrics: dict[str, float]) -> None:
    """Refuse a checkpoint.best that no evaluation reports, before a step is trained."""
    if best not in metrics:
        raise VlmtuneError(f"checkpoint.best is {best!r}, but evaluation reports {', '.join(sorted(metrics))}.")


class PageWriter(Observer):
    """Keeps report.html of a run in progress up to date."""

    def __init__(self, folder: Path, every_seconds: float):
        self.folder, self.every = folder, every_seconds
        self._last = time.monotonic()

    def on_step(self, state, metrics: dict) -> None:
        if time.monotonic() - self._last > self.every:
            write_page(self.folder)
            self._last = time.monotonic()

    def on_eval(self, state, metrics: dict) -> None:
        write_page(self.folder)

    def on_finding(self, state, finding: Finding) -> None:
        write_page(self.folder)


def environment(precision: str, device: torch.device) -> dict:
    return {
        "vlmtune": __version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
