"""Held-out data -> loss and task metrics, the same before, during and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class SampleLoss:
    """Of one held-out sample: the sum of the losses of its supervised tokens, and how many there are."""

    group: str
    id: str
    task: str
    loss: float
    tokens: int


@dataclass
class Evaluation:
    """metrics: "loss", "loss/<group>/<task>", "<group>/<task>/<metric>" -> value; scored: empty without generation;
    losses: of every sample, in the order of `scored`."""

    metrics: dict[str, float]
    scored: list[Scored]
    losses: list[SampleLoss] = field(default_factory=list)


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
    every: list[SampleLoss] = []
    for group, sources in groups.items():
        samples = [source[i] for source in sources for i in range(_count(source, limit))]
        losses, regions = _teacher_forced(model, encoder, samples, batch_size)
        metrics |= {f"{group}/{name}": value for name, value in regions.items()}
        every += [
            SampleLoss(group, sample.id, sample.task, *loss) for sample, loss in zip(samples, losses, strict=True)
        ]
        for task in dict.fromkeys(sample.task for sample in samples):
            metrics[f"loss/{group}/{task}"] = mean_loss(
                [row for row in every if (row.group, row.task) == (group, task)]
            )
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
    return Evaluation({"loss": mean_loss(every), **metrics}, scored, every)


def mean_loss(rows: Sequence[SampleLoss]) -> float:
    """Mean over supervised tokens."""
    return sum(row.loss for row in rows) / sum(row.tokens for row in rows)


def _count(source: SampleSource, limit: int | None) -> int:
    sizes = [n for n in (source.size, limit) if n is not None]
    return min(sizes)


def _teacher_forced(
    model, encoder: Encoder, samples: list[Sample], batch_size: int
) -> tuple[list[tuple[float, int]], dict[str, float]]:
    """(sum of token losses, supervised tokens) of every sample; and "task/metric" -> mean over regions, where there
    are read-outs."""
    vlm, readouts = VLM(model), readouts_of(model)
    scores: dict[str, list[float]] = {}
    sums: list[tuple[float, int]] = []
    for start in range(0, len(samples), batch_size):
        encoded = [encoder.encode(sample) for sample in samples[start : start + batch_size]]
        batch = collate(encoded, encoder.pad_token_id).to(model.device)
        states = vlm(batch)
        losses = token_cross_entropy(states.hidden, vlm.head, states.targets).double()
        for row in range(len(batch.tasks)):
            mine = losses[states.row == row]
            sums.append((float(mine.sum()), len(mine)))
        for task, metric, value in [] if readouts is None else region_scores(states.sequence, readouts, batch):
            scores.setdefault(f"{task}/{metric}", []).append(value)
    return sums, {name: sum(values) / len(values) for name, values in sorted(scores.items())}
