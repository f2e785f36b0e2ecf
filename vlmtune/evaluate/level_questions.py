"""What the alignment matrix asks: the embedded scenes, or own rows with a level and a closed set of answers (A7)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlmtune.data.atlas import ConceptGroup
from vlmtune.data.levels import LEVELS, LevelQuestion, LevelScenes
from vlmtune.data.prompts import SystemPrompt
from vlmtune.data.questions import Level
from vlmtune.data.sources import with_system
from vlmtune.evaluate.alignment import Split, answerable
from vlmtune.evaluate.choices import ChoiceRule, true_answer
from vlmtune.types import Sample, Text, VlmtuneError

LEARN_PER_TEST = 3  # questions that probes learn from, for each one that everybody is asked
FEWEST = 20  # test questions of a level, below which no interval says anything
ROWS_PER_ANSWER = 5  # of one wording, for its answers to count as a closed set


@dataclass(frozen=True)
class Asked:
    """splits: of the levels that can be measured. too_few: level -> why not. left_out: reason -> rows."""

    splits: dict[Level, Split]
    too_few: dict[Level, str]
    left_out: dict[str, int]


def scene_questions(concepts: ConceptGroup, samples: int, prompt: SystemPrompt | None) -> Asked:
    """All four levels on the embedded scenes. samples: test questions of each; prompt: that training had."""
    splits = {}
    for level in LEVELS:
        scenes = LevelScenes(level, concepts)
        drawn = [scenes[index] for index in range(samples * (1 + LEARN_PER_TEST))]
        if prompt is not None:
            drawn = [replace(question, sample=with_system(question.sample, prompt)) for question in drawn]
        splits[level] = answerable(Split(learn=drawn[samples:], test=drawn[:samples]))
    return Asked(splits, {}, {})


def row_questions(
    samples: Iterable[Sample],
    levels: Mapping[str, Level],
    rule: ChoiceRule,
    wording: Callable[[Sample], str],
    wanted: int,
) -> Asked:
    """The levels of held-out rows.

    A row's level is its `meta.level`, else that of its task in `levels`. Its answers to choose from are those of
    `rule`, else the different answers to the same wording, where there are at least ROWS_PER_ANSWER rows for each.
    wording: the question of a sample as text; wanted: test questions of a level. Rows that cannot be used are counted.
    Raises VlmtuneError naming a sample whose level is none, and as `ChoiceRule.choices`.
    """
    left_out: Counter[str] = Counter()
    usable: list[tuple[Level, Sample]] = []
    for sample in samples:
        level = sample.meta.get("level", levels.get(sample.task))
        if level is not None and level not in LEVELS:
            raise VlmtuneError(
                f"{sample.origin} (sample {sample.id}): meta.level is {str(level)[:40]!r}; write one of "
                f"{', '.join(LEVELS)}."
            )
        if level is None:
            left_out["without a level"] += 1
        elif len(sample.images) != 1:
            left_out["not with exactly one image"] += 1
        elif sample.turns[-1].role != "assistant" or not all(isinstance(p, Text) for p in sample.turns[-1].parts):
            left_out["without a reply of words alone"] += 1
        else:
            usable.append((level, sample))
    closed = _closed_sets([(wording(sample), true_answer(sample)) for _, sample in usable])
    found: dict[Level, list[LevelQuestion]] = {level: [] for level in LEVELS}
    for level, sample in usable:
        asked = wording(sample)
        labels = tuple(rule.choices(sample)) or closed.get(asked, ())
        if labels:
            found[level].append(LevelQuestion(level, sample, asked, true_answer(sample), labels))
        else:
            left_out["without a closed set of answers"] += 1
    splits, too_few = {}, {}
    for level, questions in found.items():
        whole = split_by_image(questions, wanted)
        split = answerable(whole)
        if len(split.test) >= FEWEST:
            splits[level] = split
            if rare := len(whole.test) - len(split.test):
                left_out["asked too rarely for a probe to learn it"] += rare
        else:
            too_few[level] = _why(questions, split)
    return Asked(splits, too_few, dict(left_out))


def split_by_image(questions: Sequence[LevelQuestion], wanted: int) -> Split:
    """At most `wanted` test questions, and LEARN_PER_TEST times as many to learn from; all about an image on one side.

    Images are taken in the order of the digests of their files, which has nothing to do with that of the rows.
    """
    by_image: dict[str, list[LevelQuestion]] = {}
    for question in questions:
        by_image.setdefault(_image_digest(question.sample), []).append(question)
    wanted = min(wanted, len(questions) // (1 + LEARN_PER_TEST))
    learn: list[LevelQuestion] = []
    test: list[LevelQuestion] = []
    for digest in sorted(by_image):
        side, room = (test, wanted - len(test)) if len(test) < wanted else (learn, LEARN_PER_TEST * wanted - len(learn))
        side += by_image[digest][: max(0, room)]
    return Split(learn, test)


def _closed_sets(rows: Sequence[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """rows: (wording, answer) -> wording -> its answers."""
    answers: dict[str, Counter[str]] = {}
    for wording, answer in rows:
        answers.setdefault(wording, Counter())[answer] += 1
    return {
        wording: tuple(sorted(found))
        for wording, found in answers.items()
        if len(found) > 1 and found.total() >= ROWS_PER_ANSWER * len(found)
    }


def _image_digest(sample: Sample) -> str:
    source = sample.images[0].source
    return hashlib.sha256(source.read_bytes() if isinstance(source, Path) else source).hexdigest()


def _why(questions: Sequence[LevelQuestion], split: Split) -> str:
    needed = FEWEST * (1 + LEARN_PER_TEST)
    if len(questions) < needed:
        return f"{len(questions)} questions with a closed set of answers; at least {needed} are needed"
    return f"only {len(split.test)} test questions are asked often enough for a probe; at least {FEWEST} are needed"
