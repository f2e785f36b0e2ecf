"""The alignment matrix: does the language model say what the vision tower shows? (SPEC A7)

Two models, before and after training, and two ways to answer each question: a linear probe on the features of the
tower (and of the projector), and the language model, by what it generates and by which answer it finds most probable.
All answer the same questions about the same images, which no probe has learned from.

Which probe answers: one for each question that is asked often (PER_QUESTION images to learn from). Questions that are
asked less share one for each set of answers, which sees the words of the question beside the image (Zhou et al. 2015,
"Simple Baseline for Visual Question Answering"). A probe reads the mean under the region that a question points at, as
in edge probing (Tenney et al. 2019), else means over CELLS x CELLS parts of the image, side by side.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.levels import LevelQuestion
from vlmtune.evaluate.choices import score_choices
from vlmtune.evaluate.generate import generate_replies
from vlmtune.evaluate.linear_probe import fit_probe
from vlmtune.evaluate.metrics import normalised
from vlmtune.models.features import STAGES, Stage, image_features, pooled, pooled_under
from vlmtune.types import VlmtuneError

CELLS = 4
PER_QUESTION = 24
ROWS = ("vision", "projector", "generated", "by probability")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Split:
    """The questions of a level: those that probes learn from, and those that all are asked. No image is in both."""

    learn: list[LevelQuestion]
    test: list[LevelQuestion]


def right(answers: Sequence[str], test: Sequence[LevelQuestion]) -> list[bool]:
    """Whether each answer is the question's own."""
    return [answer_in(text, asked.labels) == asked.answer for text, asked in zip(answers, test, strict=True)]


def answer_in(reply: str, labels: Sequence[str]) -> str | None:
    """The label that a reply is, whatever its case and the full stop behind it; None where it is none of them."""
    if normalised(reply) in labels:
        return normalised(reply)
    return next((label for label in labels if _bare(label) == _bare(reply)), None)


def _bare(text: str) -> str:
    return normalised(text).rstrip(".").rstrip().casefold()


def answerable(split: Split) -> Split:
    """Without the test questions whose probe would have fewer than PER_QUESTION / 2 samples to learn from."""
    asked = Counter(question.question for question in split.learn)
    learned = Counter(_group(question, asked) for question in split.learn)
    return Split(split.learn, [q for q in split.test if learned[_group(q, asked)] >= PER_QUESTION // 2])


def _group(question: LevelQuestion, asked: Counter[str]) -> str:
    place = "at a region" if question.region else "all of the image"
    if asked[question.question] >= PER_QUESTION:
        return f"{question.question} ({place})"
    return f"any of {', '.join(sorted(question.labels))} ({place})"


def features_of(
    model: nn.Module, encoder: Encoder, questions: Sequence[LevelQuestion], progress: Progress
) -> dict[Stage, list[Tensor]]:
    """stage -> the probe's view of each question's image, float32[D] on the CPU. The model must be in eval mode.

    Raises VlmtuneError naming a sample whose region is outside of what the model sees.
    """
    processor = encoder.processor.image_processor
    leads = hasattr(processor, "do_pan_and_scan") or hasattr(processor, "image_grid_pinpoints")
    found: dict[Stage, list[Tensor]] = {stage: [] for stage in STAGES}
    for number, question in enumerate(questions, 1):
        encoded = encoder.encode_prompt(question.sample)
        inputs = collate([encoded], encoder.pad_token_id).to(model.device).inputs
        canvas = encoded.geometry[0]
        features = image_features(model, inputs, canvas, "first" if leads else "last")
        for stage, grid in zip(STAGES, (features.vision, features.projector), strict=True):
            found[stage].append(_view(grid, question, canvas))
        progress(f"images of {question.level}", number, len(questions))
    return found


def _view(grid: Tensor, question: LevelQuestion, canvas) -> Tensor:
    if question.region is None:
        return pooled(grid, CELLS)
    x1, y1, x2, y2 = question.region.boxes[0]
    under = pooled_under(grid, (*canvas.to_canvas(x1, y1), *canvas.to_canvas(x2, y2)))
    if under is None:
        raise VlmtuneError(
            f"{question.sample.origin} (sample {question.sample.id}): the region it asks about is outside of what the "
            "model sees of the image, or has no area; correct the box, or leave the sample out."
        )
    return under


def probe_answers(split: Split, learn: Sequence[Tensor], test: Sequence[Tensor]) -> list[str]:
    """What linear probes answer to the test questions. learn, test: float32[D] of each question of the split."""
    asked = Counter(question.question for question in split.learn)
    learned = [_group(question, asked) for question in split.learn]
    wanted = [_group(question, asked) for question in split.test]
    answers = [""] * len(wanted)
    for group in dict.fromkeys(wanted):
        rows = [n for n, name in enumerate(learned) if name == group]
        targets = [n for n, name in enumerate(wanted) if name == group]
        words = _words([split.learn[n] for n in rows])
        x = _design([learn[n] for n in rows], [split.learn[n] for n in rows], words)
        probe = fit_probe(x, [split.learn[n].answer for n in rows], [x.shape[1] - len(words)] if words else [])
        x = _design([test[n] for n in targets], [split.test[n] for n in targets], words)
        for n, answer in zip(targets, probe.predict(x), strict=True):
            answers[n] = answer
    return answers


def _words(questions: Sequence[LevelQuestion]) -> list[str]:
    """Of different questions that share a probe; none where there is one only."""
    wordings = {question.question for question in questions}
    return sorted({word for text in wordings for word in _split(text)}) if len(wordings) > 1 else []


def _split(question: str) -> list[str]:
    return re.findall(r"\w+", question.casefold())


def _design(features: Sequence[Tensor], questions: Sequence[LevelQuestion], words: Sequence[str]) -> np.ndarray:
    """float64[N, D + words]: features, and 1 for each word that is in the question."""
    said = np.array([[float(word in _split(question.question)) for word in words] for question in questions])
    return np.concatenate([torch.stack(list(features)).double().numpy(), said.reshape(len(questions), -1)], axis=1)


def prior_answers(split: Split) -> list[str]:
    """For each test question the answer that is most often right among those of its probe: without looking, nobody who
    gives one answer to one question can do better. A baseline from other questions could be unlucky, and flatter."""
    asked = Counter(question.question for question in split.learn)
    groups = [_group(question, asked) for question in split.test]
    counts: dict[str, Counter[str]] = {}
    for group, question in zip(groups, split.test, strict=True):
        counts.setdefault(group, Counter())[question.answer] += 1
    best = {group: min(found, key=lambda label: (-found[label], label)) for group, found in counts.items()}
    return [best[group] for group in groups]


@torch.inference_mode()
def language_answers(
    model: nn.Module,
    encoder: Encoder,
    test: Sequence[LevelQuestion],
    batch_size: int,
    max_new_tokens: int,
    alpha: float,
) -> dict[str, list[str]]:
    """Rows "generated" (greedy) and "by probability" (`evaluate.choices` over the question's labels)."""
    prompts = [encoder.encode_prompt(question.sample) for question in test]
    replies = generate_replies(model, encoder, prompts, max_new_tokens, batch_size)
    asked = [(question.sample, question.labels) for question in test]
    scored = score_choices(model, encoder, asked, batch_size)
    chosen = [max(choices, key=lambda choice: choice.score(alpha)).text for choices in scored]
    return {"generated": replies, "by probability": chosen}
