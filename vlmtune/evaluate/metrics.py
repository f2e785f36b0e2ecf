"""The metrics of a task: replies and boxes of a model against what samples say is right (SPEC H3, PAINS 23).

A metric is a function of all samples of a task, because some (BLEU, CIDEr) are not means over them. What "no answer"
scores is defined everywhere: docs/guide/evaluate.md has it in one table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from vlmtune.evaluate.boxes import box_scores
from vlmtune.evaluate.cider import cider
from vlmtune.evaluate.names import BOX_METRICS, CORPUS_METRICS, REGION_METRICS, TASK_METRICS, task_metrics
from vlmtune.evaluate.text import (
    LIBRARIES,
    anls,
    bleu,
    caption_f1,
    chrf,
    exact_match,
    library,
    normalised,
    rouge_l,
)
from vlmtune.evaluate.vqa import ANNOTATORS, vqa_accuracy
from vlmtune.types import Box, Boxes, Points, Sample, Text, Turn, VlmtuneError

Corpus = Callable[[Sequence[str], Sequence[Sequence[str]]], float]  # of predictions, and the references of each
READ_BY = {"head_iou": "box", "mask_iou": "mask", "mask_oiou": "mask"}  # metric -> read-out


def score_task(
    task: str,
    predictions: Sequence[str],
    samples: Sequence[Sample],
    boxes: Sequence[Sequence[Box]],
    without_places: Callable[[str], str],
    chosen: Sequence[str] | None = None,
) -> dict[str, float]:
    """{metric: value over all samples} of one task.

    predictions: generated replies, one per sample; boxes: what was parsed from them, in original pixels;
    without_places: takes boxes and points out of a reply (`Coordinates.without_places`); chosen: the metrics, those of
    read-outs among them left out (None: what `task_metrics` says).
    The reference is the last assistant turn of a sample; of text metrics its `accepted_answers`. ValueError: no
    samples, or lists of different lengths; VlmtuneError: a sample that cannot be scored.
    """
    _refuse_unequal(len(predictions), len(samples), len(boxes))
    turns = [_reference_turn(sample) for sample in samples]
    targets = [_target_boxes(turn) for turn in turns]
    names = task_metrics(task) if chosen is None else [name for name in chosen if name not in REGION_METRICS]
    require_scorable(task, names, samples)
    said = [
        without_places(reply) if _has_places(turn) else reply for reply, turn in zip(predictions, turns, strict=True)
    ]
    accepted = [accepted_answers(sample) for sample in samples]
    scores = {name: _TEXT[name](said, accepted) for name in names if name in _TEXT}
    if task == "grounding":
        on_boxes = _grounding_scores(predictions, turns, boxes, targets)
    elif any(targets):
        with_boxes = [(found, true) for found, true in zip(boxes, targets, strict=True) if true]
        on_boxes = box_scores([found for found, _ in with_boxes], [true for _, true in with_boxes])
    else:
        on_boxes = {}
    if chosen is None and task not in TASK_METRICS:
        return scores | on_boxes
    return scores | {name: on_boxes[name] for name in names if name in BOX_METRICS}


def score_sample(
    task: str,
    reply: str,
    sample: Sample,
    boxes: Sequence[Box],
    without_places: Callable[[str], str],
    chosen: Sequence[str] | None = None,
) -> dict[str, float]:
    """What `score_task` is the mean of, for one sample: without metrics of all samples together (`CORPUS_METRICS`), and
    without those of boxes where its reference has none, which are means over the others."""
    if chosen is not None:
        left_out = BOX_METRICS if task != "grounding" and not _has_target_boxes(sample) else ()
        chosen = [name for name in chosen if name not in (*CORPUS_METRICS, *left_out)]
    return score_task(task, [reply], [sample], [boxes], without_places, chosen)


def require_scorable(task: str, names: Sequence[str], samples: Sequence[Sample]) -> None:
    """Raises VlmtuneError where these metrics cannot be computed of these samples, whatever a model replies.

    Metrics of read-outs need a model too: `require_readouts`.
    """
    for name in names:
        if name in LIBRARIES:
            library(name)
    for sample in samples:
        count = len(accepted_answers(sample))
        if "vqa_accuracy" in names and ("answers" not in sample.meta or count != ANNOTATORS):
            given = f"{count} of them" if "answers" in sample.meta else "none"
            raise VlmtuneError(
                f"{_where(sample)}: vqa_accuracy needs meta.answers, those of {ANNOTATORS} people, but there are "
                f"{given}; add them, or choose exact_match or anls, which take any number."
            )
    if task != "grounding" and set(names) & set(BOX_METRICS) and not any(map(_has_target_boxes, samples)):
        raise VlmtuneError(
            f"{_few(names, BOX_METRICS)} of task {task!r}: no reply of its {len(samples)} held-out samples has a box "
            "to compare with; write boxes as typed parts, or take it out of evaluate.metrics."
        )
    if "cider" in names and len(samples) < 2:
        raise VlmtuneError(
            f"cider of task {task!r} weighs words by how many samples use them, but there is only one held-out sample; "
            "add some, or take it out of evaluate.metrics."
        )


def require_readouts(task: str, names: Sequence[str], samples: Sequence[Sample], readouts: Collection[str]) -> None:
    """Raises VlmtuneError for a metric of read-outs that the model has not, or that nothing can be compared with."""
    parts = [part for sample in samples for turn in sample.turns for part in turn.parts if isinstance(part, Boxes)]
    found = {"box": any(part.boxes for part in parts), "mask": any(part.masks for part in parts)}
    for name in names:
        head = READ_BY.get(name)
        if head is not None and head not in readouts:
            remedy = "loss.referring" if head == "mask" else "loss.referring or loss.box: {read: head}"
            raise VlmtuneError(f"{name} of task {task!r} needs a {head} head, but this run trains none; set {remedy}.")
        if head is not None and not found[head]:
            what = {"box": "boxes", "mask": "boxes with masks"}[head]
            raise VlmtuneError(
                f"{name} of task {task!r} needs {what}, but none of its {len(samples)} held-out samples has any; add "
                "them, or take it out of evaluate.metrics."
            )


def accepted_answers(sample: Sample) -> list[str]:
    """What counts as right: `meta.answers`, or else the text of the last assistant turn.

    Raises VlmtuneError naming a sample whose `meta.answers` is no list of texts.
    """
    found = sample.meta.get("answers")
    if found is None:
        return [reference_text(_reference_turn(sample))]
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(text, str) for text in found):
        raise VlmtuneError(
            f"{_where(sample)}: meta.answers is a list of at least one text, all of them right, not {str(found)[:80]}."
        )
    return list(found)


def reference_text(turn: Turn) -> str:
    """The text of a reply, its boxes and points left out, whitespace normalised."""
    return normalised("".join(part.text for part in turn.parts if isinstance(part, Text)))


def _mean_of(score: Callable[[str, Sequence[str]], float]) -> Corpus:
    """Of a score of one sample."""

    def corpus(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        return _mean([score(said, accepted) for said, accepted in zip(predictions, references, strict=True)])

    return corpus


def _best_of(score: Callable[[str, str], float]) -> Corpus:
    """Of a score of one sample against one answer: the best over its accepted answers."""
    return _mean_of(lambda said, accepted: max(score(said, reference) for reference in accepted))


_TEXT: dict[str, Corpus] = {
    "exact_match": _best_of(exact_match),
    "accuracy": _best_of(exact_match),
    "f1": _best_of(caption_f1),
    "anls": _mean_of(anls),
    "vqa_accuracy": _mean_of(vqa_accuracy),
    "bleu": bleu,
    "chrf": chrf,
    "rouge_l": rouge_l,
    "cider": cider,
}


def _where(sample: Sample) -> str:
    return f"{sample.origin} (sample {sample.id})" if sample.origin else f"sample {sample.id}"


def _few(names: Sequence[str], of: Sequence[str]) -> str:
    return " and ".join(name for name in names if name in of)


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


def _has_target_boxes(sample: Sample) -> bool:
    return bool(_target_boxes(_reference_turn(sample)))


def _has_places(turn: Turn) -> bool:
    """Then the reference text leaves them out, and they are taken out of the prediction too."""
    return any(isinstance(part, Points) or (isinstance(part, Boxes) and not part.region) for part in turn.parts)


def _refuse_unequal(*lengths: int) -> None:
    if len(set(lengths)) > 1 or lengths[0] == 0:
        raise ValueError(f"scores need the same number of predictions and references, at least one; got {lengths}")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
