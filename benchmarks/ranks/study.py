"""Ranks that follow Fisher traces against one rank for all, at equally many LoRA parameters, three seeds each (row F2).

    python benchmarks/ranks/study.py                      # 23 CPU-minutes, one run at a time
    python benchmarks/ranks/study.py --record             # also writes results.json and ranks.png beside this file
    python benchmarks/ranks/study.py --from results.json  # tables and plot of recorded results

The embedded model learns 24 concepts it has never seen, in five tasks with equal shares, in 140 steps of 8 generated
scenes. Arms differ in the ranks of the language model's LoRA and in nothing else; all but "uniform 32" have exactly
the parameters of rank 8 everywhere. "shuffled" has the ranks of "fisher", dealt at random to modules of equal cost: it
says whether it matters who gets them. Every run is one `vlmtune train` in a process of its own, on one thread,
and is scored on the same held-out scenes: the loss on 200 of each task, replies to 50 of each task.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import date
from pathlib import Path

import yaml
from scipy.stats import spearmanr

from vlmtune.evaluate.intervals import t_interval

HERE = Path(__file__).parent
DRAFT = HERE / ".runs.json"  # a study that was interrupted goes on where it was; gone once it is recorded
TASKS = ("caption", "vqa", "ocr", "grounding", "referring")
SEEDS = (0, 1, 2)
STEPS, BATCH, HELD_OUT, HELD_OUT_LOSS, SAMPLES = 140, 8, 50, 200, 64
BUDGET, LARGE = 8, 32
UNIFORM = f"uniform {BUDGET}"
ARMS = (UNIFORM, "fisher", f"uniform {LARGE}", "shuffled")
SHOWN = {  # heading -> metric; all but the losses in per cent
    "caption F1": "caption/f1",
    "vqa": "vqa/exact_match",
    "ocr ANLS": "ocr/anls",
    "grounding IoU": "grounding/mean_iou",
    "referring": "referring/accuracy",
}
COLUMNS = ("loss", "score", *SHOWN)


def plan(rank: int) -> list[dict]:
    return [
        {"match": "vision", "train": "frozen"},
        {"match": "projector", "train": "full", "lr": 4e-4},
        {"match": "language", "train": "lora", "rank": rank, "lr": 2e-3},
        {"match": "embed", "train": "frozen"},
    ]


def config_of(seed: int, run: Path, rules: list[dict], start: int = 0) -> dict:
    return {
        "model": "embedded",
        "run": str(run),
        "data": {"train": [{"scenes": "new", "task": task, "start": start} for task in TASKS], "workers": 0},
        "plan": rules,
        "optim": {"warmup": "10 steps", "floor": 0.05},
        "train": {
            "length": f"{STEPS} steps", "batch_size": BATCH, "micro_batch_size": BATCH,
            "threads": 1, "precision": "fp32", "seed": seed,
        },
        "checkpoint": {"every": f"{STEPS} steps"},
    }  # fmt: skip


def measured(seed: int, folder: Path, name: str, start: int = 0):
    """What `vlmtune ranks` finds, and the plan that it writes."""
    from rich.console import Console

    from vlmtune.config import Config
    from vlmtune.ranks import choose_ranks

    path = folder / f"{name}.yaml"
    with (folder / f"{name}.txt").open("w") as log:
        found = choose_ranks(
            Config.model_validate(config_of(seed, folder / "run", plan(BUDGET), start)), Console(file=log, width=120),
            path, BUDGET, SAMPLES,
        )  # fmt: skip
    return found, yaml.safe_load(path.read_text())["plan"]


def shuffled(found, seed: int) -> list[dict]:
    """One rule per module, the ranks dealt anew among modules of equal cost."""
    from vlmtune.adapt.fisher import linear_modules
    from vlmtune.build import resolve_model
    from vlmtune.models.load import load_model

    linear = linear_modules(load_model(resolve_model("embedded")))
    classes = defaultdict(list)
    for name in found.ranks:
        classes[linear[name].in_features + linear[name].out_features].append(name)
    dealt, dice = {}, random.Random(seed)
    for names in classes.values():
        ranks = [found.ranks[name] for name in names]
        dice.shuffle(ranks)
        dealt |= dict(zip(names, ranks, strict=True))
    rules = [{"match": n, "train": "lora", "rank": dealt[n], "lr": 2e-3} for n in found.ranks]
    return [*plan(BUDGET)[:2], *rules, {"match": "language", "train": "frozen"}, plan(BUDGET)[3]]


def one_run(arm: str, seed: int, folder: Path) -> dict:
    """Choose ranks, train, score the last checkpoint."""
    import torch
    from rich.console import Console

    from vlmtune.build import build_eval_groups
    from vlmtune.config import Config
    from vlmtune.evaluate.evaluation import evaluate
    from vlmtune.run import train
    from vlmtune.use import load_run

    torch.set_num_threads(1)
    began, record = time.process_time(), {}
    if arm.startswith("uniform"):
        rules = plan(int(arm.split()[1]))
    else:
        found, rules = measured(seed, folder, "ranks")
        record = {"ranks": found.ranks, "traces": found.traces, "measure_seconds": time.process_time() - began}
        if arm == "fisher":
            again, _ = measured(seed, folder, "other", start=5000)
            record["other_traces"], record["other_ranks"] = again.traces, again.ranks
        if arm == "shuffled":
            rules = shuffled(found, seed)
    tree = config_of(seed, folder / "run", rules)
    with (folder / "log.txt").open("w") as log:
        summary = train(Config.model_validate(tree), Console(file=log, width=120))
    loaded = load_run(folder / "run", "latest")
    trainable = sum(row["trainable"] for row in json.loads((folder / "run/assignment.json").read_text())
                    if row["part"] == "language")  # fmt: skip

    def scored(limit: int, tokens: int | None) -> dict[str, float]:
        held_out = [{"scenes": "new", "task": task, "split": "val", "limit": limit} for task in TASKS]
        groups = build_eval_groups(Config.model_validate(tree | {"data": tree["data"] | {"eval": {"new": held_out}}}))
        return evaluate(loaded.model, loaded.encoder, groups, limit=None, batch_size=50, max_new_tokens=tokens).metrics

    losses = scored(HELD_OUT_LOSS, None)
    metrics = scored(HELD_OUT, 40)
    return record | {
        "losses": losses, "metrics": metrics, "lora_parameters": trainable,
        "train_seconds": summary["train_seconds"], "cpu_seconds": time.process_time() - began,
    }  # fmt: skip


def started(arm: str, seed: int) -> dict:
    """`one_run` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", arm, str(seed), "--folder", folder]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return {"arm": arm, "seed": seed} | json.loads(Path(folder, "result.json").read_text())


def value(result: dict, column: str) -> float:
    """loss: mean of the five tasks' held-out losses; score: mean of the five metrics, in per cent."""
    if column == "loss":
        return statistics.mean(result["losses"][f"loss/new/{task}"] for task in TASKS)
    if column == "score":
        return statistics.mean(value(result, heading) for heading in SHOWN)
    return 100 * result["metrics"][f"new/{SHOWN[column]}"]


def values(results: list[dict], arm: str, column: str) -> list[float]:
    """One per seed."""
    return [value(r, column) for seed in SEEDS for r in results if r["arm"] == arm and r["seed"] == seed]


def interval(numbers: list[float]) -> float:
    """Half of the 95 % interval of the mean (Student's t)."""
    found = t_interval(numbers)
    return found.high - found.value


def differences(results: list[dict], arm: str, column: str) -> list[float]:
    """To the uniform rank of the same seed: same order of samples, same start of the projector."""
    return [a - b for a, b in zip(values(results, arm, column), values(results, UNIFORM, column), strict=True)]


def tables(results: list[dict]) -> str:
    head = [f"| arm | LoRA parameters | {' | '.join(COLUMNS)} |", f"| --- | ---: |{' ---: |' * len(COLUMNS)}"]
    plain, paired = list(head), [head[0].replace(" LoRA parameters |", ""), f"| --- |{' ---: |' * len(COLUMNS)}"]
    for arm in ARMS:
        sizes = {r["lora_parameters"] for r in results if r["arm"] == arm}
        digits = {column: 3 if column == "loss" else 1 for column in COLUMNS}
        cells = []
        for column in COLUMNS:
            of_seeds = values(results, arm, column)
            mean, sd = statistics.mean(of_seeds), statistics.stdev(of_seeds)
            cells.append(f"{mean:.{digits[column]}f} ± {sd:.{digits[column]}f}")
        plain.append(f"| {arm} | {', '.join(f'{size:,}' for size in sorted(sizes))} | {' | '.join(cells)} |")
        if arm != UNIFORM:
            cells = []
            for column in COLUMNS:
                found = differences(results, arm, column)
                cells.append(f"{statistics.mean(found):+.{digits[column]}f} ± {interval(found):.{digits[column]}f}")
            paired.append(f"| {arm} | {' | '.join(cells)} |")
    return (
        f"Mean ± standard deviation over {len(SEEDS)} seeds:\n\n" + "\n".join(plain)
        + f"\n\nDifference to {UNIFORM}, paired by seed, mean ± 95 % interval (Student's t, {len(SEEDS)} seeds):\n\n"
        + "\n".join(paired)
    )  # fmt: skip


def agreement(results: list[dict]) -> str:
    """Of traces, and of ranks, between two disjoint sets of samples."""
    lines = []
    for result in results:
        if "other_traces" in result:
            names = list(result["traces"])
            rho = spearmanr([result["traces"][n] for n in names], [result["other_traces"][n] for n in names]).statistic
            same = sum(result["ranks"][n] == result["other_ranks"][n] for n in names)
            lines.append(f"seed {result['seed']}: rank correlation {rho:.3f}, {same} of {len(names)} ranks the same")
    return "; ".join(lines)


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.8), gridspec_kw={"width_ratios": [1.3, 1, 1]})
    first = next(r for r in results if r["arm"] == "fisher")
    kinds = list(dict.fromkeys(name.split(".", 3)[3] for name in first["ranks"]))
    layers = sorted({int(name.split(".")[2]) for name in first["ranks"]})
    grid = [[first["ranks"][f"language.layers.{layer}.{kind}"] for layer in layers] for kind in kinds]
    left.imshow(grid, cmap="Blues", aspect="auto")
    for y, row in enumerate(grid):
        for x, rank in enumerate(row):
            left.text(x, y, rank, ha="center", va="center", fontsize=8, color="white" if rank > 16 else "black")
    left.set_yticks(range(len(kinds)), kinds, fontsize=8)
    left.set_xticks(range(len(layers)), layers, fontsize=8)
    left.set_xlabel("layer", fontsize=9)
    left.set_title(f"Fisher ranks at the parameters of rank {BUDGET} (seed {first['seed']})", fontsize=9)
    for axis, column, title in ((middle, "loss", "held-out loss"), (right, "score", "mean score (%)")):
        for row, arm in enumerate(ARMS):
            found = values(results, arm, column)
            axis.errorbar(
                statistics.mean(found), row, xerr=interval(found), fmt="o", color="C0", capsize=2, markersize=4
            )
            axis.plot(found, [row] * len(found), "|", color="C1")
        axis.axvline(statistics.mean(values(results, UNIFORM, column)), color="grey", linewidth=0.6)
        axis.set_yticks(range(len(ARMS)), ARMS, fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--from", dest="recorded", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        arm, seed = options.one
        (options.folder / "result.json").write_text(json.dumps(one_run(arm, int(seed), options.folder)))
        return
    if options.recorded:
        results = json.loads(options.recorded.read_text())["results"]
    else:
        results = json.loads(DRAFT.read_text()) if DRAFT.exists() else []
        for arm in ARMS:
            for seed in SEEDS:
                if any(r["arm"] == arm and r["seed"] == seed for r in results):
                    continue
                results.append(started(arm, seed))
                print(f"{arm} seed {seed}: {results[-1]['cpu_seconds']:.0f} CPU-s", flush=True)
                DRAFT.write_text(json.dumps(results))
    print(tables(results))
    print(agreement(results))
    if options.record:
        described = {
            "date": str(date.today()), "steps": STEPS, "batch": BATCH, "budget": BUDGET, "samples": SAMPLES,
            "held_out": HELD_OUT, "held_out_loss": HELD_OUT_LOSS, "results": results,
        }  # fmt: skip
        (HERE / "results.json").write_text(json.dumps(described, indent=1) + "\n")
        DRAFT.unlink(missing_ok=True)
    if options.record or options.recorded:
        plot(results, HERE / "ranks.png")


if __name__ == "__main__":
    main()
