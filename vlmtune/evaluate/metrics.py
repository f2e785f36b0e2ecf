"""Scores of replies against references: functions on strings and boxes, no model in sight (SPEC H3, PAINS 23).

A function named after a metric scores one sample and returns a float in [0, 1]; `box_scores` and `score_task` average
over samples. What "no answer" scores is defined everywhere: nothing asked and nothing said is 1, one of the two is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from vlmtune.types import Box, Boxes, Points, Sample, Text, Turn, VlmtuneError

ANLS_THRESHOLD = 0.5

_BOX_METRICS = ("mean_iou", "acc_50")
_TASK_METRICS = {
    "caption": ("f1", "exact_match"),
    "vqa": ("exact_match",),
    "ocr": ("anls", "exact_match"),
    "grounding": _BOX_METRICS,
    "referring": ("accuracy",),
}


def normalised(text: str) -> str:
    """Runs of whitespace become one space, ends are trimmed; case and punctuation stay."""
    return " ".join(text.split())


def exact_match(prediction: str, reference: str) -> float:
    """1.0 when the two agree up to whitespace. Case counts: the format of an answer is part of what is learned."""
    return float(normalised(prediction) == normalised(reference))


def anls(prediction: str, references: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """Average normalised Levenshtein similarity of one sample: the best over its accepted answers.

    1 - NL where NL = edits / longer length, and 0 when NL >= threshold; case and whitespace do not count.
    Source: Biten et al., "Scene Text Visual Question Answering", ICCV 2019, eq. 1; DocVQA uses the same.
    """
    return max((_levenshtein_similarity(prediction, reference, threshold) for reference in references), default=0.0)


def levenshtein(a: str, b: str) -> int:
    """The fewest insertions, deletions and substitutions of one character that turn `a` into `b`."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, from_a in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, from_b in enumerate(b, start=1):
            substituted = diagonal + (from_a != from_b)
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, substituted)
    return row[-1]


def caption_f1(prediction: str, reference: str) -> float:
    """F1 between two sets of items, "hospital top left; factory bottom left"; both sets empty is 1.0."""
    said, true = _items(prediction), _items(reference)
    if not said and not true:
        return 1.0
    return 2 * len(said & true) / (len(said) + len(true))


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes in the same pixels; 0.0 when neither has an area."""
    across = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    down = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = across * down
    union = _area(a) + _area(b) - shared
    return shared / union if union > 0 else 0.0


def match_boxes(predicted: Sequence[Box], target: Sequence[Box]) -> list[tuple[int, int, float]]:
    """One-to-one pairs (index in `predicted`, index in `target`, IoU) with the largest total IoU (Hungarian method).

    min(len(predicted), len(target)) pairs; pairs that do not overlap are in it, with 0.0.
    """
    if not predicted or not target:
        return []
    overlaps = np.array([[iou(p, t) for t in target] for p in predicted])
    rows, columns = linear_sum_assignment(overlaps, maximize=True)
    return [(int(row), int(column), float(overlaps[row, column])) for row, column in zip(rows, columns, strict=True)]


def box_scores(predicted: Sequence[Sequence[Box]], target: Sequence[Sequence[Box]]) -> dict[str, float]:
    """{"mean_iou", "acc_50"} averaged over samples; one list of boxes per sample, both in the same pixels.

    Of one sample: the matched IoUs, or the number of them >= 0.5, divided by max(predicted, targets), so that a missing
    and a surplus box both cost; 1.0 when there are neither.
    """
    _refuse_unequal(len(predicted), len(target))
    mean_iou, acc_50 = [], []
    for said, true in zip(predicted, target, strict=True):
        overlaps = [overlap for _, _, overlap in match_boxes(said, true)]
        count = max(len(said), len(true))
        mean_iou.append(sum(overlaps) / count if count else 1.0)
        acc_50.append(sum(overlap >= 0.5 for overlap in overlaps) / count if count else 1.0)
    return {"mean_iou": _mean(mean_iou), "acc_50": _mean(acc_50)}


def task_metrics(task: str) -> tuple[str, ...]:
    """The metrics `score_task` reports, the telling one first. An unknown task is compared as text.

    An unknown task gets "mean_iou" and "acc_50" as well where its reference replies hold boxes.
    """
    return _TASK_METRICS.get(task, ("exact_match",))


def score_task(
    task: str,
    predictions: Sequence[str],
    samples: Sequence[Sample],
    boxes: Sequence[Sequence[Box]],
    without_places: Callable[[str], str],
) -> dict[str, float]:
    """{metric: mean over samples} of one task.

    predictions: generated replies, one per sample; boxes: what was parsed from them, in original pixels;
    without_places: takes boxes and points out of a reply (`Coordinates.without_places`).
    The reference is the last assistant turn of a sample. ValueError: no samples, or lists of different lengths;
    VlmtuneError: a sample without an assistant turn.
    """
    _refuse_unequal(len(predictions), len(samples), len(boxes))
    turns = [_reference_turn(sample) for sample in samples]
    targets = [_target_boxes(turn) for turn in turns]
    scores = {}
    for metric in task_metrics(task):
        if metric in _TEXT_METRICS:
            score = _TEXT_METRICS[metric]
            pairs = zip(predictions, turns, strict=True)
            scores[metric] = _mean(
                [
                    score(without_places(said) if _has_places(turn) else said, reference_text(turn))
                    for said, turn in pairs
                ]
            )
    if task == "grounding":
        scores |= _grounding_scores(predictions, turns, boxes, targets)
    elif task not in _TASK_METRICS and any(targets):
        with_boxes = [(said, true) for said, true in zip(boxes, targets, strict=True) if true]
        scores |= box_scores([said for said, _ in with_boxes], [true for _, true in with_boxes])
    return scores


def reference_text(turn: Turn) -> str:
    """The text of a reply, its boxes and points left out, whitespace normalised."""
    return normalised("".join(part.text for part in turn.parts if isinstance(part, Text)))


_TEXT_METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "accuracy": exact_match,
    "f1": caption_f1,
    "anls": lambda prediction, reference: anls(prediction, [reference]),
}


def _levenshtein_similarity(prediction: str, reference: str, threshold: float) -> float:
    a, b = normalised(prediction).lower(), normalised(reference).lower()
    longer = max(len(a), len(b))
    if longer == 0:
        return 1.0
    # At least as many edits as the lengths differ: a runaway reply need not be compared character by character.
    if abs(len(a) - len(b)) / longer >= threshold:
        return 0.0
    distance = levenshtein(a, b) / longer
    return 1.0 - distance if distance < threshold else 0.0


def _items(caption: str) -> set[str]:
    return {normalised(item) for item in caption.split(";")} - {""}


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _reference_turn(sample: Sample) -> Turn:
    for turn in reversed(sample.turns):
        if turn.role == "assistant":
            return turn
    where = sample.origin or sample.id
    raise VlmtuneError(f"Sample {where} has no assistant reply to compare with; add one or leave it out of evaluation.")


def _grounding_scores(predictions, turns, boxes, targets) -> dict[str, float]:
    """`box_scores`, except that absence has to be said: a reply without boxes that is not the reference scores 0."""
    wrong = [
        not said and not true and not exact_match(text, reference_text(turn))
        for text, turn, said, true in zip(predictions, turns, boxes, targets, strict=True)
    ]
    answered = [n for n, is_wrong in enumerate(wrong) if not is_wrong]
    if not answered:
        return {"mean_iou": 0.0, "acc_50": 0.0}
    scores = box_scores([boxes[n] for n in answered], [targets[n] for n in answered])
    return {metric: value * len(answered) / len(wrong) for metric, value in scores.items()}


def _target_boxes(turn: Turn) -> list[Box]:
    return [box for part in turn.parts if isinstance(part, Boxes) and not part.region for box in part.boxes]


def _has_places(turn: Turn) -> bool:
    """Then the reference text leaves them out, and they are taken out of the prediction too."""
    return any(isinstance(part, Points) or (isinstance(part, Boxes) and not part.region) for part in turn.parts)


def _refuse_unequal(*lengths: int) -> None:
    if len(set(lengths)) > 1 or lengths[0] == 0:
        raise ValueError(f"scores need the same number of predictions and references, at least one; got {lengths}")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
