"""What active sampling is worth against uniform sampling, with 0, 10 and 30 % of wrong labels.

    python benchmarks/next/active.py                     # one run at a time, one thread; minutes are in active.md
    python benchmarks/next/active.py --record            # also writes active.json here
    python benchmarks/next/active.py --from active.json  # tables of recorded results

The embedded model, which knows 72 concepts, trains on a finite set of two tasks: four rows of five are about concepts
it knows, one is about six that it has never seen. Noise: the replies of so many rows of every task are exchanged among
each other. Scores are losses of clean held-out scenes, the mean of the tasks, of the new concepts and of the old ones.
Arms differ in `data.sampling` and in nothing else; "loss, no guard" chases suspects too (`ActiveOrder(guards=False)`).
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from random import Random

from study import results_of

from vlmtune.evaluate.intervals import t_interval

HERE = Path(__file__).parent
DRAFT = HERE / ".active.json"  # a study that was interrupted goes on where it was; gone once it is recorded
TASKS = ("referring", "vqa")
SEEDS = (0, 1, 2)
NOISE = (0.0, 0.1, 0.3)
OLD, NEW, NAMES = 96, 24, 6  # rows of each task; names that are new
STEPS, BATCH, EVERY = 96, 8, 8  # EVERY: steps of a stretch, and between two evaluations
HELD_OUT = 16  # scenes of each task and group
ARMS: dict[str, dict] = {
    "uniform": {},
    "loss": {"by": "active", "every": EVERY},
    "loss, no guard": {"by": "active", "every": EVERY},
    "forgetting": {"by": "active", "every": EVERY, "measure": "forgetting"},
}
LEFT_OUT = (("loss, no guard", 0.0), ("forgetting", 0.1))  # for the time they take
PLAN = [
    {"match": "vision", "train": "frozen"},
    {"match": "projector", "train": "full", "lr": 1e-4},
    {"match": "language", "train": "lora", "rank": 16, "lr": 5e-4},
    {"match": "embed", "train": "frozen"},
]


class Chosen:
    """Of the scenes of a recipe those whose reply is one of `names`, numbered from 0."""

    def __init__(self, recipe, names: Sequence[str]):
        self.recipe, self.names = recipe, names
        self.found: dict[tuple[str, str], list[int]] = {}

    def sample(self, task: str, index: int, split: str, turns: int):
        found = self.found.setdefault((task, split), [])
        after = found[-1] + 1 if found else 0
        while len(found) <= index:
            if self.recipe.question(task, after, split).answer in self.names:
                found.append(after)
            after += 1
        return self.recipe.sample(task, found[index], split, turns)


def with_noise(rows: list[dict], share: float, random: Random) -> set[str]:
    """Exchange the replies of a share of the rows of every task, in place; returns the ids of those that changed."""
    changed: set[str] = set()
    for task in TASKS:
        mine = [row for row in rows if row["task"] == task]
        replies = [row["messages"][-1] for row in random.sample(mine, round(share * len(mine)))]
        said = [reply["content"] for reply in replies]
        for reply, other in zip(replies, said[1:] + said[:1], strict=True):
            reply["wrong"] = other != reply["content"]
            reply["content"] = other
        changed |= {row["id"] for row in mine if row["messages"][-1].pop("wrong", False)}
    return changed


def write_data(folder: Path, noise: float, seed: int) -> tuple[dict[str, Path], set[str]]:
    """JSONL files of training rows and held-out ones, and the ids of rows whose replies are wrong."""
    from vlmtune.data.export_scenes import write_split
    from vlmtune.data.scenes import SceneRecipe, concept_names

    recipes = {"old": SceneRecipe("base"), "new": Chosen(SceneRecipe("new"), concept_names("new")[:NAMES])}
    paths, wrong = {}, set()
    for group, recipe in recipes.items():
        count = OLD if group == "old" else NEW
        paths[f"{group}, held out"] = write_split(recipe, TASKS, "val", HELD_OUT, folder / f"{group}-val")
        path = write_split(recipe, TASKS, "train", count, folder / f"{group}-train", start=count * seed)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        wrong |= with_noise(rows, noise, Random(seed))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths[group] = path
    return paths, wrong


def config_of(arm: str, seed: int, paths: dict[str, Path], run: Path) -> dict:
    weights = {"old": OLD, "new": NEW}  # by them, sources are walked as if all rows were in one
    return {
        "model": "embedded",
        "run": str(run),
        "data": {
            "train": [
                {"path": str(paths[group])} | ({} if ARMS[arm] else {"weight": weight})
                for group, weight in weights.items()
            ],
            "eval": {group: [{"path": str(paths[f"{group}, held out"])}] for group in weights},
            "sampling": ARMS[arm], "workers": 0, "vision_cache": "1GB",
        },
        "plan": PLAN,
        "optim": {"warmup": "8 steps", "floor": 0.1},
        "train": {
            "length": f"{STEPS} steps", "batch_size": BATCH, "micro_batch_size": BATCH, "threads": 1,
            "precision": "fp32", "seed": seed, "log_every": EVERY,
        },
        "checkpoint": {"every": f"{STEPS} steps", "keep": 1},
        "evaluate": {"generate": False, "every": f"{EVERY} steps", "batch_size": 32, "gallery": 0},
    }  # fmt: skip


def one_run(arm: str, noise: float, seed: int) -> dict:
    """Train, and read off the losses on held-out scenes, what was drawn, and who was suspected."""
    from rich.console import Console

    import vlmtune.build
    from vlmtune.config import Config
    from vlmtune.data.active import ActiveOrder
    from vlmtune.observe.log import read_history
    from vlmtune.run import train

    class Order(ActiveOrder):
        def __init__(self, *arguments):
            super().__init__(*arguments, guards=arm != "loss, no guard")

    vlmtune.build.ActiveOrder = Order
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        paths, wrong = write_data(Path(folder, "data"), noise, seed)
        run = Path(folder, "run")
        with Path(folder, "log.txt").open("w") as log:
            train(Config.model_validate(config_of(arm, seed, paths, run)), Console(file=log, width=120))
        history = read_history(run / "history.jsonl")
        before = json.loads((run / "before.json").read_text())["metrics"]
        found: set[str] = set()
        if ARMS[arm]:
            found = {json.loads(line)["id"] for line in (run / "suspects.jsonl").read_text().splitlines()}
    evaluations = [(0, {name.removeprefix("loss/"): value for name, value in before.items()})]
    evaluations += [(record["step"], record["loss"]) for record in history if record["kind"] == "eval"]
    trained = [record for record in history if record["kind"] == "train"]
    drawn = list(trained[-1]["sources"].values())
    return {
        "arm": arm, "noise": noise, "seed": seed,
        "curves": {group: [(step, statistics.mean(losses[f"{group}/{task}"] for task in TASKS))
                           for step, losses in evaluations] for group in ("new", "old")},
        "wrong": len(wrong), "suspects": len(found), "right": len(found & wrong),
        "new_share": drawn[1] / sum(drawn), "hardest": trained[-1]["sampling"].get("hardest"),
        "cpu_seconds": time.process_time() - began,
    }  # fmt: skip


def picked(results: list[dict], **wanted) -> list[dict]:
    return [r for r in results if all(r[key] == value for key, value in wanted.items())]


def steps_to(curve: Sequence[Sequence[float]], score: float) -> float:
    """The step at which the loss is `score` for the first time, between evaluations on a line; infinite for never."""
    for (before, high), (step, loss) in zip(curve, curve[1:], strict=False):
        if loss <= score:
            return before + (step - before) * (high - score) / (high - loss) if high > score else before
    return math.inf


def shown(numbers: Sequence[float], digits: int) -> str:
    """Mean ± half of the 95 % interval (Student's t); what never came is said."""
    finite = [number for number in numbers if math.isfinite(number)]
    if len(finite) < len(numbers):
        reached = ", ".join(f"{number:.{digits}f}" for number in finite)
        return f"never in {len(numbers) - len(finite)} of {len(numbers)}" + (f" ({reached})" if reached else "")
    found = t_interval(numbers)
    return f"{found.value:.{digits}f}" + ("" if found.high is None else f" ± {found.high - found.value:.{digits}f}")


def tables(results: list[dict]) -> str:
    lines = []
    for noise in NOISE:
        uniform = {r["seed"]: r["curves"] for r in picked(results, arm="uniform", noise=noise)}
        lines += [
            f"{noise:.0%} noise:", "",
            f"| arm | steps to what uniform has on new concepts after {STEPS} | loss, new concepts | minus uniform "
            "| loss, old concepts | minus uniform | draws of new rows | suspects | precision | recall |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]  # fmt: skip
        for arm in ARMS:
            runs = [r for r in picked(results, arm=arm, noise=noise) if r["seed"] in uniform]
            if not runs:
                continue
            cells = [shown([steps_to(r["curves"]["new"], uniform[r["seed"]]["new"][-1][1]) for r in runs], 0)]
            for group in ("new", "old"):
                ends = [r["curves"][group][-1][1] for r in runs]
                gaps = [end - uniform[r["seed"]][group][-1][1] for end, r in zip(ends, runs, strict=True)]
                cells += [shown(ends, 3), "" if arm == "uniform" else shown(gaps, 3)]
            cells.append(shown([100 * r["new_share"] for r in runs], 0) + " %")
            suspects, right, wrong = (sum(r[key] for r in runs) for key in ("suspects", "right", "wrong"))
            cells.append("" if arm == "uniform" else str(suspects))
            cells.append(f"{right / suspects:.0%}" if suspects else "")
            cells.append(f"{right / wrong:.0%}" if wrong and arm != "uniform" else "")
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def wanted() -> list[tuple[str, float, int]]:
    """The comparison first, then the variants."""
    pairs = [(arm, noise) for arms in (("uniform", "loss"), ("loss, no guard", "forgetting"))
             for noise in NOISE for arm in arms]  # fmt: skip
    return [(*pair, seed) for pair in pairs if pair not in LEFT_OUT for seed in SEEDS]


def told(result: dict) -> str:
    ends = ", ".join(f"{group} {curve[-1][1]:.3f}" for group, curve in result["curves"].items())
    return (
        f"{result['arm']}, {result['noise']:.0%}, seed {result['seed']}: {ends}, suspects "
        f"{result['right']}/{result['suspects']} of {result['wrong']}, {result['cpu_seconds']:.0f} CPU-s"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["VLMTUNE_CACHE"] = cache
        results, is_recorded = results_of(
            __doc__, DRAFT, wanted(), one_run,
            lambda r, arm, noise, seed: (r["arm"], r["noise"], r["seed"]) == (arm, noise, seed), told,
        )  # fmt: skip
    print(f"\n{tables(results)}")
    if is_recorded:
        described = {
            "date": str(date.today()), "steps": STEPS, "batch": BATCH, "every": EVERY, "old": OLD, "new": NEW,
            "names": NAMES, "held_out": HELD_OUT, "results": results,
        }  # fmt: skip
        (HERE / "active.json").write_text(json.dumps(described) + "\n")
        DRAFT.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
