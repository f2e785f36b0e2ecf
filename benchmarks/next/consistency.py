"""Does a loss that makes replies depend on the image make a model hallucinate less?

    python benchmarks/next/consistency.py                       # about 20 CPU-minutes, one run at a time, one thread
    python benchmarks/next/consistency.py --record              # also writes consistency.json and consistency.md here
    python benchmarks/next/consistency.py --from consistency.json

The embedded model learns 24 concepts it has never seen (captions, questions, naming regions, writing; LoRA, projector
in full, tower frozen), three seeds for each arm. Arms differ in `loss.consistency` alone. Each is asked POPE questions
about held-out scenes and for captions of them, once with their pictures and once with grey ones (blind: what it would
say without looking), and the alignment matrix' questions of four levels; the tower is frozen, so its probe is the same
for all. Of captions the objects that are named count (CHAIR, Rohrbach et al. 2018): precision is the share of them that
is there, recall the share of what is there that is named.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

from study import results_of

from vlmtune.evaluate.intervals import t_interval

HERE = Path(__file__).parent
DRAFT = HERE / ".consistency.json"  # a study that was interrupted goes on where it was; gone once it is recorded
TASKS = ("caption", "vqa", "referring", "ocr")
SEEDS = (0, 1, 2)
STEPS, BATCH = 120, 16
HELD_OUT, ASKED, PER_LEVEL, CAPTIONS = 24, 50, 40, 60
ARMS = {
    "without": None,
    "margin, another": {"weight": 0.2},
    "margin, blank": {"weight": 0.2, "other": "blank"},
    "contrast, another": {"weight": 0.2, "by": "contrast"},
}
FIGURES = ("accuracy", "precision", "recall", "yes_rate")


def config_of(arm: str, seed: int, run: Path) -> dict:
    held_out = {
        group: [{"scenes": scenes, "task": task, "split": "val", "limit": HELD_OUT} for task in TASKS]
        for group, scenes in (("new", "new"), ("old", "base"))
    }
    return {
        "model": "embedded", "run": str(run),
        "data": {
            "train": [{"scenes": scenes, "task": task} for scenes in ("new", "base") for task in TASKS],
            "eval": held_out, "workers": 0,
        },
        "plan": [
            {"match": "vision", "train": "frozen"},
            {"match": "projector", "train": "full", "lr": 4e-4},
            {"match": "language", "train": "lora", "rank": 16, "lr": 2e-3},
            {"match": "embed", "train": "frozen"},
        ],
        "optim": {"warmup": "10 steps", "floor": 0.05},
        "loss": {} if ARMS[arm] is None else {"consistency": ARMS[arm]},
        "train": {
            "length": f"{STEPS} steps", "batch_size": BATCH, "micro_batch_size": BATCH, "threads": 1,
            "precision": "fp32", "seed": seed,
        },
        "checkpoint": {"every": f"{STEPS} steps", "keep": 1},
        "evaluate": {"batch_size": 50, "generate": False, "gallery": 0},
    }  # fmt: skip


def one_run(arm: str, seed: int) -> dict:
    from rich.console import Console

    from vlmtune.config import Config
    from vlmtune.run import train
    from vlmtune.use import load_run

    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        with Path(folder, "log.txt").open("w") as log:
            summary = train(Config.model_validate(config_of(arm, seed, run)), Console(file=log, width=120))
        trained = time.process_time() - began
        loaded = load_run(run, "latest")
        return {
            "arm": arm, "seed": seed, "train_cpu_seconds": trained, **asked(loaded.model, loaded.encoder),
            "scores": {f"{place}/{metric}": values["after"] for place, found in summary["metrics"].items()
                       for metric, values in found.items()},
            "cpu_seconds": time.process_time() - began,
        }  # fmt: skip


def asked(model, encoder) -> dict:
    """POPE with pictures and blind, how much pictures matter for held-out replies, and the levels of the matrix."""
    import torch

    from vlmtune.data.contrast import Contrast
    from vlmtune.data.scenes import SceneRecipe
    from vlmtune.evaluate.alignment import language_answers, right
    from vlmtune.evaluate.generate import generate_replies
    from vlmtune.evaluate.level_questions import scene_questions
    from vlmtune.evaluate.yes_no import poll, truth_of, yes_no_scores

    recipe = SceneRecipe("new")
    scenes = [recipe.sample("vqa", index, "val") for index in range(3 * ASKED)]
    polls = poll(scenes, "Any {name}?")
    truths = [truth_of(sample) for sample in polls]
    found = {}
    for name, samples in (("seeing", polls), ("blind", [blinded(sample) for sample in polls])):
        prompts = [encoder.encode_prompt(sample) for sample in samples]
        replies = generate_replies(model, encoder, prompts, 8, 50)
        scores = yes_no_scores(replies, truths).record()
        found[name] = {figure: scores[figure] for figure in FIGURES} | {"count": scores["count"]}
    captions = [recipe.sample("caption", index, "val") for index in range(CAPTIONS)]
    for name, samples in (("seeing", captions), ("blind", [blinded(sample) for sample in captions])):
        prompts = [encoder.encode_prompt(sample) for sample in samples]
        replies = generate_replies(model, encoder, prompts, 40, 50)
        found[f"captions {name}"] = named(replies, captions, recipe.names)
    contrast = Contrast("another", None, lambda progress: 1.0)
    with torch.inference_mode():
        found["gain"] = {
            task: statistics.mean(gains(model, encoder, contrast, [recipe.sample(task, n, "val") for n in range(32)]))
            for task in TASKS
        }
    found["levels"] = {}
    for level, split in scene_questions("new", PER_LEVEL, None).splits.items():
        answers = language_answers(model, encoder, split.test, 50, 12, 0.0)
        found["levels"][level] = {row: statistics.mean(right(said, split.test)) for row, said in answers.items()}
    return found


def named(captions: list[str], samples: list, names: list[str]) -> dict[str, float]:
    """Precision and recall of the objects that captions name, over all of them; how many a caption names."""
    right = said = there = 0
    for caption, sample in zip(captions, samples, strict=True):
        present = {thing["name"] for thing in sample.meta["objects"]}
        mentioned = {name for name in names if re.search(rf"\b{re.escape(name)}s?\b", caption)}
        right, said, there = right + len(present & mentioned), said + len(mentioned), there + len(present)
    return {"precision": right / max(said, 1), "recall": right / there, "named": said / len(captions)}


def blinded(sample):
    """The sample with a grey picture of the same size."""
    import io

    from PIL import Image

    from vlmtune.data.contrast import GREY
    from vlmtune.data.images import load_image
    from vlmtune.types import ImageRef

    def grey(part):
        if not isinstance(part, ImageRef):
            return part
        file = io.BytesIO()
        Image.new("RGB", load_image(part.source, sample.origin).size, GREY).save(file, "PNG")
        return replace(part, source=file.getvalue())

    turns = tuple(replace(turn, parts=tuple(map(grey, turn.parts))) for turn in sample.turns)
    return replace(sample, turns=turns)


def gains(model, encoder, contrast, samples) -> list[float]:
    """Of each sample that has another picture: nats per token of its reply that its own one is worth."""
    from vlmtune.data.batch import collate, with_contrast
    from vlmtune.losses.consistency import reply_means
    from vlmtune.losses.language import token_cross_entropy
    from vlmtune.models.vlm import VLM

    encoded = [encoder.encode(sample) for sample in samples]
    others = [contrast.encode(n, own, samples.__getitem__, len(samples), encoder) for n, own in enumerate(encoded)]
    batch = with_contrast(collate(encoded, encoder.pad_token_id), others, encoder.pad_token_id)
    vlm = VLM(model)
    means = []
    for part in (batch, batch.contrast):
        states = vlm(part)
        means.append(reply_means(token_cross_entropy(states.hidden, vlm.head, states.targets), states, len(part.kinds)))
    return (means[1] - means[0][batch.contrasted]).tolist()


# ---- report ----------------------------------------------------------------------------------------------------------


def spread(numbers: list[float], digits: int = 3) -> str:
    found = t_interval(numbers)
    return f"{found.value:.{digits}f} ± {found.high - found.value:.{digits}f}"


def table(title: str, results: list[dict], columns: dict) -> str:
    """columns: heading -> figure of a result. The difference to `without`, paired by seed, behind every mean."""
    base = {r["seed"]: r for r in results if r["arm"] == "without"}
    lines = [title, "", f"| arm | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    for arm in ARMS:
        mine = [r for r in results if r["arm"] == arm]
        cells = []
        for figure in columns.values():
            cell = spread([figure(r) for r in mine])
            if arm != "without":
                cell += f" ({spread([figure(r) - figure(base[r['seed']]) for r in mine])})".replace("(0", "(+0")
            cells.append(cell)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(results: list[dict]) -> str:
    pope = {figure.replace("_", "-"): lambda r, f=figure: r["seeing"][f] for figure in FIGURES}
    blind = {"blind accuracy": lambda r: r["blind"]["accuracy"], "blind yes-rate": lambda r: r["blind"]["yes_rate"],
             "seeing - blind accuracy": lambda r: r["seeing"]["accuracy"] - r["blind"]["accuracy"]}  # fmt: skip
    chair = {f"{figure}, {how}": lambda r, f=figure, h=how: r[f"captions {h}"][f]
             for how in ("seeing", "blind") for figure in ("precision", "recall", "named")}  # fmt: skip
    gain = {task: lambda r, t=task: r["gain"][t] for task in TASKS}
    levels = {level: lambda r, name=level: r["levels"][name]["by probability"] for level in results[0]["levels"]}
    held_out = {
        f"{group}: loss": lambda r, g=group: statistics.mean(r["scores"][f"{g}/{task}/loss"] for task in TASKS)
        for group in ("new", "old")
    } | {
        "CPU-seconds of training": lambda r: r["train_cpu_seconds"],
    }
    count = results[0]["seeing"]["count"]
    return "\n\n".join(
        [
            table(f"POPE, {count} questions about {ASKED} held-out scenes of new concepts:", results, pope),
            table("The same questions about grey pictures:", results, blind),
            table(f"Objects that captions of {CAPTIONS} held-out scenes name:", results, chair),
            table("Nats per token by which its picture makes a held-out reply likelier than another:", results, gain),
            table(f"Alignment, {PER_LEVEL} questions a level, by probability:", results, levels),
            table("Held-out samples, and cost:", results, held_out),
        ]
    )


def told(result: dict) -> str:
    return (
        f"{result['arm']}, seed {result['seed']}: {result['seeing']}, blind {result['blind']['accuracy']:.2f}, "
        f"{result['cpu_seconds']:.0f} CPU-s"
    )


def main() -> None:
    wanted = [(arm, seed) for seed in SEEDS for arm in ARMS]
    results, is_recorded = results_of(
        __doc__, DRAFT, wanted, one_run, lambda r, arm, seed: (r["arm"], r["seed"]) == (arm, seed), told
    )
    print(f"\n{report(results)}")
    if is_recorded:
        described = {"date": str(date.today()), "steps": STEPS, "batch": BATCH, "arms": ARMS, "results": results}
        (HERE / "consistency.json").write_text(json.dumps(described, indent=1))
        (HERE / "consistency.md").write_text(
            f"# {__doc__.splitlines()[0]}\n\n`python benchmarks/next/consistency.py --record`, {date.today()}: "
            f"{STEPS} steps of {BATCH}, mean ± 95 % interval over {len(SEEDS)} seeds; in brackets the difference to "
            f"the arm without, paired by seed.\n\n{report(results)}\n"
        )
        DRAFT.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
