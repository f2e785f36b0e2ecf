"""What the losses do to held-out scores: every method of the loss section on the five embedded tasks, three seeds each.

    python benchmarks/losses/study.py                    # 54 CPU-minutes; two runs side by side
    python benchmarks/losses/study.py --record           # also writes study.json and study.png beside this file
    python benchmarks/losses/study.py --from study.json  # table and plot of recorded results

The embedded model learns 24 concepts it has never seen, in five tasks with equal shares, in 140 steps of 8 generated
scenes. An arm differs from `tokens`, the default, in the entries shown below and in nothing else. Every run is one
`vlmtune train` in a process of its own, on one thread, and is scored on the same held-out scenes: 50 of each task, and
50 questions each for absent names of the same kind ("hard") and any absent names ("random").
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
TASKS = ("caption", "vqa", "ocr", "grounding", "referring")
SEEDS = (0, 1, 2)
STEPS, BATCH, HELD_OUT = 140, 8, 50
BASELINE = "tokens"
ARMS: dict[str, dict] = {
    "tokens": {},
    "equal": {"loss": {"balance": {"by": "fixed", "weights": dict.fromkeys(TASKS, 0.2)}}},
    "inverse": {"loss": {"balance": {"by": "inverse"}}},
    "uncertainty": {"loss": {"balance": {"by": "uncertainty"}}},
    "gradnorm": {"loss": {"balance": {"by": "gradnorm"}}},
    "temperature": {"sampling": {"by": "temperature", "temperature": 1.0, "every": 10}},
    "box weight 2": {"loss": {"weights": {"box": 2.0}}},
    "box loss": {"loss": {"box": {}}},
    "box head, masks": {"loss": {"box": {"read": "head"}, "referring": {}}, "heads": True},
    "negatives": {"negatives": {"grounding": {}, "referring": {}}},  # three for a box, one for a region
    "negatives 1:1": {"negatives": {"grounding": {"ratio": 1}, "referring": {}}},
    "exposure": {"loss": {"exposure": {"rate": 0.25}}},
}
SHOWN = {  # heading -> metric; of the last two, what is said where nothing is
    "caption F1": "new/caption/f1",
    "vqa": "new/vqa/exact_match",
    "ocr ANLS": "new/ocr/anls",
    "grounding IoU": "new/grounding/mean_iou",
    "referring": "new/referring/accuracy",
    "head IoU": "new/referring/head_iou",
    "mask IoU": "new/referring/mask_iou",
    "false boxes, hard": "new/grounding_hard/exact_match",
    "false boxes, random": "new/grounding_random/exact_match",
}
PLAN = [
    {"match": "vision", "train": "frozen"},
    {"match": "projector", "train": "full", "lr": 4e-4},
    {"match": "language", "train": "lora", "rank": 32, "lr": 2e-3},
    {"match": "embed", "train": "frozen"},
]


def config_of(arm: str, seed: int, run: Path) -> dict:
    wish = ARMS[arm]
    negatives = {task: {"negatives": given} for task, given in wish.get("negatives", {}).items()}
    return {
        "model": "embedded",
        "run": str(run),
        "data": {
            "train": [{"scenes": "new", "task": task} | negatives.get(task, {}) for task in TASKS],
            "sampling": wish.get("sampling", {}),
            "workers": 0,
        },
        "plan": [*([{"match": "heads", "train": "full", "lr": 1e-3}] if wish.get("heads") else []), *PLAN],
        "loss": wish.get("loss", {}),
        "optim": {"warmup": "10 steps", "floor": 0.05},
        "train": {
            "length": STEPS, "batch_size": BATCH, "micro_batch_size": BATCH,
            "threads": 1, "precision": "fp32", "seed": seed,
        },
        "checkpoint": {"every": STEPS},
    }  # fmt: skip


def one_run(arm: str, seed: int, folder: Path) -> dict:
    """Train, then score the last checkpoint. Returns {"metrics", "seconds", "sources"}."""
    import torch
    from rich.console import Console

    from vlmtune.build import build_eval_groups
    from vlmtune.config import Config
    from vlmtune.evaluate.evaluation import evaluate
    from vlmtune.run import train
    from vlmtune.use import load_run

    torch.set_num_threads(1)
    began = time.process_time()
    tree = config_of(arm, seed, folder / "run")
    with (folder / "log.txt").open("w") as log:
        summary = train(Config.model_validate(tree), Console(file=log, width=120))
    held_out = [
        {"scenes": "new", "task": task, "split": "val", "limit": HELD_OUT}
        | ({"negatives": {}} if task == "grounding" else {})
        for task in TASKS
    ]
    loaded = load_run(folder / "run", "latest")
    groups = build_eval_groups(Config.model_validate(tree | {"data": tree["data"] | {"eval": {"new": held_out}}}))
    scored = evaluate(loaded.model, loaded.encoder, groups, limit=None, batch_size=50, max_new_tokens=40)
    return {
        "metrics": scored.metrics, "sources": summary["sources"], "train_seconds": summary["train_seconds"],
        "cpu_seconds": time.process_time() - began,
    }  # fmt: skip


def started(arm: str, seed: int) -> dict:
    """`one_run` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        command = [sys.executable, __file__, "--one", arm, str(seed), "--folder", folder]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return {"arm": arm, "seed": seed} | json.loads(out.read_text())


def values_of(results: list[dict], arm: str, heading: str) -> list[float]:
    """One number per seed, in per cent; a rate of false boxes is what is missing to 100."""
    metric = SHOWN[heading]
    found = [r["metrics"][metric] for r in results if r["arm"] == arm and metric in r["metrics"]]
    return [100 * (1 - value if heading.startswith("false") else value) for value in found]


def table(results: list[dict]) -> str:
    """Mean ± standard deviation over seeds."""
    lines = [f"| arm | {' | '.join(SHOWN)} |", f"| --- |{' ---: |' * len(SHOWN)}"]
    for arm in ARMS:
        cells = []
        for heading in SHOWN:
            values = values_of(results, arm, heading)
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if values else "")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    headings = [heading for heading in SHOWN if not heading.endswith(("head IoU", "mask IoU"))]
    figure, axes = pyplot.subplots(1, len(headings), figsize=(2.1 * len(headings), 3.6), sharey=True)
    for axis, heading in zip(axes, headings, strict=True):
        for row, arm in enumerate(ARMS):
            values = values_of(results, arm, heading)
            mean, sd = statistics.mean(values), statistics.stdev(values)
            axis.errorbar(mean, row, xerr=sd, fmt="o", color="C0", capsize=2, markersize=4)
            axis.plot(values, [row] * len(values), "|", color="C1")
        axis.axvline(statistics.mean(values_of(results, BASELINE, heading)), color="grey", linewidth=0.6)
        axis.set_title(heading + " (%)", fontsize=9)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(ARMS)), list(ARMS))
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--from", dest="recorded", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
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
        with ThreadPoolExecutor(options.jobs) as pool:
            waiting = [pool.submit(started, arm, seed) for seed in SEEDS for arm in options.arms]
            results = []
            for number, future in enumerate(waiting, 1):
                results.append(future.result())
                last = results[-1]
                print(
                    f"{number}/{len(waiting)} {last['arm']} seed {last['seed']}: {last['cpu_seconds']:.0f} CPU-s",
                    flush=True,
                )
    if {result["arm"] for result in results} != set(ARMS):
        print(json.dumps(results, indent=1))
        return
    print(table(results))
    if options.record:
        described = {"steps": STEPS, "batch": BATCH, "held_out": HELD_OUT, "arms": ARMS, "results": results}
        (HERE / "study.json").write_text(json.dumps(described, indent=1) + "\n")
        plot(results, HERE / "study.png")


if __name__ == "__main__":
    main()
