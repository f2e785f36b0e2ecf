"""How long every sample is, and what the context window does to it: decided before training (SPEC A6, G1, G2).

Nothing is decoded: image sizes come from file headers. Only where pixels decide (data.complexity) is every image
decoded, and only where bad rows are to be left out (data.on_bad_row: drop) is every row encoded as well, because
otherwise training would meet them. The result is kept in the cache under the content of the data file and everything
that changes a length, so a resumed run, and the next one, do not count again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlmtune.data.check import RowCheck
from vlmtune.data.encode import Encoder
from vlmtune.data.index import keep_rows, kept_rows
from vlmtune.data.loader import start_worker
from vlmtune.data.sources import SampleSource
from vlmtune.data.window import Fitted, Window
from vlmtune.types import Sample, VlmtuneError

OnOverlong = Literal["error", "trim", "drop"]
CHUNK = 32  # rows that a worker counts between two reports
EXAMPLES = 3  # samples that a complaint names


@dataclass(frozen=True)
class Overlong:
    """One sample above the limit. actions: what trimming does to it, in order; the last may be "dropped"."""

    row: int
    id: str
    origin: str
    tokens: int
    left: int
    actions: tuple[str, ...]
    details: tuple[str, ...]

    @property
    def is_dropped(self) -> bool:
        return self.actions[-1] == "dropped"

    @classmethod
    def of(cls, row: int, sample: Sample, fitted: Fitted) -> Overlong:
        changes = fitted.changes
        return cls(
            row, sample.id, sample.origin, changes[0].tokens[0], changes[-1].tokens[1],
            tuple(change.action for change in changes), tuple(change.detail for change in changes),
        )  # fmt: skip


@dataclass(frozen=True)
class BadRow:
    """One row that training could not use. id: None where not even that could be read; code: of `check.CODES`."""

    row: int
    id: str | None
    origin: str
    code: str
    sentence: str


@dataclass(frozen=True)
class Survey:
    """tokens: int32[rows], before any change, 0 for bad rows; overlong: the samples above the limit; bad: rows that
    cannot be used (looked for with data.on_bad_row: drop alone). Both in the order of rows."""

    tokens: np.ndarray
    overlong: tuple[Overlong, ...]
    bad: tuple[BadRow, ...] = ()

    @property
    def lengths(self) -> np.ndarray:
        """int32[rows that can be used]: tokens of each, before any change."""
        return np.delete(self.tokens, [bad.row for bad in self.bad])

    def bad_sentence(self) -> str:
        """What stands in the log: "2 of 1,204 rows cannot be used and are left out (image_missing 2); first: …"."""
        codes = ", ".join(f"{code} {n:,}" for code, n in Counter(bad.code for bad in self.bad).most_common())
        return (
            f"{len(self.bad):,} of {len(self.tokens):,} rows cannot be used and are left out ({codes}); "
            f"first: {self.bad[0].sentence}"
        )

    def sentence(self, max_length: int | None) -> str:
        """What stands in the log: "3 of 1,204 samples exceed 2,048 tokens (longest 3,011): …"."""
        size, count = len(self.tokens) - len(self.bad), len(self.overlong)
        longest = int(self.tokens.max(initial=0))
        if max_length is None:
            return f"no limit of length (longest {longest:,} tokens of {size:,} samples)"
        if not count:
            return f"no sample exceeds {max_length:,} tokens (longest {longest:,} of {size:,})"
        actions = Counter("dropped" if o.is_dropped else " + ".join(o.actions) for o in self.overlong)
        names = {
            "turns": "oldest turns dropped",
            "images": "images shrunk",
            "reply": "reply cut",
            "dropped": "dropped whole",
        }
        outcome = ", ".join(
            f"{' and '.join(names[part] for part in action.split(' + '))} ({number:,})"
            for action, number in actions.most_common()
        )
        return f"{count:,} of {size:,} samples exceed {max_length:,} tokens (longest {longest:,}); trimming: {outcome}"


class FittedSource:
    """A source without its bad rows and after the context window: rows that stay, brought to the limit where they were
    above it. window: None without a limit.

    VlmtuneError at a sample that fitted when it was counted and does not any more: its images changed meanwhile.
    """

    def __init__(
        self, source: SampleSource, survey: Survey, encoder: Encoder, window: Window | None, on_overlong: OnOverlong
    ):
        self._source, self._encoder, self._window = source, encoder, window
        gone = {bad.row for bad in survey.bad}
        self._trimmed: set[int] = set()
        if on_overlong != "error":
            gone |= {o.row for o in survey.overlong if on_overlong == "drop" or o.is_dropped}
            self._trimmed = {o.row for o in survey.overlong} - gone
        self._rows = np.setdiff1d(np.arange(len(survey.tokens)), sorted(gone)) if gone else None
        self.name = source.name
        self.size = len(survey.tokens) - len(gone)
        if self.size == 0:
            raise VlmtuneError(_nothing_left(source.name, survey, window))

    @property
    def format(self) -> str:
        return self._source.format

    @property
    def identity(self) -> None:
        return None

    def __getitem__(self, index: int) -> Sample:
        return self.fitted(index).sample

    def tasks(self) -> list[str]:
        rows = range(self.size) if self._rows is None else self._rows
        return [self._source[int(row)].task for row in rows]

    def row_of(self, index: int) -> int:
        """In the source before rows were left out."""
        return index if self._rows is None else int(self._rows[index])

    def index_of(self, row: int) -> int | None:
        """Of a row of the source; None where it was left out."""
        if self._rows is None:
            return row
        index = int(np.searchsorted(self._rows, row))
        return index if index < self.size and self._rows[index] == row else None

    def fitted(self, index: int) -> Fitted:
        """The sample and what was done to it."""
        row = self.row_of(index)
        sample = self._source[row]
        if row not in self._trimmed:
            return Fitted(sample)
        fitted = fit(sample, self._encoder, self._window)
        if fitted.sample is None:
            raise VlmtuneError(
                f"{sample.origin} (sample {sample.id}): it could be trimmed to {self._window.max_length} tokens when "
                "training began, and cannot any more: its images changed; start again."
            )
        return fitted


def fitted_sample(source: SampleSource, index: int) -> Fitted:
    """A sample of any source, and what the context window did to it."""
    return source.fitted(index) if isinstance(source, FittedSource) else Fitted(source[index])


def row_tokens(source: SampleSource, survey: Survey) -> Callable[[int], int]:
    """Index into `source` -> tokens of that sample, before the window shortened it.

    survey: of the source, before it was fitted.
    """
    return lambda index: int(survey.tokens[source.row_of(index) if isinstance(source, FittedSource) else index])


def longest_rows(source: SampleSource, survey: Survey, count: int) -> list[int]:
    """Indices into `source` of the samples with the most tokens before the context window, those left out passed over.

    survey: of the source, before it was fitted.
    """
    longest: list[int] = []
    for row in np.argsort(-survey.tokens, kind="stable"):
        index = source.index_of(int(row)) if isinstance(source, FittedSource) else int(row)
        if index is not None:
            longest.append(index)
        if len(longest) == count:
            break
    return longest


def fit(sample: Sample, encoder: Encoder, window: Window) -> Fitted:
    return window.fit(sample, encoder.count, encoder.pictures.pixel_range)


def survey_source(
    source: SampleSource,
    encoder: Encoder,
    window: Window | None,
    cache: Path | None = None,
    workers: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
    drop_bad: bool = False,
) -> Survey:
    """Count every row of a finite source. window: None without a limit; cache: folder of surveys; progress: is told how
    many rows are done; drop_bad: decode and encode every row of a file, and collect those that fail.

    Raises VlmtuneError for the first row that cannot be read, unless drop_bad.
    """
    key = None if cache is None or source.identity is None else _key(source, encoder, window, drop_bad)
    if key is not None and (kept := kept_rows(cache / key)) is not None:
        return _from_kept(*kept)
    tokens = np.zeros(source.size, dtype=np.int32)
    overlong: list[Overlong] = []
    bad: list[BadRow] = []
    check = RowCheck(source, source.name, encoder.without_limit()) if drop_bad else None
    for first, counts, found, unusable in _counted(_Chunks(source, encoder, window, check), workers):
        tokens[first : first + len(counts)] = counts
        overlong += found
        bad += unusable
        progress(first + len(counts))
    if key is not None and not bad:  # an image that was mended meanwhile must not stay left out
        keep_rows(cache / key, tokens, [asdict(o) for o in overlong])
    return Survey(tokens, tuple(overlong), tuple(bad))


def _from_kept(tokens: np.ndarray, rows: list[dict]) -> Survey:
    fields = [row | {"actions": tuple(row["actions"]), "details": tuple(row["details"])} for row in rows]
    return Survey(tokens, tuple(Overlong(**row) for row in fields))


_Chunk = tuple[int, list[int], list[Overlong], list[BadRow]]
"""First row, tokens of CHUNK rows, those above the limit, those that cannot be used."""


def _counted(chunks: _Chunks, workers: int) -> Iterator[_Chunk]:
    loader = DataLoader(
        chunks,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=start_worker,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # its own: what was counted before must not move the training RNG
    )
    for chunk in loader:
        if isinstance(chunk, VlmtuneError):
            raise chunk
        yield chunk


@dataclass(frozen=True)
class _Chunks(Dataset):
    """`chunks[n]`: a chunk of rows, or the error that one of them is. check: collects errors instead."""

    source: SampleSource
    encoder: Encoder
    window: Window | None
    check: RowCheck | None

    def __len__(self) -> int:
        return -(-self.source.size // CHUNK)

    def __getitem__(self, number: int) -> _Chunk | VlmtuneError:
        first = number * CHUNK
        counts: list[int] = []
        found: list[Overlong] = []
        unusable: list[BadRow] = []
        try:
            for row in range(first, min(first + CHUNK, self.source.size)):
                bad, tokens = self._count(row)
                unusable += [bad] if bad else []
                counts.append(tokens)
                if self.window is not None and tokens > self.window.max_length:
                    sample = self.source[row]
                    found.append(Overlong.of(row, sample, fit(sample, self.encoder, self.window)))
        except VlmtuneError as error:
            return error
        return first, counts, found, unusable

    def _count(self, row: int) -> tuple[BadRow | None, int]:
        if self.check is None:
            return None, self.encoder.count(self.source[row])
        checked = self.check(row)
        wrong = next((finding for finding in checked.findings if finding.severity == "error"), None)
        if wrong is not None:
            return BadRow(row, wrong.id, wrong.origin, wrong.code, wrong.sentence), 0
        return None, checked.tokens


def _nothing_left(name: str, survey: Survey, window: Window | None) -> str:
    if len(survey.bad) == len(survey.tokens):
        return (
            f"{name}: no row can be used (first: {survey.bad[0].sentence.rstrip('.')}); vlmtune check-data lists all."
        )
    rest = "every sample" if not survey.bad else f"every sample that can be used ({len(survey.lengths):,})"
    return f"{name}: {rest} exceeds data.max_length {window.max_length} and would be left out; raise it."


def _key(source: SampleSource, encoder: Encoder, window: Window | None, decoded: bool) -> str:
    limits = [None, None] if window is None else [window.max_length, window.reply_reserve]
    parts = [source.identity, source.size, encoder.identity, *limits, decoded]
    return "lengths-" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def refuse_overlong(surveys: Sequence[tuple[str, Survey]], max_length: int) -> None:
    """Raise VlmtuneError if any sample is above the limit: how many, what would be done to them, and which ones."""
    above = [(name, survey) for name, survey in surveys if survey.overlong]
    if not above:
        return
    examples = [o for _, survey in above for o in survey.overlong][:EXAMPLES]
    named = "; ".join(f"{o.origin} (sample {o.id}): {o.tokens:,} tokens" for o in examples)
    raise VlmtuneError(
        " ".join(f"{name}: {survey.sentence(max_length)}." for name, survey in above)
        + f" First: {named}. Raise data.max_length, or set data.on_overlong to trim or drop."
    )


def change_records(name: str, survey: Survey, on_overlong: OnOverlong) -> tuple[list[dict], list[dict]]:
    """Rows of dropped.jsonl and of changed.jsonl for one source."""
    dropped: list[dict] = [
        {"source": name, "id": bad.id, "origin": bad.origin, "tokens": None, "reason": bad.sentence}
        for bad in survey.bad
    ]
    changed: list[dict] = []
    for o in survey.overlong if on_overlong != "error" else ():
        whole = {"source": name, "id": o.id, "origin": o.origin, "tokens": o.tokens}
        if on_overlong == "drop" or o.is_dropped:
            why = o.details[-1] if o.is_dropped and on_overlong == "trim" else "longer than data.max_length"
            dropped.append(whole | {"reason": why})
        else:
            done = [{"action": a, "detail": d} for a, d in zip(o.actions, o.details, strict=True)]
            changed.append(whole | {"tokens_left": o.left, "changes": done})
    return dropped, changed
