"""`vlmtune check-data`: all that a training would read, read once, and a report of what is wrong with it (SPEC H1)."""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import numpy as np
from rich.console import Console

from vlmtune.build import Base, build_encoder, build_source, load_base, source_names
from vlmtune.config import Config
from vlmtune.data.check import CHUNK, CODES, RowCheck, RowFinding, check_rows
from vlmtune.data.duplicates import TRAIN, Duplicates, SplitSource
from vlmtune.data.encode import Encoder
from vlmtune.data.habits import Habit, Habits
from vlmtune.data.sources import SampleSource
from vlmtune.observe.data_report import (
    DataReport,
    SourceFigures,
    example_lines,
    findings_table,
    summary_record,
    write_data_report,
)
from vlmtune.observe.log import CountingBar
from vlmtune.types import VlmtuneError


def check_data(config: Config, console: Console, output: Path | None = None, workers: int | None = None) -> DataReport:
    """Check every row of every file of data.train and data.eval; print the outcome and write it to a folder.

    output: the folder (default: "<run>-data-check"); workers: processes (default: data.workers). The findings and their
    order do not depend on the number of workers. Raises VlmtuneError for what is no matter of a single row: a source
    that cannot be opened, a folder that cannot be written, a config without files.
    """
    folder = output or data_folder(config)
    if not has_files(config):
        raise VlmtuneError("check-data: every source of this config is generated scenes; there is no file to check.")
    report = examine_data(config, console, folder, workers)
    _print(report, folder / "report.html", console)
    return report


def data_folder(config: Config) -> Path:
    """Where the report goes by default."""
    return Path(f"{config.run}-data-check")


def has_files(config: Config) -> bool:
    return bool(split_sources(config)[0])


def examine_data(
    config: Config, console: Console, folder: Path, workers: int | None = None, base: Base | None = None
) -> DataReport:
    """`check_data` without its lines on the console: a bar is all. base: of the config, where it is loaded already."""
    workers = config.data.workers if workers is None else workers
    sources, skipped = split_sources(config)
    _make_folder(folder)
    base = base or load_base(config)
    encoder = build_encoder(base.processor, base.model, config.data).without_limit()

    report = DataReport(config.model, config.data.max_length, skipped=skipped, workers=workers)
    began = time.perf_counter()
    draft = folder / ".findings.jsonl.tmp"
    with draft.open("w", encoding="utf-8") as file, CountingBar(console, "checking") as bar:
        _check_sources(config, sources, encoder, report, file, bar)
    report.seconds = time.perf_counter() - began

    os.replace(draft, folder / "findings.jsonl")
    summary = json.dumps(summary_record(report), indent=1, ensure_ascii=False)
    (folder / "summary.json").write_text(summary, encoding="utf-8")
    write_data_report(folder / "report.html", report)
    return report


def split_sources(config: Config) -> tuple[list[SplitSource], list[str]]:
    """The file sources of data.train and then of data.eval, and the names of the generated ones."""
    train = [build_source(source, config.data) for source in config.data.train]
    found, skipped = [], []  # negatives are made of these rows: nothing new is read for them

    def add(members: Sequence[SampleSource], split: str, prefix: str) -> None:
        for source, name in zip(members, source_names(members), strict=True):
            if source.identity is not None:  # rows of a file, which can be read again
                found.append(SplitSource(source, prefix + name, split))
            else:
                skipped.append(prefix + name)

    add(train, TRAIN, "")
    for group, wishes in config.data.eval.items():
        add([build_source(source, config.data) for source in wishes], f"eval/{group}", f"{group}/")
    return found, skipped


def _check_sources(
    config: Config, sources: list[SplitSource], encoder: Encoder, report: DataReport, file: TextIO, bar: CountingBar
) -> None:
    """Fill the report, and write every finding as a line: row by row, and at the end what rows share."""
    duplicates = Duplicates(sources)

    def keep(finding: RowFinding) -> None:
        report.add(finding)
        file.write(json.dumps(asdict(finding), ensure_ascii=False) + "\n")

    for number, place in enumerate(sources):
        check = RowCheck(place.source, place.name, encoder, config.data.max_length, config.data.on_overlong == "error")
        tokens, sides, habits = array("i"), array("i"), Habits()
        for checked in check_rows(check, report.workers):
            for finding in checked.findings:
                keep(finding)
            duplicates.add(number, checked)
            if checked.traits is not None:
                habits.add(checked.row, checked.traits)
            if checked.tokens is not None:
                tokens.append(checked.tokens)
            for image in checked.images:
                sides.extend(image.size)
            done = checked.row + 1
            if done % CHUNK == 0 or done == place.source.size:
                bar(place.name, done, place.source.size)
        for habit in habits.findings(place.source.tasks_left_out()):
            keep(_of_source(habit, place))
        report.sources.append(
            SourceFigures(
                place.name, place.split, place.source.format, place.source.size,
                np.array(tokens, dtype=np.int32), np.array(sides, dtype=np.int32).reshape(-1, 2),
            )
        )  # fmt: skip
    for finding in duplicates.findings():
        keep(finding)


def _of_source(habit: Habit, place: SplitSource) -> RowFinding:
    """Of all its rows, with the first one as the example."""
    sample = place.source[habit.row]
    sentence = f"{place.name}: {habit.says}; for example {sample.origin} (sample {sample.id})."
    return RowFinding(habit.code, CODES[habit.code][0], place.name, habit.row, sample.origin, sample.id, sentence)


def _make_folder(folder: Path) -> None:
    """Before hours of checking."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VlmtuneError(f"{folder} cannot be made a folder ({error.strerror}); set --output.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise VlmtuneError(f"{folder} cannot be written; set --output.")


def _print(report: DataReport, page: Path, console: Console) -> None:
    if report.skipped:
        names = ", ".join(report.skipped)
        console.print(f"not checked, because generated: {names}", highlight=False, markup=False)
    if report.codes:
        console.print(findings_table(report))
        for line in example_lines(report):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{report.verdict()}; {report.samples_per_second:,.0f} samples/s; report: {page}", highlight=False, markup=False
    )
