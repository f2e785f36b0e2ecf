"""`vlmtune doctor`: what is wrong with a run or a checkpoint, asked in the order data, config, code (SPEC G8, H4)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file

from vlmtune import __version__
from vlmtune.checkpoint import OTHER, checkpoint_folders, newest_whole_checkpoint, read_state
from vlmtune.checks.after import (
    Spread,
    course_findings,
    data_findings,
    gradient_findings,
    outcome_findings,
    sparkline,
    weight_findings,
)
from vlmtune.config import load_config
from vlmtune.failure import json_values, load_failure
from vlmtune.observe.log import read_history
from vlmtune.replay import as_record, described, find_failure, replay
from vlmtune.sealed import read_json, require_whole, stage_folders
from vlmtune.types import Finding, VlmtuneError

BETA = (
    0.999  # AdamW's default for the second moment: it matters only between tensors that began to train at other steps
)
AGAIN = "start the run again, which writes it anew"


def examine(path: Path, console: Console, failure: str | None = None, as_json: bool = False) -> int:
    """Look at a run folder, a chain, or a checkpoint folder, and print what was found.

    A failure that the run saved (None: the newest) is replayed first. Returns the exit code: 1 if anything fails.
    Raises VlmtuneError for a folder that is neither, a failure that does not exist, and damaged files.
    """
    if (path / "state.json").is_file():
        record: dict[str, Any] = {"checkpoint": str(path)}
        lines, found, code = [f"checkpoint: {path}"], {"checkpoint": checkpoint_findings(path)}, 0
    else:
        run = failed_stage(path)
        record, lines, code = _replayed(run, failure)
        record["finished"] = (run / "summary.json").is_file()
        if not record["finished"]:
            lines.append(f"{run}: not finished, it stands at step {_last_step(run):,}; the same command continues.")
        found = {name: _asked(ask, run) for name, ask in (("data", _data), ("config", _config), ("code", _code))}
    record["findings"] = [
        {"section": section, **asdict(finding)} for section, findings in found.items() for finding in findings
    ]
    if as_json:
        print(json.dumps(json_values(record), indent=1))
    else:
        for line in [*lines, *_lines(found)]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return max(code, *(int(finding.level == "fail") for findings in found.values() for finding in findings), 0)


def failed_stage(run: Path) -> Path:
    """The run folder itself; of a chain of stages the last with a saved failure, or else the last that has begun."""
    if not (run / "stages.json").is_file():
        return run
    stages = [stage for stage in stage_folders(run) if (stage / "config.yaml").is_file()]
    failed = [stage for stage in stages if (stage / "failures").is_dir()]
    return (failed or stages or [run])[-1]


def _replayed(run: Path, failure: str | None) -> tuple[dict[str, Any], list[str], int]:
    """(record, lines, exit code) of the newest failure, or of the one that is asked for."""
    folder = find_failure(run, failure)
    if folder is None:
        return {"run": str(run), "failure": None}, [f"{run}: no step of this run was saved as not finite."], 0
    found = replay(run, load_failure(folder))
    return as_record(run, found), described(run, found), int(found.reproduced)


def _lines(found: Mapping[str, list[Finding]]) -> list[str]:
    """First what is wrong, in the order of the questions, then what was looked at and is in order."""
    lines = []
    for section, findings in found.items():
        for finding in findings:
            if finding.level != "pass":
                remedy = f"; {finding.remedy}" if finding.remedy else ""
                lines.append(f"{section}: {finding.level}: {finding.what}: {finding.evidence}{remedy}")
    for section, findings in found.items():
        lines += [f"{section}: ruled out: {f.what}: {f.evidence}" for f in findings if f.level == "pass"]
    return lines


# ---- a run ---------------------------------------------------------------------------------------------------------


def _asked(ask: Callable[[Path], list[Finding]], run: Path) -> list[Finding]:
    """A file that is damaged is a finding too: the other questions are asked all the same."""
    try:
        return ask(run)
    except VlmtuneError as error:
        return [Finding("fail", "its files can be read", str(error).rstrip("."))]


def _data(run: Path) -> list[Finding]:
    composition = _read(run / "composition.json", [])
    dropped = run / "dropped.jsonl"
    sources = {row["source"] for row in composition}  # of data.train: rows of held-out data may be left out too
    lines = dropped.read_text(encoding="utf-8").splitlines() if dropped.is_file() else []
    count = sum(json.loads(line)["source"] in sources for line in lines)
    return data_findings(composition, count, read_history(run / "history.jsonl"))


def _config(run: Path) -> list[Finding]:
    history, steps = read_history(run / "history.jsonl"), _last_step(run)
    found = [*_readable(run), *course_findings(_read(run / "start.json", []), history, steps)]
    return [*found, *outcome_findings(_read(run / "summary.json", {}).get("metrics", {}))]


def _readable(run: Path) -> list[Finding]:
    """The config, and the lines of the history."""
    found = []
    what = "config.yaml can be read"
    try:
        load_config(str(run / "config.yaml"))
        found.append(Finding("pass", what, "every key is known to this version"))
    except VlmtuneError as error:
        found.append(Finding("fail", what, str(error).rstrip("."), "put back the file that the run wrote"))
    history = run / "history.jsonl"
    lines = history.read_text(encoding="utf-8", errors="replace").splitlines() if history.is_file() else []
    torn = len([line for line in lines if line.strip()]) - len(read_history(history))
    if torn:
        evidence = f"no, from line {len(lines) - torn + 1} on {torn} cannot be"
        found.append(Finding("warn", "history.jsonl can be read", evidence, "start the run again, which mends its end"))
    return found


def _code(run: Path) -> list[Finding]:
    environment = _read(run / "environment.json", {})
    found = [_versions({"vlmtune": environment.get("vlmtune"), **environment.get("packages", {})})]
    folder = run / "checkpoints"
    try:
        newest, complaints = newest_whole_checkpoint(folder)
    except VlmtuneError as error:
        return [*found, Finding("fail", "checkpoints are whole", str(error).rstrip("."))]
    if newest is None:
        return [*found, _no_checkpoint(run)]
    for complaint in complaints:
        found.append(Finding("warn", "checkpoints are whole", complaint, f"{newest.name} is used"))
    if not complaints:
        found.append(
            Finding("pass", "checkpoints are whole", f"{len(checkpoint_folders(folder))} in all, newest {newest.name}")
        )
    return [*found, *_weights(newest)]


def _last_step(run: Path) -> int:
    return max((record["step"] for record in read_history(run / "history.jsonl")), default=0)


def _no_checkpoint(run: Path) -> Finding:
    what = "checkpoints are whole"
    if (run / "summary.json").is_file():
        return Finding("fail", what, "there is none, but the run was finished", "bring back its folder checkpoints")
    steps = max((record["step"] for record in read_history(run / "history.jsonl")), default=0)
    return Finding(
        "warn", what, f"there is none at step {steps:,}", "wait for checkpoint.every, or see where they went"
    )


def _versions(then: Mapping[str, str | None]) -> Finding:
    """then: name of a package -> its version in the run."""
    what = "the versions are those of the run"
    now = {"vlmtune": __version__} | {name: metadata.version(name) for name in then if name != "vlmtune"}
    other = [f"{name} {then[name]} -> {now[name]}" for name in then if then[name] not in (None, now[name])]
    if other:
        return Finding("warn", what, ", ".join(other), "install those of the run to compare")
    return Finding("pass", what, f"{len(then)} packages")


def _read(path: Path, otherwise: Any) -> Any:
    return read_json(path, AGAIN) if path.is_file() else otherwise


# ---- a checkpoint --------------------------------------------------------------------------------------------------


def checkpoint_findings(folder: Path) -> list[Finding]:
    """Quick looks: whole, spread of the weights, gradients that stand out, the loss on the way (SPEC G8).

    Raises VlmtuneError for a damaged file.
    """
    state = read_state(folder)
    require_whole(folder, state["files"], OTHER)
    found = [Finding("pass", "every file is whole", f"{len(state['files'])} files"), _versions(state["versions"])]
    losses = [record["loss"] for record in read_history(folder / "history.jsonl") if record["kind"] == "train"]
    losses = [loss for loss in losses if loss is not None]
    if losses:
        evidence = f"from {losses[0]:.3g} to {losses[-1]:.3g}  {sparkline(losses)}"
        found.append(Finding("pass", "the loss until then", evidence))
    return [*found, *_weights(folder)]


def _weights(folder: Path) -> list[Finding]:
    steps = read_state(folder)["state"]["step"]
    files = [folder / "trained.safetensors", *sorted((folder / "adapter").rglob("*.safetensors"))]
    spreads = {
        name: Spread.of(tensor)
        for file in files
        if file.is_file()
        for name, tensor in load_file(file).items()
        if tensor.is_floating_point() and tensor.numel()
    }
    moments = load_file(folder / "optimizer.safetensors") if (folder / "optimizer.safetensors").is_file() else {}
    sizes = {}
    for key, value in moments.items():
        name, _, kind = key.rpartition("/")
        if kind == "exp_avg_sq" and value.numel():
            steps_of_it = float(moments.get(f"{name}/step", steps))
            sizes[name] = float((value.float().mean() / (1 - BETA ** max(1.0, steps_of_it))).sqrt())
    return [*weight_findings(spreads, steps), *gradient_findings(sizes)]
