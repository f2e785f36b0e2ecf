"""What fewer image tokens for simple pictures save, and what they cost in accuracy (SPEC F6).

    python benchmarks/next/complexity.py                        # about 20 CPU-minutes, one run at a time, one thread
    python benchmarks/next/complexity.py --record               # also writes complexity.json and complexity.md here
    python benchmarks/next/complexity.py --from complexity.json # tables of recorded results

The embedded model goes on training on three kinds of pictures in equal shares: one object on white ("object"), one
large word or number on white ("word"), and three or four objects before a photo ("scene"). Arms differ in the image
tokens, in training and evaluation alike: all of them ("full"), every image with a quarter ("merged"), a quarter for
those below a threshold of complexity ("rule"), and a quarter for as many images chosen by a hash of their pixels
("random"), which tells whether choosing by complexity matters.

Measure and threshold of the rule are chosen on validation pictures: the most images that can be merged while the mean
accuracy, put together from the full and the merged model's replies, falls by at most one point. The test pictures are
others. "rule" chooses among four measures; it lost more than a point, by scenes that have little detail, so there was
a second try, "largest", with the largest of the four, and a control for it. Accuracy: the reply is the answer, to the
letter.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import date
from pathlib import Path
from random import Random
from unittest.mock import patch

import numpy as np
from PIL import Image

from vlmtune.evaluate.intervals import t_interval

HERE = Path(__file__).parent
DRAFT = HERE / ".complexity.json"  # a study that was interrupted goes on where it was; gone once it is recorded
GROUPS = ("object", "word", "scene")
MEASURES = ("edges", "entropy", "text", "detail", "largest")
CHOSEN = {"rule": MEASURES[:4], "largest": MEASURES[4:]}  # arm -> measures that it may choose from
CONTROLS = {"random": "rule", "random, largest": "largest"}  # arm -> that whose share of merged images it has
ARMS = ("full", "merged", "rule", "random", "largest", "random, largest")
SEEDS = (0, 1, 2)
STEPS, BATCH = 120, 16
ROWS = {"train": STEPS * BATCH // len(GROUPS), "validation": 100, "test": 250}  # of each group
POINT = 0.01
QUANTILES = tuple(n / 20 for n in range(1, 20))
LEAST = 0.25


# ---- data -----------------------------------------------------------------------------------------------------------


def picture(group: str, part: str, index: int) -> tuple[bytes, str, str]:
    """(PNG, question, answer) of one row, always the same."""
    from vlmtune.data import questions
    from vlmtune.data.layout import arrange
    from vlmtune.data.scenes import SceneRecipe, scene_sample

    recipe, split = SceneRecipe("base"), "train" if part == "train" else "val"
    random = Random(f"{group}/{part}/{index}")
    if group == "word":
        return drawn_word(random, recipe.words, split)
    if group == "object":
        scene = arrange(random, recipe.names, split, 1, split)
        plain = replace(scene, objects=scene.objects[:1], background=replace(scene.background, white=1.0))
        sample = scene_sample("o", "vqa", plain, questions.what_is_at(plain, recipe.names, random))
    else:
        start = random.randrange(10**6)
        many = (recipe.sample("vqa", start + n, split) for n in range(1000))
        sample = next(sample for sample in many if len(sample.meta["objects"]) >= 3)
    question = "".join(part.text for part in sample.turns[0].parts[1:])
    return sample.images[0].source, question, sample.meta["answer"]


def drawn_word(random: Random, words: list[str], split: str) -> tuple[bytes, str, str]:
    from vlmtune.data.atlas import FONTS, font
    from vlmtune.data.scenes import INKS, LONGEST_STRING, WHITE, Writing, draw_writing, is_val_string

    while True:
        text = random.choice((str(random.randint(10, 9999)), random.choice(words)))
        family, size = random.choice(FONTS["train"]), random.choice((24, 28, 32))
        left, top, right, bottom = (int(edge) for edge in font(family, size).getbbox(text))
        fits = len(text) <= LONGEST_STRING and right - left <= WHITE.width - 4
        if fits and is_val_string(text) == (split == "val"):
            break
    x = random.randint(2, WHITE.width - 2 - (right - left)) - left
    y = random.randint(2, WHITE.height - 2 - (bottom - top)) - top
    writing = Writing(text, family, size, random.choice(INKS), (x, y), (x + left, y + top, x + right, y + bottom))
    buffer = io.BytesIO()
    draw_writing(WHITE.copy(), writing).save(buffer, "PNG")
    return buffer.getvalue(), "What is written?", text


def write_part(folder: Path, part: str) -> Path:
    """JSON Lines with images beside it, the groups one after another."""
    images = folder / f"{part}-images"
    images.mkdir(parents=True)
    lines = []
    for group in GROUPS:
        for index in range(ROWS[part]):
            png, question, answer = picture(group, part, index)
            name = f"{group}-{index}.png"
            (images / name).write_bytes(png)
            content = [{"type": "image", "image": f"{images.name}/{name}"}, {"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"id": f"{group}-{index}", "task": group, "messages": messages}))
    path = folder / f"{part}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


# ---- runs -----------------------------------------------------------------------------------------------------------


def config_of(arm: str, seed: int, rule: dict, run: Path, data: Path) -> dict:
    """rule: what was chosen for this arm, or for that which it controls."""
    if arm in CHOSEN:
        wish = {key: rule[key] for key in ("measure", "simple", "complex")}
    elif arm in CONTROLS:
        wish = {"measure": "edges", "simple": rule["share"], "complex": 1.0}
    else:  # no picture is that steep
        wish = {"measure": "edges", "simple": 0.99, "complex": 1.0} if arm == "merged" else None
    return {
        "model": "embedded",
        "run": str(run),
        "data": {
            "train": [{"path": str(data)}], "workers": 0,
            **({} if wish is None else {"complexity": {"least": LEAST, **wish}}),
        },
        "plan": [
            {"match": "vision", "train": "frozen"},
            {"match": "projector", "train": "full", "lr": 4e-4},
            {"match": "language", "train": "lora", "rank": 16, "lr": 2e-3},
            {"match": "embed", "train": "frozen"},
        ],
        "optim": {"warmup": "10 steps", "floor": 0.05},
        "train": {
            "length": f"{STEPS} steps", "batch_size": BATCH, "micro_batch_size": BATCH, "threads": 1,
            "precision": "fp32", "seed": seed,
        },
        "checkpoint": {"every": f"{STEPS} steps", "keep": 1},
    }  # fmt: skip


def by_hash(image: Image.Image, measure: str) -> float:
    """In place of a complexity: evenly spread in [0, 1), and nothing but a name of the picture."""
    return int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:6], "big") / 2**48


def one_run(arm: str, seed: int, rule: dict, data: Path) -> dict:
    """Train, and answer all held-out questions: 1 and 0 for each, and the image tokens of each."""
    from rich.console import Console

    from vlmtune.config import Config
    from vlmtune.data.sources import FileSource
    from vlmtune.evaluate.generate import generate_replies
    from vlmtune.run import train
    from vlmtune.use import load_run

    began = time.process_time()
    chooses = patch("vlmtune.data.pictures.complexity", by_hash) if arm in CONTROLS else nullcontext()
    with tempfile.TemporaryDirectory() as folder, chooses:
        run = Path(folder, "run")
        with Path(folder, "log.txt").open("w") as log:
            train(Config.model_validate(config_of(arm, seed, rule, run, data / "train.jsonl")), Console(file=log))
        training = time.process_time() - began
        loaded = load_run(run, "latest")
        found = {}
        for part in ("validation", "test"):
            source = FileSource(data / f"{part}.jsonl")
            samples = [source[row] for row in range(source.size)]
            prompts = [loaded.encoder.encode_prompt(sample) for sample in samples]
            replies = generate_replies(loaded.model, loaded.encoder, prompts, 12, 100)
            answers = [sample.turns[-1].parts[0].text for sample in samples]
            right = [reply == answer for reply, answer in zip(replies, answers, strict=True)]
            token = loaded.model.config.image_token_id
            found[part] = {
                "right": "".join(str(int(one)) for one in right),
                "tokens": [int((prompt.ids == token).sum()) for prompt in prompts],
            }
    return {
        "arm": arm, "seed": seed, **found, "training_seconds": training, "cpu_seconds": time.process_time() - began,
    }  # fmt: skip


def complexities(data: Path) -> dict[str, dict[str, list[float]]]:
    """part -> measure -> of each row."""
    from vlmtune.data.complexity import complexity
    from vlmtune.data.images import load_image
    from vlmtune.data.sources import FileSource

    found = {}
    for part in ("validation", "test"):
        source = FileSource(data / f"{part}.jsonl")
        images = [load_image(source[row].images[0].source, part) for row in range(source.size)]
        found[part] = {m: [round(complexity(image, m), 5) for image in images] for m in MEASURES}
    return found


# ---- reading it -----------------------------------------------------------------------------------------------------


def right(result: dict, part: str = "test") -> np.ndarray:
    return np.array([int(letter) for letter in result[part]["right"]])


def picked(results: list[dict], arm: str) -> list[dict]:
    return sorted((result for result in results if result["arm"] == arm), key=lambda result: result["seed"])


def candidates(results: list[dict], values: dict[str, list[float]]) -> list[dict]:
    """What every measure and threshold would merge of the validation pictures, and the accuracy that would be lost."""
    full, merged = (
        np.mean([right(r, "validation") for r in picked(results, arm)], axis=0) for arm in ("full", "merged")
    )
    found = []
    for measure in MEASURES:
        numbers = np.array(values[measure])
        for quantile in QUANTILES:
            threshold = float(np.quantile(numbers, quantile))
            simple = numbers <= threshold
            lost = float(np.where(simple, full - merged, 0).mean())
            found.append({"measure": measure, "simple": threshold, "share": float(simple.mean()), "lost": lost})
    return found


def choose(results: list[dict], values: dict[str, list[float]], arm: str) -> dict:
    """The candidate that merges most within a point; where none is, the one that loses least."""
    found = [one for one in candidates(results, values) if one["measure"] in CHOSEN[arm]]
    within = [one for one in found if one["lost"] <= POINT]
    best = max(within, key=lambda one: one["share"]) if within else min(found, key=lambda one: one["lost"])
    return {**best, "complex": min(1.0, 3 * best["simple"] + 0.01), "is_within": bool(within)}


def rule_for(arm: str, study: dict) -> dict:
    """What an arm merges by; nothing for those that have no choice."""
    of = CONTROLS.get(arm, arm)
    return choose(study["results"], study["complexities"]["validation"], of) if of in CHOSEN else {}


def described(arm: str, study: dict) -> str:
    rule = rule_for(arm, study)
    return (
        f"- {arm}: merges images up to {rule['measure']} {rule['simple']:.4f}, {rule['share']:.0%} of the validation "
        f"pictures, which would lose {100 * rule['lost']:+.1f} points"
        + ("." if rule["is_within"] else "; no candidate stays within a point.")
    )


def spread(numbers: list[float], scale: float = 100, digits: int = 1, sign: str = "") -> str:
    """Mean and half of its 95 % interval (Student's t)."""
    found = t_interval([scale * number for number in numbers])
    return f"{found.value:{sign}.{digits}f} ± {found.high - found.value:.{digits}f}"


def of_group(values: np.ndarray, group: str | None) -> float:
    if group is None:
        return float(values.mean())
    size, at = ROWS["test"], GROUPS.index(group)
    return float(values[at * size : (at + 1) * size].mean())


def accuracy_table(results: list[dict]) -> str:
    full = picked(results, "full")
    lines = [
        f"| arm | all | difference to full | {' | '.join(GROUPS)} | image tokens | saved | CPU-s of training |",
        f"| --- | ---: | ---: |{' ---: |' * len(GROUPS)} ---: | ---: | ---: |",
    ]
    whole = statistics.mean(statistics.mean(r["test"]["tokens"]) for r in full)
    for arm in ARMS:
        runs = picked(results, arm)
        if not runs:
            continue
        gaps = [right(r).mean() - right(f).mean() for r, f in zip(runs, full, strict=False)]
        tokens = statistics.mean(statistics.mean(r["test"]["tokens"]) for r in runs)
        cells = [
            spread([right(r).mean() for r in runs]), "" if arm == "full" else spread(gaps, sign="+"),
            *(spread([of_group(right(r), group) for r in runs]) for group in GROUPS),
            f"{tokens:.1f}", f"{1 - tokens / whole:.0%}",
            f"{statistics.mean(r['training_seconds'] for r in runs):.0f}",
        ]  # fmt: skip
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def token_table(results: list[dict]) -> str:
    """Image tokens of a sample, by group."""
    lines = [f"| arm | {' | '.join(GROUPS)} |", f"| --- |{' ---: |' * len(GROUPS)}"]
    for arm in ARMS:
        if runs := picked(results, arm):
            tokens = np.mean([r["test"]["tokens"] for r in runs], axis=0)
            lines.append(f"| {arm} | {' | '.join(f'{of_group(tokens, group):.1f}' for group in GROUPS)} |")
    return "\n".join(lines)


def ranks(values: np.ndarray) -> np.ndarray:
    """Middle ranks: equal values share one."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def correlation_table(results: list[dict], values: dict[str, dict[str, list[float]]]) -> str:
    """Spearman's, of complexity with what merging every image costs a picture, over the seeds' mean."""
    lost = np.mean([right(r) for r in picked(results, "full")], axis=0) - np.mean(
        [right(r) for r in picked(results, "merged")], axis=0
    )
    lines = ["| measure | " + " | ".join((*GROUPS, "all")) + " |", "| --- |" + " ---: |" * (len(GROUPS) + 1)]
    size = ROWS["test"]
    for measure in MEASURES:
        numbers = np.array(values["test"][measure])
        parts = [slice(n * size, (n + 1) * size) for n in range(len(GROUPS))] + [slice(None)]
        cells = [f"{np.corrcoef(ranks(numbers[p]), ranks(lost[p]))[0, 1]:+.2f}" for p in parts]
        lines.append(f"| {measure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def choice_table(results: list[dict], values: dict[str, dict[str, list[float]]]) -> str:
    """Of every measure the most that could be merged within a point on the validation pictures."""
    found = candidates(results, values["validation"])
    lines = ["| measure | threshold | images merged | accuracy lost, points |", "| --- | ---: | ---: | ---: |"]
    for measure in MEASURES:
        within = [one for one in found if one["measure"] == measure and one["lost"] <= POINT]
        if within:
            best = max(within, key=lambda one: one["share"])
            lines.append(f"| {measure} | {best['simple']:.4f} | {best['share']:.0%} | {100 * best['lost']:+.1f} |")
        else:
            lines.append(f"| {measure} | none | | |")
    return "\n".join(lines)


def report(study: dict) -> str:
    results, rows = study["results"], ROWS["test"]
    return "\n".join([
        "# Compute by image complexity",
        "",
        f"`python benchmarks/next/complexity.py --record`, {study['date']}. {STEPS} steps of {BATCH} samples, "
        f"{len(SEEDS)} seeds, {rows} test pictures of each group; accuracy in percent, mean ± 95 % interval over seeds "
        "(Student's t); differences are paired by seed.",
        "",
        *(described(arm, study) for arm in CHOSEN),
        *(f"- {arm}: not run." for arm in ARMS if not picked(results, arm)),
        "",
        accuracy_table(results),
        "",
        "Image tokens of a sample:",
        "",
        token_table(results),
        "",
        "What each measure could merge of the validation pictures within a point:",
        "",
        choice_table(results, study["complexities"]),
        "",
        "Rank correlation of complexity with the accuracy that merging costs a test picture:",
        "",
        correlation_table(results, study["complexities"]),
        "",
    ])  # fmt: skip


def run_study() -> dict:
    import torch

    torch.set_num_threads(1)
    study = json.loads(DRAFT.read_text()) if DRAFT.exists() else {"results": []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        for part in ROWS:
            write_part(data, part)
        study["complexities"] = complexities(data)
        for arms in (ARMS[:2], ARMS[2:4], ARMS[4:]):  # the rules are chosen by what the first two did
            for arm, seed in ((arm, seed) for seed in SEEDS for arm in arms):
                if any(r["seed"] == seed for r in picked(study["results"], arm)):
                    continue
                study["results"].append(one_run(arm, seed, rule_for(arm, study), data))
                last = study["results"][-1]
                print(
                    f"{arm} seed {seed}: {100 * right(last).mean():.1f} %, {last['cpu_seconds']:.0f} CPU-s", flush=True
                )
                DRAFT.write_text(json.dumps(study))
    return {"date": str(date.today()), "steps": STEPS, "batch": BATCH, "rows": ROWS, **study}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--from", dest="recorded", type=Path)
    options = parser.parse_args()
    study = json.loads(options.recorded.read_text()) if options.recorded else run_study()
    print(report(study))
    if options.record:
        (HERE / "complexity.json").write_text(json.dumps(study) + "\n")
        (HERE / "complexity.md").write_text(report(study))
        DRAFT.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
