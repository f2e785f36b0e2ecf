"""Which of several answers a model finds most probable: multiple choice and labels, without generating (SPEC G6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.evaluate.metrics import reference_text
from vlmtune.evaluate.text import normalised
from vlmtune.losses.language import token_cross_entropy
from vlmtune.models.vlm import VLM
from vlmtune.shards import forward_only
from vlmtune.types import Sample, Text, Turn, VlmtuneError

ALPHA = (
    0.7  # between 0, where long answers lose by their length, and 1, where they lose nothing by it (SPEC: 0.6 to 0.8)
)


@dataclass(frozen=True)
class Choice:
    """One answer to one question. log_probability: of all its tokens and the end of the turn together, given the
    conversation before; tokens: how many those are."""

    text: str
    log_probability: float
    tokens: int

    def score(self, alpha: float = ALPHA) -> float:
        """log p / tokens ** alpha (Wu et al. 2016, eq. 14, in the form of its first factor)."""
        return self.log_probability / self.tokens**alpha


@dataclass(frozen=True)
class ChoiceRule:
    """labels: task -> the answers to choose from, for samples that bring none in `meta.choices`; alpha: as `Choice`."""

    labels: Mapping[str, Sequence[str]]
    alpha: float = ALPHA

    def choices(self, sample: Sample) -> list[str]:
        """The answers of a sample, none where it is not to be chosen. Raises VlmtuneError naming a sample whose own
        answer is not among them, or whose `meta.choices` is no list of different texts."""
        found = sample.meta.get("choices", self.labels.get(sample.task))
        if found is None:
            return []
        where = f"{sample.origin} (sample {sample.id})"
        if not isinstance(found, (list, tuple)) or not all(isinstance(text, str) and text.strip() for text in found):
            raise VlmtuneError(f"{where}: meta.choices is a list of texts, not {str(found)[:80]}.")
        texts = [normalised(text) for text in found]
        if len(set(texts)) < max(2, len(texts)):
            raise VlmtuneError(f"{where}: choices are at least two different texts, not {', '.join(texts)[:80]}.")
        if true_answer(sample) not in texts:
            raise VlmtuneError(
                f"{where}: its answer {true_answer(sample)!r} is none of the choices ({', '.join(texts)[:160]}); "
                "correct one of them, or leave the sample out."
            )
        return texts


def true_answer(sample: Sample) -> str:
    """The text of the last assistant turn."""
    return reference_text(next(turn for turn in reversed(sample.turns) if turn.role == "assistant"))


def score_choices(
    model: torch.nn.Module, encoder: Encoder, asked: Sequence[tuple[Sample, Sequence[str]]], batch_size: int
) -> list[list[Choice]]:
    """For each sample its answers with their probabilities, in order. The model must be in eval mode.

    Every answer is encoded as the training would encode it, so that a token is cut, and a turn ended, in the same way.
    """
    encoder = encoder.without_limit()
    vlm = VLM(model)
    todo = [(number, text, _with_reply(sample, text)) for number, (sample, texts) in enumerate(asked) for text in texts]
    found: list[list[Choice]] = [[] for _ in asked]
    for start in range(0, len(todo), batch_size):
        part = todo[start : start + batch_size]
        batch = collate([encoder.encode(sample) for _, _, sample in part], encoder.pad_token_id).to(model.device)
        with forward_only(model):
            states = vlm(batch, every_state=False)
            losses = token_cross_entropy(states.hidden, vlm.head, states.targets).double()
        sums = torch.zeros(len(part), dtype=torch.double, device=losses.device).index_add(0, states.row, losses)
        counts = torch.bincount(states.row, minlength=len(part))
        for (number, text, _), total, count in zip(part, sums.tolist(), counts.tolist(), strict=True):
            found[number].append(Choice(text, -total, count))
    return found


def choice_metrics(
    model: torch.nn.Module, encoder: Encoder, samples: Sequence[Sample], rule: ChoiceRule, batch_size: int
) -> Iterator[tuple[str, str, float]]:
    """(task, "choice_accuracy", share of samples whose own answer is the most probable) of every task with choices."""
    asked = [(sample, choices) for sample in samples if (choices := rule.choices(sample))]
    right: dict[str, list[bool]] = {}
    for (sample, _), choices in zip(asked, score_choices(model, encoder, asked, batch_size), strict=True):
        best = max(choices, key=lambda choice: choice.score(rule.alpha))
        right.setdefault(sample.task, []).append(best.text == true_answer(sample))
    for task, hits in sorted(right.items()):
        yield task, "choice_accuracy", sum(hits) / len(hits)


def _with_reply(sample: Sample, text: str) -> Sample:
    """The conversation up to the last assistant turn, whose reply is `text`; earlier replies carry no loss."""
    last = max(n for n, turn in enumerate(sample.turns) if turn.role == "assistant")
    before = [replace(turn, train=False) if turn.role == "assistant" else turn for turn in sample.turns[:last]]
    return replace(sample, turns=(*before, Turn("assistant", (Text(text),))))
