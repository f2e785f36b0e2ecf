"""Held-out data -> loss and task metrics, the same before, during and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.sources import SampleSource
from vlmtune.evaluate.choices import ChoiceRule, choice_metrics
from vlmtune.evaluate.generate import generate_replies
from vlmtune.evaluate.metrics import score_task
from vlmtune.evaluate.regions import region_scores
from vlmtune.losses.language import token_cross_entropy
from vlmtune.models.readouts import readouts_of
from vlmtune.models.vlm import VLM
from vlmtune.optim.precision import Precision, autocast
from vlmtune.types import Box, Sample


@dataclass
class Scored:
    """One held-out sample with the model's reply; boxes in original pixels."""

    group: str
    sample: Sample
    reply: str
    boxes: list[Box]


@dataclass
class Evaluation:
    """metrics: "loss", "loss/<group>/<task>", "<group>/<task>/<metric>" -> value; scored: empty without generation."""

    metrics: dict[str, float]
    scored: list[Scored]


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module,
    encoder: Encoder,
    groups: dict[str, Sequence[SampleSource]],
    *,
    limit: int | None,
    batch_size: int,
    max_new_tokens: int | None,
    precision: Precision = "fp32",
    choices: ChoiceRule = ChoiceRule({}),  # noqa: B008  frozen
) -> Evaluation:
    """Loss on every group, and replies scored by task unless `max_new_tokens` is None.

    limit: samples per source; precision: of the products, as in training; choices: which samples are multiple choice.
    The model must be in eval mode; the loss is the mean over supervised tokens. A model with read-outs is scored on
    regions as well ("head_iou", "mask_iou").
    """
    with autocast(precision, next(model.parameters()).device):
        return _evaluate(model, encoder, groups, limit, batch_size, max_new_tokens, choices)


def _evaluate(
    model, encoder: Encoder, groups, limit, batch_size: int, max_new_tokens: int | None, choices: ChoiceRule
) -> Evaluation:
    metrics: dict[str, float] = {}
    scored: list[Scored] = []
    total = torch.zeros(2, dtype=torch.float64)
    for group, sources in groups.items():
        samples = [source[i] for source in sources for i in range(_count(source, limit))]
        losses, regions = _teacher_forced(model, encoder, samples, batch_size)
        metrics |= {f"{group}/{name}": value for name, value in regions.items()}
        for task, (loss, tokens) in losses.items():
            metrics[f"loss/{group}/{task}"] = loss / tokens
            total += torch.tensor([loss, tokens], dtype=torch.float64)
        for task, metric, value in choice_metrics(model, encoder, samples, choices, batch_size):
            metrics[f"{group}/{task}/{metric}"] = value
        if max_new_tokens is None:
            continue
        prompts = [encoder.encode_prompt(sample) for sample in samples]
        replies = generate_replies(model, encoder, prompts, max_new_tokens, batch_size)
        boxes = [
            encoder.coordinates.parse(reply, prompt.geometry[0]) if prompt.geometry else []
            for reply, prompt in zip(replies, prompts, strict=True)
        ]
        scored += [Scored(group, s, r, b) for s, r, b in zip(samples, replies, boxes, strict=True)]
        for task in sorted({sample.task for sample in samples}):
            rows = [n for n, sample in enumerate(samples) if sample.task == task]
            result = score_task(
                task, [replies[n] for n in rows], [samples[n] for n in rows], [boxes[n] for n in rows],
                encoder.coordinates.without_places,
            )  # fmt: skip
            metrics |= {f"{group}/{task}/{metric}": value for metric, value in result.items()}
    return Evaluation({"loss": float(total[0] / total[1]), **metrics}, scored)


def _count(source: SampleSource, limit: int | None) -> int:
    sizes = [n for n in (source.size, limit) if n is not None]
    return min(sizes)


def _teacher_forced(
    model, encoder: Encoder, samples: list[Sample], batch_size: int
) -> tuple[dict[str, tuple[float, int]], dict[str, float]]:
    """task -> (sum of token losses, supervised tokens); and "task/metric" -> mean over regions, where there are
    read-outs."""
    vlm, readouts = VLM(model), readouts_of(model)
    scores: dict[str, list[float]] = {}
    sums: dict[str, tuple[float, int]] = {}
    for start in range(0, len(samples), batch_size):
        encoded = [encoder.encode(sample) for sample in samples[start : start + batch_size]]
        batch = collate(encoded, encoder.pad_token_id).to(model.device)
        states = vlm(batch)
        losses = token_cross_entropy(states.hidden, vlm.head, states.targets).double()
        for row, task in enumerate(batch.tasks):
            mine = losses[states.row == row]
            loss, tokens = sums.get(task, (0.0, 0))
            sums[task] = (loss + float(mine.sum()), tokens + len(mine))
        for task, metric, value in [] if readouts is None else region_scores(states.sequence, readouts, batch):
            scores.setdefault(f"{task}/{metric}", []).append(value)
    return sums, {name: sum(values) / len(values) for name, values in sorted(scores.items())}
