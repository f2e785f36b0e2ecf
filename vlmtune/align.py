"""`vlmtune align`: the alignment matrix of a run, before and after training (SPEC A7)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from vlmtune.build import best_device, build_eval_groups, fit_data
from vlmtune.check import finding_line
from vlmtune.checks.alignment import reading, shown
from vlmtune.config import Config, load_config
from vlmtune.data.atlas import ConceptGroup
from vlmtune.data.levels import LEVELS, LevelQuestion
from vlmtune.data.prompts import system_prompt
from vlmtune.data.questions import Level
from vlmtune.evaluate.alignment import (
    ROWS,
    Split,
    answer_in,
    features_of,
    language_answers,
    prior_answers,
    probe_answers,
    right,
)
from vlmtune.evaluate.choices import ChoiceRule
from vlmtune.evaluate.level_questions import FEWEST, Asked, row_questions, scene_questions
from vlmtune.evaluate.proportions import accuracy, difference
from vlmtune.models.features import STAGES, Stage, stage_digest
from vlmtune.models.quantise import place
from vlmtune.observe.alignment_page import write_alignment_page
from vlmtune.observe.log import CountingBar
from vlmtune.observe.page import write_page
from vlmtune.optim.precision import autocast
from vlmtune.paths import require_folder, require_run, write_text
from vlmtune.samples import question_text
from vlmtune.sealed import finite, stage_folders
from vlmtune.types import Finding, Sample, VlmtuneError
from vlmtune.use import Loaded, find_checkpoint, last_stage, load_run

On = Literal["scenes", "data"]
PICTURES = 3  # of each level, where vision knows and language does not say


@dataclass(frozen=True)
class Model:
    """What one model answered. answers: level -> row -> one per test question; digests: of its tower and projector."""

    answers: dict[Level, dict[str, list[str]]]
    digests: dict[Stage, str]


@dataclass(frozen=True)
class Matrix:
    """The outcome. frozen: stages that are the same before and after, bit for bit."""

    asked: Asked
    priors: dict[Level, list[str]]
    before: Model
    after: Model
    frozen: list[Stage]
    findings: dict[Level, list[Finding]]

    def right(self, model: Model, level: Level, row: str) -> list[bool]:
        return right(model.answers[level][row], self.asked.splits[level].test)


def align(
    run: Path,
    console: Console,
    on: On = "scenes",
    concepts: ConceptGroup | None = None,
    levels: Sequence[str] = (),
    samples: int = 100,
    checkpoint: str = "latest",
    as_json: bool = False,
) -> Matrix:
    """Measure, print, and write align.json and align.html into the run folder; of a chain, from the first stage's base
    to the last stage.

    on: ask about the embedded scenes (of `concepts`, default new), or rows of data.eval. levels: "task=level" for rows
    without meta.level. samples: test questions of each level; three times as many to learn from. Raises VlmtuneError
    for options that do not belong together, and data of which no level can be measured.
    """
    of_tasks = _levels_of_tasks(levels, on)
    if concepts is not None and on == "data":
        raise VlmtuneError("--concepts is about the embedded scenes; leave it out, or add --on scenes.")
    concepts = concepts or "new"
    if samples < FEWEST:
        raise VlmtuneError(f"--samples {samples}: at least {FEWEST} of each level, else no interval says anything.")
    stage = last_stage(run)
    require_run(stage)
    find_checkpoint(run, checkpoint)  # refused before anything is measured
    require_folder(run, "run folder", "make it writable")
    config = load_config(str(stage / "config.yaml"))
    said = Console(quiet=True) if as_json else console

    first = load_run(stage_folders(run)[0] if (run / "stages.json").is_file() else run, "base")
    asked = _ask(config, first, on, concepts, of_tasks, samples, said)
    priors = {level: prior_answers(split) for level, split in asked.splits.items()}
    before = _answers_of(first, asked, said, None)
    del first  # two models may not fit beside each other
    after = _answers_of(load_run(run, checkpoint), asked, said, before)
    frozen = [name for name in STAGES if before.digests[name] == after.digests[name]]
    matrix = Matrix(asked, priors, before, after, frozen, _findings(asked, priors, before, after))

    record = as_record(matrix, run, checkpoint, on if on == "data" else f"scenes of {concepts} concepts")
    write_text(run / "align.json", json.dumps(finite(record), indent=1))
    page = write_alignment_page(run / "align.html", record, pictures(matrix))
    write_page(run)  # it shows the matrix too
    if as_json:
        print(json.dumps(finite(record), indent=1))
    said.print(matrix_table(matrix))
    for line in lines(matrix):
        said.print(line, highlight=False, soft_wrap=True)
    said.print(f"page: {page}", highlight=False, markup=False, soft_wrap=True)
    return matrix


def _levels_of_tasks(wishes: Sequence[str], on: On) -> dict[str, Level]:
    if wishes and on == "scenes":
        raise VlmtuneError("--level is about rows of your own, and scenes have their levels; add --on data.")
    found = {}
    for wish in wishes:
        task, sign, level = wish.partition("=")
        if not (task and sign) or level not in LEVELS:
            raise VlmtuneError(f"--level {wish}: write task=level, the level one of {', '.join(LEVELS)}.")
        found[task] = level
    return found


def _ask(
    config: Config,
    loaded: Loaded,
    on: On,
    concepts: ConceptGroup,
    levels: Mapping[str, Level],
    samples: int,
    console: Console,
) -> Asked:
    if on == "scenes":
        prompt = None if config.data.system is None else system_prompt(config.data.system)
        return scene_questions(concepts, samples, prompt)
    groups = build_eval_groups(config)
    if not groups:
        raise VlmtuneError(f"{config.run}: its config has no data.eval, so there are no rows to ask about.")
    with CountingBar(console) as bar:
        groups = fit_data(config, loaded.encoder, [], groups, bar).groups
    rule = ChoiceRule(config.evaluate.choices, config.evaluate.alpha)
    asked = row_questions(_samples(groups), levels, rule, question_text, samples)
    if not asked.splits:
        reasons = [*asked.left_out.items()] or [("in data.eval", 0)]
        counted = "; ".join(f"{count} rows {reason}" for reason, count in reasons)
        short = "; ".join(f"{level}: {why}" for level, why in asked.too_few.items())
        raise VlmtuneError(
            f"no level can be measured on data.eval ({short}; left out: {counted}); give rows meta.level and "
            "meta.choices, or use --on scenes."
        )
    return asked


def _samples(groups: Mapping[str, Sequence[Any]]) -> Iterator[Sample]:
    for sources in groups.values():
        for source in sources:
            for index in range(source.size):
                yield source[index]


def _answers_of(loaded: Loaded, asked: Asked, console: Console, known: Model | None) -> Model:
    """known: of another model; probes on a part that is the same are not fitted again."""
    model, encoder, wish = loaded.model, loaded.encoder, loaded.config.evaluate
    place(model, best_device())
    digests = {stage: stage_digest(model, stage) for stage in STAGES}
    changed = [stage for stage in STAGES if known is None or known.digests[stage] != digests[stage]]
    answers: dict[Level, dict[str, list[str]]] = {}
    with CountingBar(console, "looking at") as bar, autocast(loaded.precision, model.device):
        for level, split in asked.splits.items():
            answers[level] = {stage: known.answers[level][stage] for stage in STAGES if stage not in changed}
            if changed:
                answers[level] |= _probed(model, encoder, split, changed, bar)
            answers[level] |= language_answers(
                model, encoder, split.test, wish.batch_size, wish.max_new_tokens, wish.alpha
            )
    return Model(answers, digests)


def _probed(
    model: torch.nn.Module, encoder, split: Split, stages: Sequence[Stage], progress: Callable[[str, int, int], None]
) -> dict[Stage, list[str]]:
    features: dict[Stage, list[Tensor]] = features_of(model, encoder, [*split.learn, *split.test], progress)
    count = len(split.learn)
    return {stage: probe_answers(split, features[stage][:count], features[stage][count:]) for stage in stages}


def _findings(asked: Asked, priors: Mapping[Level, list[str]], before: Model, after: Model) -> dict[Level, list]:
    found = {}
    for level, split in asked.splits.items():
        rows = [{row: right(model.answers[level][row], split.test) for row in ROWS} for model in (before, after)]
        off = _unlisted(after.answers[level]["generated"], split.test)
        found[level] = reading(level, right(priors[level], split.test), *rows, off)
    return found


def _unlisted(replies: Sequence[str], test: Sequence[LevelQuestion]) -> int:
    """Replies that are none of the answers."""
    return sum(answer_in(reply, question.labels) is None for reply, question in zip(replies, test, strict=True))


# ---- what it looks like ----------------------------------------------------------------------------------------------


def matrix_table(matrix: Matrix) -> Table:
    """Rows of the matrix by level, "before → after" with the interval of the later."""
    table = Table(title="right answers, before → after [95 % interval]", title_justify="left")
    table.add_column("")
    for level in matrix.asked.splits:
        table.add_column(level, justify="right")
    for row in ROWS:
        cells = []
        for level in matrix.asked.splits:
            was, now = (matrix.right(model, level, row) for model in (matrix.before, matrix.after))
            cells.append(shown(now) if row in matrix.frozen else f"{shown(was).split()[0]} → {shown(now)}")
        table.add_row(f"{row} (frozen: the same)" if row in matrix.frozen else row, *map(escape, cells))
    table.add_section()
    splits = matrix.asked.splits.items()
    without = [shown(right(matrix.priors[level], split.test)).split()[0] for level, split in splits]
    table.add_row("without looking", *without)
    table.add_row("questions", *(f"{len(split.test)} (probes: {len(split.learn)})" for _, split in splits))
    return table


def lines(matrix: Matrix) -> Iterator[str]:
    """Findings, then what could not be measured, in rich's markup."""
    for findings in matrix.findings.values():
        yield from map(finding_line, findings)
    for level, why in matrix.asked.too_few.items():
        yield escape(f"{level}: not measured: {why}")
    for reason, count in matrix.asked.left_out.items():
        yield escape(f"left out: {count} rows {reason}")


def as_record(matrix: Matrix, run: Path, checkpoint: str, on: str) -> dict[str, Any]:
    """For align.json: JSON values."""
    return {
        "run": str(run),
        "checkpoint": checkpoint,
        "on": on,
        "frozen": list(matrix.frozen),
        "levels": {level: _level_record(matrix, level) for level in matrix.asked.splits},
        "findings": [
            {"matrix_level": level, **asdict(finding)} for level, found in matrix.findings.items() for finding in found
        ],
        "too_few": matrix.asked.too_few,
        "left_out": matrix.asked.left_out,
    }


def _level_record(matrix: Matrix, level: Level) -> dict[str, Any]:
    split = matrix.asked.splits[level]
    models = {"before": matrix.before, "after": matrix.after}
    rows = {}
    for row in ROWS:
        was, now = (matrix.right(model, level, row) for model in models.values())
        rows[row] = {
            "before": asdict(accuracy(was)), "after": asdict(accuracy(now)), "change": asdict(difference(now, was))
        }  # fmt: skip
    return {
        "test": len(split.test),
        "learn": len(split.learn),
        "without_looking": asdict(accuracy(right(matrix.priors[level], split.test))),
        "rows": rows,
        "unlisted": {
            moment: _unlisted(model.answers[level]["generated"], split.test) for moment, model in models.items()
        },
        "questions": _by_question(matrix, level, split),
    }


def _by_question(matrix: Matrix, level: Level, split: Split) -> list[dict[str, Any]]:
    """The same figures for each wording, those asked most often first."""
    learned = Counter(question.question for question in split.learn)
    asked = Counter(question.question for question in split.test)
    found = []
    for wording, count in asked.most_common():
        at = [n for n, question in enumerate(split.test) if question.question == wording]

        def share(answers: Sequence[str], at: Sequence[int] = at) -> float:
            return sum(right([answers[n] for n in at], [split.test[n] for n in at])) / len(at)

        found.append(
            {
                "question": wording,
                "answers": max(len(split.test[n].labels) for n in at),
                "test": count,
                "learn": learned[wording],
                "without_looking": share(matrix.priors[level]),
                "before": {row: share(matrix.before.answers[level][row]) for row in ROWS},
                "after": {row: share(matrix.after.answers[level][row]) for row in ROWS},
            }
        )
    return found


def pictures(matrix: Matrix) -> list[dict[str, Any]]:
    """Of each level the first images that the tower's probe names rightly and the trained model does not; where there
    are fewer than PICTURES, others that training has changed."""
    chosen = []
    for level, split in matrix.asked.splits.items():
        seen, said = (matrix.right(matrix.after, level, row) for row in ("vision", "generated"))
        was = matrix.right(matrix.before, level, "generated")
        gaps = [n for n in range(len(seen)) if seen[n] and not said[n]]
        others = [n for n in range(len(seen)) if was[n] != said[n] and n not in gaps]
        chosen += [_picture(matrix, level, split.test[n], n) for n in [*gaps, *others][:PICTURES]]
    return chosen


def _picture(matrix: Matrix, level: Level, question: LevelQuestion, at: int) -> dict[str, Any]:
    return {
        "level": level,
        "image": question.sample.images[0].source,
        "origin": question.sample.origin,
        "boxes": [] if question.region is None else list(question.region.boxes),
        "question": question.question,
        "answer": question.answer,
        "vision": matrix.after.answers[level]["vision"][at],
        "before": matrix.before.answers[level]["generated"][at],
        "after": matrix.after.answers[level]["generated"][at],
    }
