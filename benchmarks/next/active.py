"""What active sampling is worth: steps to a fixed held-out loss against uniform sampling, with 0, 10 and 30 % label noise.

    python benchmarks/next/active.py                     # one run at a time, one thread; minutes are in active.md
    python benchmarks/next/active.py --record            # also writes active.json here
    python benchmarks/next/active.py --from active.json  # tables of recorded results

The embedded model, which knows 72 concepts, trains on a finite set: most rows are about concepts it knows, a fifth about
24 that it has never seen. Two tasks, three seeds. Noise: the replies of so many rows of every task are exchanged among
each other. Scores are mean losses of clean held-out scenes, of the new concepts and of the old ones. Arms differ in
`data.sampling` and in nothing else; "loss, no guard" chases suspects too (`ActiveOrder(guards=False)`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from random import Random

from vlmtune.evaluate.intervals import t_interval

HERE = Path(__file__).parent
DRAFT = HERE / ".active.json"  # a study that was interrupted goes on where it was; gone once it is recorded
TASKS = ("referring", "vqa")
SEEDS = (0, 1, 2)
NOISE = (0.0, 0.1, 0.3)
OLD, NEW = 96, 24  # rows of each task
STEPS, BATCH, EVERY, EVALUATED = 96, 8, 8, 8
NAMES = 6
LRX = float(os.environ.get('LRX', '1'))
HELD_OUT = 16  # scenes of each task and group
ARMS: dict[str, dict] = {
    "uniform": {},
    "loss": {"by": "active", "every": EVERY},
    "loss, no guard": {"by": "active", "every": EVERY},
    "forgetting": {"by": "active", "every": EVERY, "measure": "forgetting"},
}
PLAN = [
    {"match": "vision", "train": "frozen"},
    {"match": "projector", "train": "full", "lr": 4e-4 * LRX},
    {"match": "language", "train": "lora", "rank": 16, "lr": 2e-3 * LRX},
    {"match": "embed", "train": "frozen"},
]


class Chosen:
    """Scenes of a recipe whose reply is one of few names, or any other word; numbered from 0."""

    def __init__(self, recipe, names):
        self.recipe, self.names, self.found = recipe, names, {}

    def sample(self, task, index, split, turns):
        found = self.found.setdefault((task, split), [])
        after = found[-1] + 1 if found else 0
        while len(found) <= index:
            if self.recipe.question(task, after, split).answer in self.names:
                found.append(after)
            after += 1
        return self.recipe.sample(task, found[index], split, turns)


def reply(row: dict) -> dict:
    return row["messages"][-1]


def with_noise(rows: list[dict], share: float, random: Random) -> set[str]:
    """Exchange the replies of a share of the rows of every task, in place; returns the ids of those that changed."""
    changed: set[str] = set()
    for task in TASKS:
        mine = [row for row in rows if row["task"] == task]
        chosen = random.sample(mine, round(share * len(mine)))
        said = [reply(row)["content"] for row in chosen]
        for row, other in zip(chosen, said[1:] + said[:1], strict=True):
            if other != reply(row)["content"]:
                reply(row)["content"] = other
                changed.add(row["id"])
    return changed


def write_data(folder: Path, noise: float, seed: int) -> tuple[list[Path], set[str]]:
    """Files of old and new concepts, and the ids of the rows whose replies are wrong. Other seeds have other rows."""
    from vlmtune.data.export_scenes import write_split
    from vlmtune.data.scenes import SceneRecipe

    paths, wrong = [], set()
    from vlmtune.data.scenes import concept_names
    write_split(Chosen(SceneRecipe("new"), concept_names("new")[:NAMES]), TASKS, "val", HELD_OUT, folder / "new-val")
    for concepts, count in (("base", OLD), ("new", NEW)):
        recipe = SceneRecipe(concepts)
        recipe = Chosen(recipe, concept_names("new")[:NAMES]) if concepts == "new" else recipe
        path = write_split(recipe, TASKS, "train", count, folder / concepts, start=count * seed)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        wrong |= with_noise(rows, noise, Random(seed))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(path)
    return paths, wrong


def config_of(arm: str, seed: int, paths: list[Path], run: Path) -> dict:
    held_out = {
        "old": [{"scenes": "base", "task": task, "split": "val", "limit": HELD_OUT} for task in TASKS],
        "new": [{"path": str(paths[0].parent.parent / "new-val" / "val.jsonl")}],
    }
    return {
        "model": "embedded",
        "run": str(run),
        # by weights each file is walked in permutations of its own: the same as uniform over rows with these weights
        "data": {
            "train": [
                {"path": str(path)} | ({} if ARMS[arm] else {"weight": count})
                for path, count in zip(paths, (OLD, NEW), strict=True)
            ],
            "eval": held_out, "workers": 0, "vision_cache": "1GB", "sampling": ARMS[arm],
        },
        "plan": PLAN,
        "optim": {"warmup": "10 steps", "floor": 0.1},
        "train": {
            "length": f"{STEPS} steps", "batch_size": BATCH, "micro_batch_size": BATCH, "threads": 1,
            "precision": "fp32", "seed": seed, "log_every": EVERY,
        },
        "checkpoint": {"every": f"{STEPS} steps", "keep": 1},
        "evaluate": {"generate": False, "every": f"{EVALUATED} steps", "batch_size": 48, "gallery": 0},
    }  # fmt: skip


def one_run(arm: str, noise: float, seed: int, watched: list | None = None) -> dict:
    """Train, and read off the held-out losses, what was drawn, and the suspects. watched: gets what the order observed."""
    from rich.console import Console

    import vlmtune.build
    from vlmtune.config import Config
    from vlmtune.data.active import ActiveOrder
    from vlmtune.observe.log import read_history
    from vlmtune.run import train

    class Order(ActiveOrder):
        def __init__(self, *arguments):
            super().__init__(*arguments, guards=arm != "loss, no guard")

        def observe(self, losses, samples):
            super().observe(losses, samples)
            if watched is not None:
                watched.append([(self[k], loss, largest) for k, loss, largest in samples])

    vlmtune.build.ActiveOrder = Order
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        paths, wrong = write_data(Path(folder, "data"), noise, seed)
        run = Path(folder, "run")
        with Path(folder, "log.txt").open("w") as log:
            train(Config.model_validate(config_of(arm, seed, paths, run)), Console(file=log, width=120))
        before = json.loads((run / "before.json").read_text())["metrics"]
        history = read_history(run / "history.jsonl")
        evaluations = [(0, before)] + [
            (r["step"], {f"loss/{name}": value for name, value in r["loss"].items()})
            for r in history if r["kind"] == "eval"
        ]  # fmt: skip
        curves = {
            group: [(step, statistics.mean(found[f"loss/{group}/{task}"] for task in TASKS))
                    for step, found in evaluations]
            for group in ("new", "old")
        }  # fmt: skip
        found = set()
        if ARMS[arm]:
            found = {json.loads(line)["id"] for line in (run / "suspects.jsonl").read_text().splitlines()}
        told = [r for r in history if r["kind"] == "train"]
        return {
            "arm": arm, "noise": noise, "seed": seed, "curves": curves, "wrong": len(wrong), "suspects": len(found),
            "right": len(found & wrong), "sources": told[-1]["sources"],
            "hardest": [r["sampling"].get("hardest") for r in told], "cpu_seconds": time.process_time() - began,
            "wrong_ids": sorted(wrong) if watched is not None else None,
        }  # fmt: skip


if __name__ == "__main__":
    import torch, sys

    torch.set_num_threads(1)
    watched = []
    r = one_run(sys.argv[1], float(sys.argv[2]), 0, watched)
    print(json.dumps(r, indent=None))
    Path(sys.argv[3]).write_text(json.dumps({"r": r, "watched": watched}))
