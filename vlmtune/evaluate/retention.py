"""The same held-out samples before and after training: what was gained, what was lost, and how sure that is (SPEC H3).

McCloskey & Cohen 1989 called the loss of what was known catastrophic interference; PAINS 30 is what users say of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmtune.evaluate.answers import Answer, Scoring
from vlmtune.evaluate.paired import Change, paired_change

LOSS = "loss"


@dataclass(frozen=True)
class Comparison:
    """One metric of one task of one held-out group, of the base and of what was trained. telling: the metric that the
    task is judged by."""

    group: str
    task: str
    metric: str
    change: Change
    telling: bool


def compare(before: Sequence[Answer], after: Sequence[Answer], scoring: Scoring) -> list[Comparison]:
    """Every metric of every group and task, its scores paired by sample; the loss last, lower being better.

    before, after: answers to the same samples, in the same order. ValueError: they are not.
    """
    if [_place(answer) for answer in before] != [_place(answer) for answer in after]:
        raise ValueError("the answers to compare are not to the same samples in the same order")
    found = []
    for group, task in sorted({(answer.group, answer.sample.task) for answer in after}):
        rows = [n for n, answer in enumerate(after) if (answer.group, answer.sample.task) == (group, task)]
        pairs = [[scoring.scores(answers[n]) for n in rows] for answers in (before, after)]
        metrics = list(dict.fromkeys(metric for scores in pairs[1] for metric in scores))
        judged_by = scoring.telling(task, metrics)
        for metric in metrics:
            # a metric of boxes is there for the samples that have some
            one, other = ([scores[metric] for scores in side if metric in scores] for side in pairs)
            found.append(Comparison(group, task, metric, paired_change(one, other), metric == judged_by))
        losses = [(before[n].loss, after[n].loss) for n in rows if after[n].loss is not None]
        if losses:
            found.append(Comparison(group, task, LOSS, paired_change(*zip(*losses, strict=True)), False))
    return found


def pooled(before: Sequence[Answer], after: Sequence[Answer], scoring: Scoring) -> dict[str, Change]:
    """Group -> the telling score of each sample, over all tasks of the group."""
    found = {}
    for group in dict.fromkeys(answer.group for answer in after):
        one, other = ([], [])
        for first, second in zip(before, after, strict=True):
            if second.group == group:
                pair = [scoring.scores(answer) for answer in (first, second)]
                metric = scoring.telling(second.sample.task, list(pair[1]))
                one.append(pair[0][metric])
                other.append(pair[1][metric])
        found[group] = paired_change(one, other)
    return found


def _place(answer: Answer) -> tuple[str, str, str]:
    return answer.group, answer.sample.task, answer.sample.id
