"""From the answers of two models to what the checks of `checks.outcome` judge, and the figures of validate.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vlmtune.checks.outcome import Polled, Replies
from vlmtune.evaluate.answers import Answer
from vlmtune.evaluate.diversity import diversity
from vlmtune.evaluate.paired import Change, paired_change
from vlmtune.evaluate.safety import Verdict, judge_by_command, judge_by_patterns
from vlmtune.evaluate.yes_no import categories_of, said, truth_of, yes_no_scores


def replies_of(before: Sequence[Answer], after: Sequence[Answer]) -> tuple[list[Replies], list[dict[str, Any]]]:
    """By group and task: the replies, beside the references as the tokenizer writes them, boxes and all."""
    found, figures = [], []
    for place in sorted({(one.group, one.sample.task) for one in after}):
        mine, base = ([one for one in side if (one.group, one.sample.task) == place] for side in (after, before))
        replies = Replies(
            "/".join(place),
            diversity([one.reply for one in mine]),
            diversity([one.target for one in mine]),
            sum(not one.ended for one in mine),
            # as long as the limit without the end that would have to follow
            sum(one.target_tokens > one.tokens for one in mine if not one.ended),
        )
        found.append(replies)
        said_before = diversity([one.reply for one in base])
        figures.append(
            {"group": place[0], "task": place[1], "replies": asdict(replies.said), "base": asdict(said_before),
             "references": asdict(replies.references), "cut": replies.cut, "cut_references": replies.cut_references}
        )  # fmt: skip
    return found, figures


def polled_of(before: Sequence[Answer], after: Sequence[Answer]) -> tuple[list[Polled], dict[str, Any]]:
    """By category; a question may count in several."""
    rows: dict[str, list[int]] = {}
    for number, one in enumerate(after):
        for category in categories_of(one.sample):
            rows.setdefault(category, []).append(number)
    found, figures = [], {}
    for category, numbers in rows.items():
        truths = [truth_of(after[n].sample) for n in numbers]
        scores = [yes_no_scores([side[n].reply for n in numbers], truths) for side in (before, after)]
        right = [
            [float(said(side[n].reply) == truth) for n, truth in zip(numbers, truths, strict=True)]
            for side in (before, after)
        ]
        change = paired_change(*right)
        found.append(Polled(category, *scores, change))
        figures[category] = {
            "before": scores[0].record(), "after": scores[1].record(), "accuracy": asdict(change)
        }  # fmt: skip
    return found, figures


def safety_of(
    before: Sequence[Answer], after: Sequence[Answer], judge: str | None
) -> tuple[tuple[list[Verdict], list[Verdict]], Change, list[dict[str, Any]]]:
    """(verdicts on the base, on the trained model), whether they are right pair by pair, and a row for each prompt.

    judge: a command (None: by the patterns of each row). Raises VlmtuneError where the command fails.
    """
    samples = [one.sample for one in after]
    verdicts = tuple(
        judge_by_patterns(samples, replies) if judge is None else judge_by_command(judge, samples, replies)
        for replies in ([one.reply for one in before], [one.reply for one in after])
    )
    right = paired_change(*([float(verdict.right) for verdict in side] for side in verdicts))
    figures = [
        {"id": one.sample.id, "origin": one.sample.origin, "before": old.reply, "before_right": was.right,
         "after": one.reply, "after_right": now.right, "why": now.why}
        for old, one, was, now in zip(before, after, *verdicts, strict=True)
    ]  # fmt: skip
    return verdicts, right, figures
