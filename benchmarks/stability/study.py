"""What clipping, warmup and rewinding are worth at learning rates that are too high; what staged unfreezing is worth.

    python benchmarks/stability/study.py                      # about 30 CPU-minutes, one run at a time, one thread
    python benchmarks/stability/study.py --record             # also writes results.json and stability.png here
    python benchmarks/stability/study.py --from results.json  # tables and plot of recorded results
    python benchmarks/stability/study.py --part sweep         # only this part (sweep or unfreezing)

Both parts train the embedded model on 24 concepts it has never seen, in five tasks with equal shares, with three seeds,
and score held-out scenes of the new and the old concepts. Sweep: the projector and the language model train in full at
multiples of the usual learning rate; arms differ in clipping, warmup and rewinding. Unfreezing: the vision tower is
frozen, trains from the start, or is unfrozen as in SPEC F1 (its last four blocks from the middle on, all of it from
80 % on, at a tenth of the learning rate); everything else is the same.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

from vlmtune.evaluate.intervals import t_interval

HERE = Path(__file__).parent
DRAFT = HERE / ".runs.json"  # a study that was interrupted goes on where it was; gone once it is recorded
TASKS = ("caption", "vqa", "ocr", "grounding", "referring")
SEEDS = (0, 1, 2)
BATCH, HELD_OUT = 8, 12
SWEEP_STEPS, UNFREEZING_STEPS = 40, 120
MULTIPLES = (1, 10, 100)
LR = 1e-3
REWIND = {"nonfinite": "rewind", "spikes": "rewind", "limit": 20}
SWEEP = {  # arm -> (clip, warmup in steps, stability)
    "clip, warmup": (1.0, 8, {}),
    "warmup": (None, 8, {}),
    "clip": (1.0, 0, {}),
    "neither": (None, 0, {}),
    "neither, rewind": (None, 0, REWIND),
    "clip, warmup, rewind": (1.0, 8, REWIND),
}
UNFREEZING = ("frozen", "staged", "full")
VISION_LR = 1e-4


def full_plan(lr: float) -> list[dict]:
    return [
        {"match": "vision", "train": "frozen"},
        {"match": "projector", "train": "full", "lr": lr / 2},
        {"match": "language", "train": "full", "lr": lr},
        {"match": "embed", "train": "frozen"},
    ]


def unfreezing_plan(arm: str) -> list[dict]:
    """batchnorm: frozen everywhere, so that the arms differ in weights alone."""
    common = {"train": "full", "batchnorm": "frozen", "warmup": "4 steps"}
    vision = {
        "frozen": [{"match": "vision", "train": "frozen"}],
        "full": [{"match": "vision", "lr": VISION_LR, **common}],
        "staged": [
            {"match": "vision.layers[12:16]", "lr": [[0, 0], [0.5, VISION_LR], [0.8, VISION_LR / 10]], **common},
            {"match": "vision", "lr": [[0, 0], [0.8, VISION_LR / 10]], **common},
        ],
    }[arm]
    return [
        *vision,
        {"match": "projector", "train": "full", "lr": 4e-4},
        {"match": "language", "train": "lora", "rank": 16, "lr": 2e-3},
        {"match": "embed", "train": "frozen"},
    ]


def config_of(seed: int, run: Path, steps: int, plan: list[dict], **sections: dict) -> dict:
    held_out = {
        group: [{"scenes": scenes, "task": task, "split": "val", "limit": HELD_OUT} for task in TASKS]
        for group, scenes in (("new", "new"), ("old", "base"))
    }
    return {
        "model": "embedded",
        "run": str(run),
        "data": {"train": [{"scenes": "new", "task": task} for task in TASKS], "eval": held_out, "workers": 0},
        "plan": plan,
        "train": {
            "length": f"{steps} steps", "batch_size": BATCH, "micro_batch_size": BATCH, "threads": 1,
            "precision": "fp32", "seed": seed, "log_every": 1,
        },
        "checkpoint": {"every": "5 steps", "keep": 1},
        "evaluate": {"generate": False, "batch_size": 50, "gallery": 0},
        **sections,
    }  # fmt: skip


def one_run(part: str, arm: str, multiple: int, seed: int) -> dict:
    """Train, and read off the losses on held-out scenes, what was found on the way, and how it ended."""
    from rich.console import Console

    from vlmtune.config import Config
    from vlmtune.errors import VlmtuneError
    from vlmtune.observe.log import read_history
    from vlmtune.run import train

    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        if part == "sweep":
            clip, warmup, stability = SWEEP[arm]
            sections = {"optim": {"clip": clip, "warmup": warmup, "floor": 0.1}, "stability": stability}
            tree = config_of(seed, run, SWEEP_STEPS, full_plan(LR * multiple), **sections)
        else:
            sections = {"optim": {"warmup": "10 steps", "floor": 0.1}}
            tree = config_of(seed, run, UNFREEZING_STEPS, unfreezing_plan(arm), **sections)
        ended, summary = "finished", {}
        with Path(folder, "log.txt").open("w") as log:
            try:
                summary = train(Config.model_validate(tree), Console(file=log, width=120))
            except VlmtuneError as error:
                ended = str(error)
        history = read_history(run / "history.jsonl")
        metrics = summary.get("metrics", {})
        return {
            "part": part, "arm": arm, "multiple": multiple, "seed": seed, "ended": ended,
            "losses": {f"{place}/{moment}": values["loss"][moment] for place, values in metrics.items()
                       for moment in ("before", "after")},
            "curve": [record["loss"] for record in history if record["kind"] == "train"],
            "rewinds": summary.get("rewinds", []),
            "findings": [record["what"] for record in history if record["kind"] == "finding"],
            "cpu_seconds": time.process_time() - began,
        }  # fmt: skip


def loss(result: dict, group: str, moment: str = "after") -> float:
    """Mean of the five tasks' held-out losses; infinite for a run that stopped, or whose loss is no number."""
    values = [result["losses"].get(f"{group}/{task}/{moment}", math.inf) for task in TASKS]
    mean = statistics.mean(values)
    return mean if math.isfinite(mean) else math.inf


def picked(results: list[dict], **wanted) -> list[dict]:
    return [r for r in results if all(r[key] == value for key, value in wanted.items())]


def interval(numbers: list[float]) -> float:
    """Half of the 95 % interval of the mean (Student's t)."""
    found = t_interval(numbers)
    return found.high - found.value


def spread(numbers: list[float]) -> str:
    """Mean and 95 % interval; how many ended, where not all did."""
    finite = [number for number in numbers if math.isfinite(number)]
    if len(finite) == len(numbers):
        return f"{statistics.mean(numbers):.3f} ± {interval(numbers):.3f}"
    shown = ", ".join(f"{number:.3f}" for number in finite)
    return f"{len(numbers) - len(finite)} of {len(numbers)} not finite" + (f" ({shown})" if shown else "")


def sweep_table(results: list[dict]) -> str:
    runs = picked(results, part="sweep")
    before = statistics.mean(loss(r, "new", "before") for r in runs if r["losses"])
    lines = [
        f"Held-out loss of the new concepts after {SWEEP_STEPS} steps, mean ± 95 % interval over {len(SEEDS)} seeds "
        f"(before training: {before:.3f}); in brackets, rewinds of the three runs:",
        "",
        f"| arm | {' | '.join(f'{m} x lr' for m in MULTIPLES)} |",
        f"| --- |{' ---: |' * len(MULTIPLES)}",
    ]
    for arm in SWEEP:
        cells = []
        for multiple in MULTIPLES:
            of_seeds = picked(runs, arm=arm, multiple=multiple)
            rewinds = "/".join(str(len(r["rewinds"])) for r in of_seeds)
            cells.append(spread([loss(r, "new") for r in of_seeds]) + (f" [{rewinds}]" if "rewind" in arm else ""))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def unfreezing_table(results: list[dict]) -> str:
    runs = picked(results, part="unfreezing")
    lines = [
        f"Held-out losses after {UNFREEZING_STEPS} steps, mean ± 95 % interval over {len(SEEDS)} seeds, and the "
        "difference to the frozen tower, paired by seed:",
        "",
        "| vision tower | new concepts | difference | old concepts | difference | CPU-seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    frozen = {r["seed"]: r for r in picked(runs, arm="frozen")}
    for arm in UNFREEZING:
        of_seeds = picked(runs, arm=arm)
        cells = []
        for group in ("new", "old"):
            cells.append(spread([loss(r, group) for r in of_seeds]))
            gaps = [loss(r, group) - loss(frozen[r["seed"]], group) for r in of_seeds]
            cells.append("" if arm == "frozen" else f"{statistics.mean(gaps):+.3f} ± {interval(gaps):.3f}")
        seconds = statistics.mean(r["cpu_seconds"] for r in of_seeds)
        lines.append(f"| {arm} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(MULTIPLES) + 1, figsize=(15, 3.4))
    for axis, multiple in zip(axes, MULTIPLES, strict=False):
        for number, arm in enumerate(SWEEP):
            for run in picked(results, part="sweep", arm=arm, multiple=multiple):
                axis.plot(run["curve"], color=f"C{number}", linewidth=0.9, label=arm if run["seed"] == 0 else None)
        axis.set_title(f"{multiple} x lr: training loss", fontsize=9)
        axis.set_yscale("log")
        axis.tick_params(labelsize=8)
    axes[0].legend(fontsize=7)
    for number, arm in enumerate(UNFREEZING):
        for run in picked(results, part="unfreezing", arm=arm):
            curve = [statistics.mean(run["curve"][max(0, n - 9) : n + 1]) for n in range(len(run["curve"]))]
            axes[-1].plot(curve, color=f"C{number}", linewidth=0.9, label=arm if run["seed"] == 0 else None)
    axes[-1].legend(fontsize=7)
    axes[-1].set_title("unfreezing: training loss, mean of 10 steps", fontsize=9)
    axes[-1].tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def wanted(part: str | None) -> list[tuple[str, str, int, int]]:
    sweep = [("sweep", arm, multiple, seed) for multiple in MULTIPLES for arm in SWEEP for seed in SEEDS]
    unfreezing = [("unfreezing", arm, 1, seed) for arm in UNFREEZING for seed in SEEDS]
    return [run for run in [*sweep, *unfreezing] if part is None or run[0] == part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--part", choices=("sweep", "unfreezing"))
    parser.add_argument("--from", dest="recorded", type=Path)
    options = parser.parse_args()
    if options.recorded:
        results = json.loads(options.recorded.read_text())["results"]
    else:
        import torch

        torch.set_num_threads(1)
        results = json.loads(DRAFT.read_text()) if DRAFT.exists() else []
        for part, arm, multiple, seed in wanted(options.part):
            if picked(results, part=part, arm=arm, multiple=multiple, seed=seed):
                continue
            results.append(one_run(part, arm, multiple, seed))
            last = results[-1]
            print(f"{part} {arm} {multiple}x seed {seed}: {loss(last, 'new'):.3f}, {len(last['rewinds'])} rewinds, "
                  f"{last['cpu_seconds']:.0f} CPU-s", flush=True)  # fmt: skip
            DRAFT.write_text(json.dumps(results))
    for part, table in (("sweep", sweep_table), ("unfreezing", unfreezing_table)):
        if picked(results, part=part):
            print(f"\n{table(results)}")
    if options.record:
        described = {
            "date": str(date.today()), "batch": BATCH, "held_out": HELD_OUT, "sweep_steps": SWEEP_STEPS,
            "unfreezing_steps": UNFREEZING_STEPS, "lr": LR, "vision_lr": VISION_LR, "results": results,
        }  # fmt: skip
        (HERE / "results.json").write_text(json.dumps(described) + "\n")
        DRAFT.unlink(missing_ok=True)
    if options.record or options.recorded:
        plot(results, HERE / "stability.png")


if __name__ == "__main__":
    main()
