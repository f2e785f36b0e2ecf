"""What a model answers to samples, and all that is asked of an answer later: text, boxes, loss, whether it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.evaluate.generate import generate
from vlmtune.evaluate.metrics import score_sample
from vlmtune.evaluate.names import task_metrics
from vlmtune.losses.language import token_cross_entropy
from vlmtune.models.vlm import VLM
from vlmtune.optim.precision import Precision, autocast
from vlmtune.types import Box, Encoded, Sample

BATCHES_AT_ONCE = 8
"""Prompts encoded ahead, in batches: sorted by length among themselves, and no more pixels in memory than these."""


@dataclass(frozen=True)
class Answer:
    """A reply to one sample. tokens: that were generated; ended: whether by an end of reply, not by the limit.

    target, target_tokens: the reference as the tokenizer writes it, and its length with the end of the turn. loss: mean
    over the supervised tokens of the sample, float32. None: of samples asked without a reference.
    """

    group: str
    sample: Sample
    reply: str
    boxes: list[Box]
    tokens: int
    ended: bool
    target: str | None = None
    target_tokens: int | None = None
    loss: float | None = None


def answer(
    model: torch.nn.Module,
    encoder: Encoder,
    groups: Mapping[str, Sequence[Sample]],
    *,
    batch_size: int,
    max_new_tokens: int,
    precision: Precision = "fp32",
    with_reference: bool = True,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """Greedy replies to all samples, group by group, in order. The model must be in eval mode.

    with_reference: measure the loss of the reference too; False for prompts without one. progress: is told how many
    samples were answered. Raises VlmtuneError naming a sample that cannot be encoded.
    """
    found = []
    size = batch_size * BATCHES_AT_ONCE
    with autocast(precision, next(model.parameters()).device), torch.inference_mode():
        for group, samples in groups.items():
            for start in range(0, len(samples), size):
                part = samples[start : start + size]
                found += _answer_part(model, encoder, group, part, batch_size, max_new_tokens, with_reference)
                progress(len(part))
    return found


def _answer_part(
    model, encoder: Encoder, group: str, samples: Sequence[Sample], batch_size: int, limit: int, with_reference: bool
) -> Iterator[Answer]:
    prompts = [encoder.encode_prompt(sample) for sample in samples]
    made = generate(model, encoder, prompts, limit, batch_size)
    whole = [encoder.encode(sample) for sample in samples] if with_reference else []
    losses = sample_losses(model, encoder, whole, batch_size)
    for number, (sample, prompt, generated) in enumerate(zip(samples, prompts, made, strict=True)):
        reply = encoder.decode(generated.ids)
        boxes = encoder.coordinates.parse(reply, prompt.geometry[0]) if prompt.geometry else []
        reference = ()
        if with_reference:
            ids = _last_reply(whole[number])
            reference = (encoder.decode(ids), len(ids), losses[number])
        yield Answer(group, sample, reply, boxes, len(generated.ids), generated.ended, *reference)


def sample_losses(model, encoder: Encoder, encoded: Sequence[Encoded], batch_size: int) -> list[float]:
    """Mean cross-entropy of the supervised tokens of each sample."""
    vlm, found = VLM(model), []
    for start in range(0, len(encoded), batch_size):
        part = encoded[start : start + batch_size]
        states = vlm(collate(part, encoder.pad_token_id).to(model.device), every_state=False)
        losses = token_cross_entropy(states.hidden, vlm.head, states.targets).double()
        sums = torch.zeros(len(part), dtype=torch.double, device=losses.device).index_add(0, states.row, losses)
        found += (sums / torch.bincount(states.row, minlength=len(part))).tolist()
    return found


def _last_reply(encoded: Encoded) -> list[int]:
    """Ids of the last reply that carries loss, its end included."""
    carries = encoded.supervised()
    return encoded.ids[carries & (encoded.turn == encoded.turn[carries].max())].tolist()


@dataclass(frozen=True)
class Scoring:
    """How single samples are scored. without_places: takes boxes and points out of a reply; chosen: task -> its metrics
    (`evaluate.metrics`), of which those of a whole corpus have no value here."""

    without_places: Callable[[str], str]
    chosen: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def scores(self, answered: Answer) -> dict[str, float]:
        """Metric -> score of this one sample (`metrics.score_sample`); where none that is chosen has one, what the task
        has by itself."""
        return self._scores(answered, self.chosen.get(answered.sample.task)) or self._scores(answered, None)

    def _scores(self, one: Answer, chosen: Sequence[str] | None) -> dict[str, float]:
        return score_sample(one.sample.task, one.reply, one.sample, one.boxes, self.without_places, chosen)

    def telling(self, task: str, metrics: Sequence[str]) -> str:
        """The metric that a task is judged by: the first that is chosen or that `task_metrics` names; of an unknown
        task whose replies hold boxes "mean_iou", because the text around them says little. metrics: there are."""
        wanted = self.chosen.get(task)
        if wanted is not None:
            return next((name for name in wanted if name in metrics), metrics[0])
        return "mean_iou" if "mean_iou" in metrics else task_metrics(task)[0]

    def telling_score(self, answered: Answer) -> float:
        scores = self.scores(answered)
        return scores[self.telling(answered.sample.task, list(scores))]
