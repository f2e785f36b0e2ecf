"""`vlmtune train` of a chain: one run after the other, each from the exported result of the one before (SPEC E4).

runs/NAME/ config.yaml stages.json history.jsonl summary.json report.html
           1_<stage>/ (a run folder) 1_<stage>/exported/ (a model folder)  2_<stage>/ …
What stands beside the stages is made of their own files, again and again while they run.
"""

from __future__ import annotations

import json
import shutil
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmtune.adapt.plan import assign_rules
from vlmtune.adapt.serving import NONLINEAR
from vlmtune.build import best_device, build_eval_groups, build_train, fingerprint_tree, resolve_model
from vlmtune.build_course import build_settings, policies
from vlmtune.build_loss import wanted_readouts
from vlmtune.config import EXPORTED, Chain, Config, differing_keys, dump_chain, load_config, load_run_config
from vlmtune.export import export_run
from vlmtune.interrupt import Interrupted, StopRequest
from vlmtune.models.load import meta_model
from vlmtune.models.readouts import attach_readouts
from vlmtune.observe.log import read_history
from vlmtune.observe.page import write_page
from vlmtune.observer import Observer
from vlmtune.optim.precision import resolve_precision
from vlmtune.paths import alone_in, require_folder, write_text
from vlmtune.processes import ALONE, Processes
from vlmtune.run import train
from vlmtune.sealed import read_json
from vlmtune.types import Finding, VlmtuneError

EVERY_SECONDS = 20  # between two looks at the running stage


def train_chain(
    chain: Chain,
    console: Console,
    restart: bool = False,
    stop: StopRequest | None = None,
    check: bool = True,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Run (or continue) all stages; returns what summary.json of the chain holds. check, processes: as `run.train`.

    Finished stages are left as they are, an unfinished one goes on where it was. Raises VlmtuneError before anything
    trains for a stage whose result cannot be merged and for a folder of another chain; Interrupted as `run.train`.
    """
    folder = Path(chain.run)
    with ExitStack() as held:
        with processes.agreed("chain"):
            _require_mergeable(chain)
            _require_readouts_once(chain)
            _require_startable(chain)
            _require_own_folder(folder, chain, restart)
        with processes.agreed("folder of the chain"):
            if processes.is_first:
                held.enter_context(alone_in(folder))
                _open(folder, chain, restart)
        console = console if processes.is_first else Console(quiet=True)
        return _train_stages(chain, folder, console, stop, check, processes)


def _open(folder: Path, chain: Chain, restart: bool) -> None:
    if restart and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "stages.json", json.dumps(_described(chain), indent=1))  # first: it marks the folder of a chain
    write_text(folder / "config.yaml", dump_chain(chain))


def _train_stages(
    chain: Chain, folder: Path, console: Console, stop: StopRequest | None, check: bool, processes: Processes
) -> dict[str, Any]:
    *_, last = chain.stages
    summary: dict[str, Any] = {}
    for number, (name, config) in enumerate(chain.stages.items(), 1):
        console.rule(f"stage {number} of {len(chain.stages)}: {name}")
        if not processes.on_first(f"stage {name}", partial(_is_finished, config)):
            joined = [Joined(folder, chain)] if processes.is_first else []
            try:
                train(config, console, observers=joined, stop=stop, check=check, processes=processes)
            except (Interrupted, VlmtuneError):
                if processes.is_first:
                    join(folder, chain)
                raise
        elif processes.is_first:
            console.print(f"{config.run} is finished", highlight=False)
            write_page(Path(config.run))  # the last thing that a run does; it may have been killed before
        summary = processes.on_first(
            f"result of stage {name}", partial(_close_stage, folder, chain, config, name != last, console)
        )
    console.print(stages_table(summary))
    console.print(
        f"all stages: {folder / 'report.html'}; use the last one: {Path(chain.stages[last].run)}", highlight=False
    )
    return summary


def _close_stage(folder: Path, chain: Chain, config: Config, is_read_on: bool, console: Console) -> dict[str, Any]:
    """is_read_on: another stage starts from the result of this one."""
    run = Path(config.run)
    if is_read_on and not (run / EXPORTED).exists():
        for draft in run.glob(f".{EXPORTED}.*.tmp"):  # of a process that was killed
            shutil.rmtree(draft)
        export_run(run, "latest", run / EXPORTED, console)
    return join(folder, chain)


def _require_mergeable(chain: Chain) -> None:
    *others, _ = chain.stages.items()
    for name, config in others:
        for rule in config.plan:
            if rule.train in NONLINEAR:
                raise VlmtuneError(
                    f"stage {name}: rule {rule.match!r} says {rule.train}, which cannot be merged, but the next stage "
                    "starts from a merged model; use lora or full here, or make it the last stage."
                )


def _require_readouts_once(chain: Chain) -> None:
    """A merged model has no read-outs, and a stage draws its own anew: what an earlier one taught them would go."""
    taught: dict[str, str] = {}
    for name, config in chain.stages.items():
        for head in sorted(wanted_readouts(config)):
            if head in taught:
                raise VlmtuneError(
                    f"stage {name}: its losses read a {head} head, and so do those of stage {taught[head]}, but the "
                    f"exported model between them has none, so it would start anew; keep it in one of the stages."
                )
        taught |= dict.fromkeys(wanted_readouts(config), name)


def _require_startable(chain: Chain) -> None:
    """Refuse before the first stage trains, not days later: data that is not there, lengths that do not fit into the
    stage (rows that are left out later can only make it shorter), rules that cover nothing.

    All stages have the parameter names of the first one's model.
    """
    path = resolve_model(next(iter(chain.stages.values())).model)
    for name, config in chain.stages.items():
        if _is_finished(config):
            continue
        try:
            sizes = [member.source.size for member in build_train(config.data)]
            build_settings(config, sizes, resolve_precision(config.train.precision, best_device()))
            build_eval_groups(config)
            model = meta_model(path)
            attach_readouts(model, sorted(wanted_readouts(config)), config.train.seed)
            assign_rules(model, policies(config))
        except VlmtuneError as error:
            raise VlmtuneError(f"stage {name}: {error}") from error


def _require_own_folder(folder: Path, chain: Chain, restart: bool) -> None:
    require_folder(folder, "run folder", "set run=…")
    used = folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())
    if used and not (folder / "stages.json").exists():
        raise VlmtuneError(
            f"{folder} is not empty and not the folder of a chain (no stages.json); set run=… to another."
        )
    if not used or restart or not (folder / "config.yaml").exists():
        return
    before = load_run_config(str(folder / "config.yaml"))
    if list(before.stages) != list(chain.stages):
        raise VlmtuneError(
            f"{folder} holds a chain of the stages {', '.join(before.stages)}; give this one another folder (run=…), "
            "or delete that one with --restart."
        )
    for name, config in chain.stages.items():
        keys = differing_keys(fingerprint_tree(before.stages[name]), fingerprint_tree(config))
        if keys:
            raise VlmtuneError(
                f"{folder} holds a chain whose stage {name} differs: {', '.join(keys[:4])}; give this one another "
                "folder (run=…), or delete that one with --restart."
            )


def _described(chain: Chain) -> list[dict[str, Any]]:
    return [{"name": name, "folder": Path(config.run).name} for name, config in chain.stages.items()]


def _is_finished(config: Config) -> bool:
    """Whether this very config has been trained to its end in its folder."""
    run = Path(config.run)
    if not (run / "summary.json").is_file():
        return False
    return fingerprint_tree(load_config(str(run / "config.yaml"))) == fingerprint_tree(config)


# ---- what stands beside the stages -------------------------------------------------------------------------------


class Joined(Observer):
    """Keeps the joined files and the page of a chain up to date while a stage runs."""

    def __init__(self, folder: Path, chain: Chain):
        self.folder, self.chain = folder, chain
        self._last = time.monotonic()

    def on_step(self, state: Any, metrics: dict[str, Any]) -> None:
        if time.monotonic() - self._last > EVERY_SECONDS:
            join(self.folder, self.chain)
            self._last = time.monotonic()

    def on_eval(self, state: Any, metrics: dict[str, Any]) -> None:
        join(self.folder, self.chain)

    def on_finding(self, state: Any, finding: Finding) -> None:
        join(self.folder, self.chain)


def join(folder: Path, chain: Chain) -> dict[str, Any]:
    """Write history.jsonl, stages.json, summary.json and report.html of the chain from the files of its stages.

    A record of the history has its stage, its step in the stage, and as `step` the one of the whole chain.
    """
    records: list[dict[str, Any]] = []
    stages: list[dict[str, Any]] = []
    first = 0
    for described, config in zip(_described(chain), chain.stages.values(), strict=True):
        run = Path(config.run)
        own = read_history(run / "history.jsonl")
        file = run / "summary.json"
        summary = read_json(file, "delete it and start the chain again") if file.is_file() else None
        steps = summary["steps"] if summary else max((record["step"] for record in own), default=0)
        records += [
            record | {"stage": described["name"], "stage_step": record["step"], "step": first + record["step"]}
            for record in own
        ]
        stages.append(
            {**described, "first_step": first, "steps": steps,
             "status": "finished" if summary else "running" if own else "waiting",
             "train_seconds": summary["train_seconds"] if summary else None,
             "metrics": summary["metrics"] if summary else {}}
        )  # fmt: skip
        first += steps
    whole = _summary(stages)
    write_text(folder / "history.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    write_text(folder / "stages.json", json.dumps(stages, indent=1))
    if all(stage["status"] == "finished" for stage in stages):
        write_text(folder / "summary.json", json.dumps(whole, indent=1))
    write_page(folder)
    return whole


def _summary(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """metrics: "group/task" -> metric -> before the first stage that has it, and after the last; stages: after each."""
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    for stage in stages:
        for place, values in stage["metrics"].items():
            for metric, pair in values.items():
                found = metrics.setdefault(place, {}).setdefault(metric, {})
                if "before" in pair:
                    found.setdefault("before", pair["before"])
                if "after" in pair:
                    found["after"] = pair["after"]
    seconds = [stage["train_seconds"] or 0.0 for stage in stages]
    return {
        "metrics": dict(sorted(metrics.items())),
        "steps": sum(stage["steps"] for stage in stages),
        "train_seconds": sum(seconds),
        "stages": stages,
    }


def stages_table(summary: dict[str, Any]) -> Table:
    """The held-out metrics before the first stage and after each."""
    stages = summary["stages"]
    table = Table(title="held-out data after each stage", title_justify="left")
    for name in ("group", "task", "metric", "before", *(stage["name"] for stage in stages)):
        table.add_column(name, justify="left" if name in ("group", "task", "metric") else "right")
    for place, values in summary["metrics"].items():
        group, _, task = place.partition("/")
        for metric, pair in values.items():
            after = [stage["metrics"].get(place, {}).get(metric, {}).get("after") for stage in stages]
            shown = ["" if value is None else f"{value:.3f}" for value in (pair.get("before"), *after)]
            table.add_row(group, task, metric, *shown)
    return table
