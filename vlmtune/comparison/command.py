"""`vlmtune compare`: methods of fine-tuning, measured on the user's own model and data (SPEC C6).

OUT/ compare.json compare.md compare.html compare.svg        what came out, written anew after every trial
     runs/base.yaml base.json base.log                       the model before any training
     runs/lora-seed0.yaml .json .log and lora-seed0/         a trial: its config, result, output, and run folder
Trials are processes one after the other, seed by seed, so that a machine that slows down does so for every method.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from vlmtune import __version__
from vlmtune.build import build_eval_groups, build_train
from vlmtune.comparison.arms import BASELINE, Arm, build_arms, described_rule, kept_rules, of_seed
from vlmtune.config import Config, differing_keys, dump_config, load_config
from vlmtune.evaluate.comparison import Comparison, Scores, Step, Trial, compare_trials
from vlmtune.interrupt import Interrupted
from vlmtune.observe.comparison import comparison_tables, markdown, metrics_table, plot, write_comparison_page
from vlmtune.paths import alone_in, require_folder, write_text
from vlmtune.sealed import finite, read_json
from vlmtune.types import VlmtuneError

BASE = "base"
PATIENCE_SECONDS = 600  # for a trial to finish its step and save, once it was asked to stop


def parse_rates(given: Sequence[str]) -> dict[str, float]:
    """method -> learning rate, of texts like "lora=2e-3". Raises VlmtuneError."""
    rates: dict[str, float] = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            rate = float(value)
        except ValueError:
            rate = 0.0
        if not name or not 0 < rate < float("inf"):
            raise VlmtuneError(f"--lr {text!r}: write METHOD=RATE with a rate above 0, for example lora=2e-3.")
        if name in rates:
            raise VlmtuneError(f"--lr {name} is there twice; give one rate.")
        rates[name] = rate
    return rates


def compare(
    config: Config, console: Console, methods: Sequence[str], seeds: int = 3, rates: dict[str, float] | None = None,
    output: Path | None = None, as_json: bool = False,
) -> int:  # fmt: skip
    """Run (or continue) every trial, write what came out, and print it; returns the exit code, 1 if a trial failed.

    seeds: how many, from train.seed on; rates: method -> learning rate; output: folder, by default `<run>-compare`.
    A finished trial is not run again. Raises VlmtuneError before anything is trained for what cannot be compared, and
    for a folder of another comparison. An Interrupted (`StopRequest.listening`) reaches the trial that is running.
    """
    folder = output or Path(f"{config.run}-compare")
    require_folder(folder, "--output", "choose another folder")
    if not config.data.eval:
        raise VlmtuneError("data.eval is empty, so there is no quality to compare; name held-out data.")
    build_train(config.data)  # data that is not there is said before the first trial
    build_eval_groups(config)
    arms = build_arms(config, methods, rates or {})
    said = Console(quiet=True) if as_json else console
    for line in _described(arms, config, seeds):
        said.print(line, highlight=False, markup=False, soft_wrap=True)
    with alone_in(folder):
        found = _Trials(folder, arms, [config.train.seed + n for n in range(seeds)], said)
        record = found.run()
    if as_json:
        print(json.dumps(record, indent=1))
    return int(found.is_broken)


def _described(arms: Sequence[Arm], config: Config, seeds: int) -> list[str]:
    lines = []
    for arm in arms:
        if arm.rate is None:
            lines.append(f"{arm.name}: {'; '.join(map(described_rule, arm.config.plan))}")
        else:
            lines.append(f"{arm.name}: {described_rule(arm.config.plan[0])}")
    kept = next((kept_rules(arm) for arm in arms if arm.rate is not None), [])
    if kept:
        lines.append(f"kept from the config: {', '.join(kept)}")
    on_the_way = {
        "evaluate.every": config.evaluate.every,
        "evaluate.limit": config.evaluate.limit,
        "checkpoint.patience": config.checkpoint.patience,
    }
    left = [name for name, given in on_the_way.items() if given is not None]
    if left:
        lines.append(f"left out, so that all trials are of one length and only train: {', '.join(left)}")
    lines.append(f"{len(arms)} methods x {seeds} seeds = {len(arms) * seeds} trials, one after the other")
    return lines


class _Trials:
    """The folder of a comparison, and what has been run in it."""

    def __init__(self, folder: Path, arms: Sequence[Arm], seeds: Sequence[int], console: Console):
        self.folder, self.arms, self.seeds, self.console = folder, arms, seeds, console
        self.runs = folder / "runs"
        self.names = [arm.name for arm in arms]
        self.baseline = BASELINE if BASELINE in self.names else self.names[0]
        trials = [(BASE, arms[0], seeds[0]), *((f"{a.name}-seed{seed}", a, seed) for seed in seeds for a in arms)]
        self.configs = {name: of_seed(arm.config, seed, str(self.runs / name)) for name, arm, seed in trials}
        self._require_own_folder()

    @property
    def is_broken(self) -> bool:
        return any("failed" in (self._result(name) or {}) for name in self.configs if name != BASE)

    def run(self) -> dict[str, Any]:
        """Every trial that has no result; returns what compare.json holds."""
        self.runs.mkdir(parents=True, exist_ok=True)
        record = self._write()
        for number, (name, config) in enumerate(self.configs.items()):
            done = self._result(name)
            if done is None or "failed" in done:
                self.console.print(f"{number} of {len(self.configs) - 1}: {name} …", highlight=False, markup=False)
                done = self._run_one(name, config)
                record = self._write()
            if name == BASE and done.get("why") == "error":  # so would every trial, when it has been trained
                raise VlmtuneError(f"the base model cannot be scored: {done['failed']}")
            self.console.print(f"{name}: {self._in_short(done)}", highlight=False, markup=False, soft_wrap=True)
        comparison = self._comparison()
        for table in comparison_tables(comparison):
            self.console.print(table)
        if any(row.metrics for row in comparison.rows):
            self.console.print(metrics_table(comparison))
        for note in comparison.notes:
            self.console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
        self.console.print(f"all of it: {self.folder / 'compare.html'}", highlight=False, markup=False, soft_wrap=True)
        return record

    def _run_one(self, name: str, config: Config) -> dict[str, Any]:
        """The result of a trial after its process has ended; where it left none, what the process ended with."""
        file, result, log = (self.runs / f"{name}{end}" for end in (".yaml", ".json", ".log"))
        result.unlink(missing_ok=True)
        if (
            self._what_differs(name, config) and (self.runs / name).exists()
        ):  # it failed, and is tried with other values
            shutil.rmtree(self.runs / name)
        write_text(file, dump_config(config))
        command = [
            sys.executable,
            "-m",
            "vlmtune.comparison.trial",
            str(file),
            str(result),
            *(["--base"] if name == BASE else []),
        ]
        code = self._wait(command, log)
        found = self._result(name)
        if found is None:
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            how = f"ended with exit code {code}"
            if code < 0:
                how = f"was killed by {signal.Signals(-code).name}"
                how += " (systems do that where memory runs out)" if -code == signal.SIGKILL else ""
            last = f": {said[-1].strip()}" if said else ""
            found = {"failed": f"its process {how}{last}; all of it: {log}"}
            write_text(result, json.dumps(found, indent=1))
        return found

    def _wait(self, command: list[str], log: Path) -> int:
        """The exit code of a process of its own session: a signal to us is passed on, so that it can save and end."""
        with log.open("a") as file:
            child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                return child.wait()
            except Interrupted:
                child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(PATIENCE_SECONDS)
                raise
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()

    def _result(self, name: str) -> dict[str, Any] | None:
        path = self.runs / f"{name}.json"
        return read_json(path, "delete it, and the trial is scored again") if path.is_file() else None

    def _require_own_folder(self) -> None:
        """Refuse files of somebody else, and results of another config: they would pass for this one's."""
        used = self.folder.exists() and any(not path.name.startswith(".") for path in self.folder.iterdir())
        if used and not (self.folder / "compare.json").exists():
            raise VlmtuneError(
                f"{self.folder} is not empty and not the folder of a comparison (no compare.json); choose another "
                "--output."
            )
        for name, config in self.configs.items():
            keys = self._what_differs(name, config)
            if keys and "failed" not in (self._result(name) or {}):
                raise VlmtuneError(
                    f"{self.folder} holds another comparison: {name} differs in {', '.join(keys[:4])}; choose another "
                    "--output, or delete that one."
                )

    def _what_differs(self, name: str, config: Config) -> list[str]:
        """The keys in which what was begun under a name is not what is wanted now; [] where nothing was begun."""
        file = self.runs / f"{name}.yaml"
        before = load_config(str(file)) if file.is_file() else config
        return differing_keys(_what_counts(name, before), _what_counts(name, config))

    def _comparison(self) -> Comparison:
        trials = []
        for arm in self.arms:
            for seed in self.seeds:
                done = self._result(f"{arm.name}-seed{seed}")
                if done is not None and "failed" in done:
                    trials.append(Trial(arm.name, seed, done["failed"]))
                elif done is not None:
                    trials.append(_trial(done["trial"]))
        base = self._result(BASE)
        scores = Scores.from_record(base["scores"]) if base is not None and "scores" in base else None
        return compare_trials(trials, scores, self.names, self.baseline)

    def _write(self) -> dict[str, Any]:
        comparison = self._comparison()
        plans = {arm.name: [described_rule(rule) for rule in arm.config.plan] for arm in self.arms}
        rates = {arm.name: arm.rate for arm in self.arms}
        config = self.arms[0].config
        waiting = [name for name in self.configs if self._result(name) is None]
        record = finite(
            {"vlmtune": __version__, "model": config.model, "seeds": list(self.seeds), "learning_rates": rates,
             "plans": plans, "waiting": waiting, **asdict(comparison)}
        )  # fmt: skip
        write_text(self.folder / "compare.json", json.dumps(record, indent=1))  # first: it marks the folder
        write_text(self.folder / "compare.md", markdown(comparison, rates))
        write_text(self.folder / "compare.svg", plot(comparison))
        write_comparison_page(self.folder / "compare.html", comparison, config.model, rates, plans, waiting)
        return record

    def _in_short(self, done: dict[str, Any]) -> str:
        if "failed" in done:
            return f"failed: {done['failed']}"
        scores = done["scores"] if "scores" in done else done["trial"]["scores"]
        return f"held-out loss {scores['metrics']['loss']:.3f}"


def _what_counts(name: str, config: Config) -> dict[str, Any]:
    """What the result of a trial, or of the base, depends on."""
    tree = config.model_dump(mode="json", exclude={"run"})
    return {key: tree[key] for key in ("model", "data", "evaluate")} if name == BASE else tree


def _trial(record: dict[str, Any]) -> Trial:
    steps = [Step(**step) for step in record["steps"]]
    return Trial(**record | {"steps": steps, "scores": Scores.from_record(record["scores"])})
