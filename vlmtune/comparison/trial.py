"""One trial of `vlmtune compare`, in a process of its own, so that its peak of memory is its own:

    python -m vlmtune.comparison.trial CONFIG.yaml RESULT.json          train, or continue, then score what came out
    python -m vlmtune.comparison.trial CONFIG.yaml RESULT.json --base   score the model before any training

RESULT.json appears whole, and only where the work was done; `failed` in it says why there is nothing else. The name of
CONFIG.yaml is that of the method, -seed and the seed.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vlmtune.build import best_device, build_encoder, build_eval_groups, fit_data, load_base
from vlmtune.config import Config, Evaluate, dump_config, load_config
from vlmtune.data.encode import Encoder
from vlmtune.evaluate.choices import ChoiceRule
from vlmtune.evaluate.comparison import HeldOut, Scores, Step, Trial, telling
from vlmtune.evaluate.evaluation import evaluate
from vlmtune.evaluate.metrics import score_sample
from vlmtune.interrupt import Interrupted, StopRequest
from vlmtune.models.quantise import place
from vlmtune.observe.log import CountingBar, append_line, keep_until, read_history
from vlmtune.observer import Observer
from vlmtune.optim.precision import Precision
from vlmtune.paths import write_text
from vlmtune.run import train
from vlmtune.sealed import read_json
from vlmtune.types import VlmtuneError
from vlmtune.use import load_run

MACHINE = ("device", "processor", "cores", "threads", "precision")
AGAIN = "start the comparison again"


def run_trial(config: Config, arm: str, console: Console, stop: StopRequest) -> Trial:
    """Train (or continue) the run of a trial and score its last checkpoint on the held-out data.

    Evaluation is left to the end and to this function, so that training has a peak of memory without it.
    Raises VlmtuneError for whatever stops it, Interrupted where `stop` was asked to.
    """
    run = Path(config.run)
    times = StepTimes(run / "steps.jsonl")
    train_only = {"data": config.data.model_copy(update={"eval": {}}), "evaluate": Evaluate()}
    train(config.model_copy(update=train_only), console, False, [times], stop)
    write_text(run / "config.yaml", dump_config(config))  # with the held-out data, for `vlmtune eval`
    gc.collect()  # two models may not fit beside each other
    loaded = load_run(run, "latest")
    place(loaded.model, best_device())
    scores = score(loaded.model, loaded.encoder, config, loaded.precision, console)
    rows = read_json(run / "assignment.json", AGAIN)
    memory = read_json(run / "memory.json", AGAIN)
    environment = read_json(run / "environment.json", AGAIN)
    return Trial(
        arm, config.train.seed, None,
        sum(row["trainable"] for row in rows), sum(row["parameters"] for row in rows),
        memory["highest"], memory.get("items") or {}, times.read(), scores,
        {key: environment[key] for key in MACHINE},
    )  # fmt: skip


def score_base(config: Config, console: Console) -> Scores:
    """Of the model that all trials start from, in float32."""
    base = load_base(config, as_stored=False)
    encoder = build_encoder(base.processor, base.model, config.data)
    place(base.model, best_device())
    return score(base.model.eval(), encoder, config, "fp32", console)


def score(model: torch.nn.Module, encoder: Encoder, config: Config, precision: Precision, console: Console) -> Scores:
    """Metrics on data.eval, and the values of every sample that they are means of.

    Raises VlmtuneError for a metric that is not finite: there is nothing to compare then.
    """
    with CountingBar(console) as bar:
        groups = fit_data(config, encoder, [], build_eval_groups(config), bar).groups
    wish = config.evaluate
    found = evaluate(
        model, encoder, groups, limit=None, batch_size=wish.batch_size,
        max_new_tokens=wish.max_new_tokens if wish.generate else None, precision=precision,
        choices=ChoiceRule(wish.choices, wish.alpha), chosen=wish.metrics,
    )  # fmt: skip
    odd = [name for name, value in found.metrics.items() if value != value or abs(value) == float("inf")]
    if odd:
        raise VlmtuneError(f"{odd[0]} is {found.metrics[odd[0]]} on held-out data; lower the learning rate.")
    values: list[dict[str, float]] = [
        score_sample(s.sample.task, s.reply, s.sample, s.boxes, encoder.coordinates.without_places,
                     wish.metrics.get(s.sample.task))
        for s in found.scored
    ] or [{} for _ in found.losses]  # fmt: skip
    return Scores(
        found.metrics,
        telling(found.metrics, wish.metrics),
        [HeldOut(**asdict(row), values=own) for row, own in zip(found.losses, values, strict=True)],
    )


class StepTimes(Observer):
    """Appends a line for every step to a file: its number, seconds, samples, and the processor's seconds since the step
    before, all threads of this process together (null for the first step of a process)."""

    def __init__(self, path: Path):
        self.path = path
        self._last: float | None = None

    def on_step(self, state: Any, metrics: dict[str, Any]) -> None:
        if self._last is None:
            keep_until(self.path, state.step - 1)  # of a process that was killed, steps that came again
        if "skipped" not in metrics:
            cpu = None if self._last is None else time.process_time() - self._last
            record = {"step": state.step, "seconds": metrics["step_seconds"], "samples": metrics["samples"], "cpu": cpu}
            append_line(self.path, record)
        self._last = time.process_time()

    def on_rewind(self, state: Any) -> None:
        keep_until(self.path, state.step)

    def read(self) -> list[Step]:
        return [Step(**record) for record in read_history(self.path)]


def main(arguments: list[str]) -> int:
    """Exit code 0 where RESULT.json holds figures, 1 where it says why not, 128 + n for signal n."""
    file, result, *options = arguments
    console = Console(width=120)
    config = load_config(file)
    record: dict[str, Any] = {}
    try:
        if options == ["--base"]:
            record |= {"scores": score_base(config, console).as_record()}
        else:
            with StopRequest().listening() as stop:
                record |= {"trial": asdict(run_trial(config, Path(file).stem.rpartition("-seed")[0], console, stop))}
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return interrupted.exit_code
    except VlmtuneError as error:
        record |= {"failed": str(error), "why": "error"}
    except (MemoryError, torch.OutOfMemoryError) as error:
        said = " ".join(str(error).split())[:160]
        record |= {"failed": f"out of memory ({said}); lower train.micro_batch_size.", "why": "memory"}
    if "failed" in record:
        print(f"error: {record['failed']}", file=sys.stderr)
    write_text(Path(result), json.dumps(record, indent=1))
    return int("failed" in record)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
