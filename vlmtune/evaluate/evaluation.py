"""Held-out data -> loss and task metrics, the same before, during and after training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.sources import SampleSource
from vlmtune.evaluate.choices import ChoiceRule, choice_metrics
from vlmtune.evaluate.generate import generate_replies
from vlmtune.evaluate.metrics import require_readouts, require_scorable, score_task
from vlmtune.evaluate.names import REGION_METRICS
from vlmtune.evaluate.regions import region_scores
from vlmtune.losses.language import token_cross_entropy
from vlmtune.models.readouts import readouts_of
from vlmtune.models.vlm import VLM
from vlmtune.optim.precision import Precision, autocast
from vlmtune.processes import ALONE, Processes
from vlmtune.shards import forward_only
from vlmtune.types import Box, Sample, VlmtuneError

T = TypeVar("T")


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
    chosen: Mapping[str, Sequence[str]] | None = None,
    processes: Processes = ALONE,
) -> Evaluation:
    """Loss on every group, and replies scored by task unless `max_new_tokens` is None.

    limit: samples per source; precision: of the products, as in training; choices: which samples are multiple choice;
    chosen: task -> the metrics it has instead of `names.task_metrics` and those of regions; processes: share the
    batches, and all of them return the whole.
    The model must be in eval mode; the loss is the mean over supervised tokens. A model with read-outs is scored on
    regions as well (`names.REGION_METRICS`). Raises VlmtuneError for a sample that a metric cannot score.
    """
    with forward_only(model), autocast(precision, next(model.parameters()).device):
        return _evaluate(model, encoder, groups, limit, batch_size, max_new_tokens, choices, chosen or {}, processes)


def require_chosen(
    chosen: Mapping[str, Sequence[str]],
    groups: Mapping[str, Sequence[SampleSource]],
    readouts: Collection[str],
    limits: Collection[int | None],
) -> None:
    """Read the held-out samples and refuse what could not be measured, before anything is trained.

    chosen: task -> metrics; readouts: names of the model's; limits: of samples per source, as evaluations will have.
    Raises VlmtuneError for a task that no sample has, and for what `require_scorable` and `require_readouts` refuse.
    """
    held_out = {
        group: [[source[n] for n in range(rows_of(source, None))] for source in sources]
        for group, sources in groups.items()
    }
    tasks = {sample.task for sources in held_out.values() for samples in sources for sample in samples}
    for task, names in chosen.items():
        if task not in tasks:
            there = ", ".join(sorted(tasks)) or "none"
            raise VlmtuneError(
                f"evaluate.metrics.{task}: no sample of data.eval has this task (there is {there}); correct the name "
                "or take it out."
            )
        for sources in held_out.values():
            for limit in limits:
                mine = [sample for samples in sources for sample in samples[:limit] if sample.task == task]
                if mine:
                    require_scorable(task, names, mine)
                    require_readouts(task, names, mine, readouts)


def _evaluate(
    model, encoder: Encoder, groups, limit, batch_size: int, max_new_tokens: int | None, choices: ChoiceRule,
    chosen: Mapping[str, Sequence[str]], processes: Processes,
) -> Evaluation:  # fmt: skip
    metrics: dict[str, float] = {}
    scored: list[Scored] = []
    every: list[SampleLoss] = []
    for group, sources in groups.items():
        samples = [source[i] for source in sources for i in range(rows_of(source, limit))]
        sums: dict[tuple[str, str], tuple[float, float]] = {}
        forced = partial(_teacher_forced, model, encoder, batch_size, sums)
        losses = _spread(processes, f"losses of {group}", samples, batch_size, forced)
        for (task, metric), value in _over_regions(processes, sums).items():
            if metric in chosen.get(task, REGION_METRICS):
                metrics[f"{group}/{task}/{metric}"] = value
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
        generate = partial(generate_replies, model, encoder, max_new_tokens=max_new_tokens, batch_size=batch_size)
        replies = _spread(processes, f"replies of {group}", prompts, batch_size, generate)
        boxes = [
            encoder.coordinates.parse(reply, prompt.geometry[0]) if prompt.geometry else []
            for reply, prompt in zip(replies, prompts, strict=True)
        ]
        scored += [Scored(group, s, r, b) for s, r, b in zip(samples, replies, boxes, strict=True)]
        for task in sorted({sample.task for sample in samples}):
            rows = [n for n, sample in enumerate(samples) if sample.task == task]
            result = score_task(
                task, [replies[n] for n in rows], [samples[n] for n in rows], [boxes[n] for n in rows],
                encoder.coordinates.without_places, chosen.get(task),
            )  # fmt: skip
            metrics |= {f"{group}/{task}/{metric}": value for metric, value in result.items()}
    return Evaluation({"loss": mean_loss(every), **metrics}, scored, every)


def _spread(
    processes: Processes, what: str, items: Sequence[T], batch_size: int, work: Callable[[list[T]], list[Any]]
) -> list[Any]:
    """Result (JSON values) of each item, in order. Every process does whole batches, so that an item has the same
    company however many there are."""

    def of(rank: int) -> list[int]:
        return [n for n in range(len(items)) if n // batch_size % processes.size == rank]

    with processes.agreed(what):
        made = work([items[n] for n in of(processes.rank)])
    results: list[Any] = [None] * len(items)
    for rank, part in enumerate(processes.gather(what, made)):
        for n, result in zip(of(rank), part, strict=True):
            results[n] = result
    return results


def mean_loss(rows: Sequence[SampleLoss]) -> float:
    """Mean over supervised tokens."""
    return sum(row.loss for row in rows) / sum(row.tokens for row in rows)


def rows_of(source: SampleSource, limit: int | None) -> int:
    """How many rows of a source are asked; one without an end needs a limit."""
    sizes = [n for n in (source.size, limit) if n is not None]
    return min(sizes)


def _teacher_forced(
    model, encoder: Encoder, batch_size: int, scores: dict[tuple[str, str], tuple[float, float]], samples: list[Sample]
) -> list[tuple[float, int]]:
    """(sum of token losses, supervised tokens) of every sample; adds to scores, (task, metric) -> (sum of values, of
    weights) over regions, where there are read-outs."""
    vlm, readouts = VLM(model), readouts_of(model)
    sums: list[tuple[float, int]] = []
    for start in range(0, len(samples), batch_size):
        encoded = [encoder.encode(sample) for sample in samples[start : start + batch_size]]
        batch = collate(encoded, encoder.pad_token_id).to(model.device)
        states = vlm(batch, every_state=readouts is not None)
        losses = token_cross_entropy(states.hidden, vlm.head, states.targets).double()
        for row in range(len(batch.tasks)):
            mine = losses[states.row == row]
            sums.append((float(mine.sum()), len(mine)))
        if readouts is not None:
            for one in region_scores(states.sequence, readouts, batch, [sample.geometry for sample in encoded]):
                value, weight = scores.get((one.task, one.metric), (0.0, 0.0))
                scores[one.task, one.metric] = (value + one.value, weight + one.weight)
    return sums


def _over_regions(
    processes: Processes, scores: dict[tuple[str, str], tuple[float, float]]
) -> dict[tuple[str, str], float]:
    """(task, metric) -> mean over all regions. scores: of the regions that this process saw."""
    total: dict[tuple[str, str], tuple[float, float]] = {}
    for part in processes.gather("regions", [[*name, *sums] for name, sums in scores.items()]):
        for task, metric, value, weight in part:
            before = total.get((task, metric), (0.0, 0.0))
            total[task, metric] = (before[0] + value, before[1] + weight)
    # nothing was covered and nothing said to be: as in a single region, that is right
    return {name: value / weight if weight else 1.0 for name, (value, weight) in sorted(total.items())}
