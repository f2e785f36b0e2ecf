"""Compute by complexity, active sampling and consistency together: does one change what another is worth?

    python benchmarks/next/together.py                       # about 15 CPU-minutes, one run at a time, one thread
    python benchmarks/next/together.py --record              # also writes together.json and together.md here
    python benchmarks/next/together.py --from together.json

All eight combinations of the three on the data of `active.py` without noise: 240 rows of two
tasks, four of five about concepts that the embedded model knows. An effect is the mean difference between runs with
and without an idea, over the four combinations of the others; an interplay of two is by how much the effect of one is
larger where the other is on. Both are paired by seed.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from datetime import date
from itertools import combinations, product
from pathlib import Path

from active import BATCH, PLAN, write_data
from study import results_of

from vlmtune.evaluate.intervals import t_interval

HERE = Path(__file__).parent
DRAFT = HERE / ".together.json"  # a study that was interrupted goes on where it was; gone once it is recorded
SEEDS = (0, 1, 2)
STEPS, EVERY = 64, 8
IDEAS = {
    # the measure that `complexity.py` chose first: the default merges none of these pictures
    "complexity": {"data": {"complexity": {"measure": "detail", "simple": 0.27}}},
    "active": {"data": {"sampling": {"by": "active", "every": EVERY}}},
    "consistency": {"loss": {"consistency": {}}},
}
ARMS = [tuple(name for name, on in zip(IDEAS, choice, strict=True) if on) for choice in product((0, 1), repeat=3)]
FIGURES = {
    "loss, new": lambda r: r["losses"]["new"], "loss, old": lambda r: r["losses"]["old"],
    "image tokens": lambda r: r["image_tokens"], "CPU-s of training": lambda r: r["cpu_seconds"],
}  # fmt: skip


def config_of(arm: tuple[str, ...], seed: int, paths: dict[str, Path], run: Path) -> dict:
    weights = {"old": 4, "new": 1}  # as many as there are rows
    tree = {
        "model": "embedded", "run": str(run),
        "data": {
            "train": [
                {"path": str(paths[group])} | ({} if "active" in arm else {"weight": weight})
                for group, weight in weights.items()
            ],
            "eval": {group: [{"path": str(paths[f"{group}, held out"])}] for group in weights},
            "workers": 0,
        },
        "plan": PLAN, "loss": {},
        "optim": {"warmup": "8 steps", "floor": 0.1},
        "train": {
            "length": f"{STEPS} steps", "batch_size": BATCH, "micro_batch_size": BATCH, "threads": 1,
            "precision": "fp32", "seed": seed, "log_every": EVERY,
        },
        "checkpoint": {"every": f"{STEPS} steps", "keep": 1},
        "evaluate": {"generate": False, "batch_size": 32, "gallery": 0},
    }  # fmt: skip
    for idea in arm:
        for section, options in IDEAS[idea].items():
            tree[section] |= options
    return tree


def one_run(arm: tuple[str, ...], seed: int) -> dict:
    from rich.console import Console

    from vlmtune.config import Config
    from vlmtune.run import train

    with tempfile.TemporaryDirectory() as folder:
        paths, _ = write_data(Path(folder), 0.0, seed)
        run = Path(folder, "run")
        began = time.process_time()
        with Path(folder, "log.txt").open("w") as log:
            summary = train(Config.model_validate(config_of(arm, seed, paths, run)), Console(file=log, width=120))
        seconds = time.process_time() - began
        losses = {
            group: statistics.mean(found["loss"]["after"] for place, found in summary["metrics"].items()
                                   if place.startswith(f"{group}/"))
            for group in ("new", "old")
        }  # fmt: skip
        return {
            "arm": arm, "seed": seed, "losses": losses, "cpu_seconds": seconds,
            "image_tokens": image_tokens(Config.model_validate(config_of(arm, seed, paths, run))),
        }  # fmt: skip


def image_tokens(config) -> float:
    """Mean over the training rows."""
    from vlmtune.build import build_encoder, build_train, load_base
    from vlmtune.types import Kind

    base = load_base(config)
    encoder = build_encoder(base.processor, base.model, config.data)
    sources = [member.source for member in build_train(config.data)]
    encoded = [encoder.encode(source[row]) for source in sources for row in range(source.size)]
    return statistics.mean(int((sample.kinds == Kind.IMAGE).sum()) for sample in encoded)


# ---- report ----------------------------------------------------------------------------------------------------------


def spread(numbers: list[float]) -> str:
    found = t_interval(numbers)
    return f"{found.value:.3f} ± {found.high - found.value:.3f}"


def of(results: list[dict], arm: tuple[str, ...], seed: int) -> dict:
    return next(r for r in results if tuple(r["arm"]) == arm and r["seed"] == seed)


def effect(results: list[dict], figure, seed: int, idea: str, where: dict[str, bool] | None = None) -> float:
    """Mean difference that `idea` makes. where: ideas that have to be on or off."""
    wanted = [arm for arm in ARMS if idea not in arm and all((n in arm) == on for n, on in (where or {}).items())]
    with_it = [tuple(name for name in IDEAS if name in arm or name == idea) for arm in wanted]
    pairs = zip(with_it, wanted, strict=True)
    return statistics.mean(figure(of(results, a, seed)) - figure(of(results, b, seed)) for a, b in pairs)


def report(results: list[dict]) -> str:
    head = f"| {' | '.join(FIGURES)} |\n| --- |{' ---: |' * len(FIGURES)}"
    arms = [
        f"| {', '.join(arm) or 'none'} | "
        + " | ".join(spread([figure(of(results, arm, seed)) for seed in SEEDS]) for figure in FIGURES.values()) + " |"
        for arm in ARMS
    ]  # fmt: skip
    effects = [
        f"| {idea} | "
        + " | ".join(spread([effect(results, figure, seed, idea) for seed in SEEDS]) for figure in FIGURES.values())
        + " |"
        for idea in IDEAS
    ]
    both = [
        f"| {one} and {two} | " + " | ".join(
            spread([effect(results, figure, seed, one, {two: True}) - effect(results, figure, seed, one, {two: False})
                    for seed in SEEDS])
            for figure in FIGURES.values()
        ) + " |"
        for one, two in combinations(IDEAS, 2)
    ]  # fmt: skip
    return "\n".join(
        [f"| arm {head}", *arms, "", "What each idea does, whatever the others:", "", f"| effect of {head}", *effects,
         "", "Interplay:", "", f"| of {head}", *both]
    )  # fmt: skip


def told(result: dict) -> str:
    return (
        f"{', '.join(result['arm']) or 'none'}, seed {result['seed']}: {result['losses']}, "
        f"{result['image_tokens']:.1f} tokens, {result['cpu_seconds']:.0f} CPU-s"
    )


def main() -> None:
    wanted = [(arm, seed) for seed, arm in product(SEEDS, ARMS)]
    results, is_recorded = results_of(
        __doc__, DRAFT, wanted, one_run, lambda r, arm, seed: (tuple(r["arm"]), r["seed"]) == (arm, seed), told
    )
    print(f"\n{report(results)}")
    if is_recorded:
        described = {"date": str(date.today()), "steps": STEPS, "batch": BATCH, "results": results}
        (HERE / "together.json").write_text(json.dumps(described))
        (HERE / "together.md").write_text(
            f"# {__doc__.splitlines()[0]}\n\n`python benchmarks/next/together.py --record`, {date.today()}: {STEPS} "
            f"steps of {BATCH}, mean ± 95 % interval over {len(SEEDS)} seeds.\n\n{report(results)}\n"
        )
        DRAFT.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
