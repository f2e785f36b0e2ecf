"""Scores of boxes against boxes: numbers in the same pixels, no model in sight (SPEC H3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from vlmtune.types import Box


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
    and a surplus box both cost; 1.0 when there are neither. ValueError: no samples, or lists of different lengths.
    """
    if len(predicted) != len(target) or not predicted:
        raise ValueError(
            f"scores need the same number of predicted and target lists, at least one; got {len(predicted)} and "
            f"{len(target)}"
        )
    mean_iou, acc_50 = [], []
    for said, true in zip(predicted, target, strict=True):
        overlaps = [overlap for _, _, overlap in match_boxes(said, true)]
        count = max(len(said), len(true))
        mean_iou.append(sum(overlaps) / count if count else 1.0)
        acc_50.append(sum(overlap >= 0.5 for overlap in overlaps) / count if count else 1.0)
    return {"mean_iou": sum(mean_iou) / len(mean_iou), "acc_50": sum(acc_50) / len(acc_50)}


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
