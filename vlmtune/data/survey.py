"""How long every sample is, and what the context window does to it: decided before training (SPEC A6, G1, G2).

Nothing is decoded: image sizes come from file headers. The result is kept in the cache under the content of the data
file and everything that changes a length, so a resumed run, and the next one, do not count again.
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
from torch.utils.data import DataLoader, Dataset

from vlmtune.data.encode import Encoder
from vlmtune.data.index import keep_rows, kept_rows
from vlmtune.data.loader import one_thread
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
class Survey:
    """tokens: int32[rows], before any change; overlong: the samples above the limit, in the order of rows."""

    tokens: np.ndarray
    overlong: tuple[Overlong, ...]

    def sentence(self, max_length: int) -> str:
        """What stands in the log: "3 of 1,204 samples exceed 2,048 tokens (longest 3,011): …"."""
        size, count = len(self.tokens), len(self.overlong)
        longest = int(self.tokens.max(initial=0))
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
    """A source after the context window: rows that stay, brought to the limit where they were above it.

    VlmtuneError at a sample that fitted when it was counted and does not any more: its images changed meanwhile.
    """

    def __init__(self, source: SampleSource, survey: Survey, encoder: Encoder, window: Window, on_overlong: OnOverlong):
        self._source, self._encoder, self._window = source, encoder, window
        gone = {o.row for o in survey.overlong if on_overlong == "drop" or o.is_dropped}
        self._trimmed = {o.row for o in survey.overlong} - gone
        self._rows = np.setdiff1d(np.arange(len(survey.tokens)), sorted(gone)) if gone else None
        self.name = source.name
        self.size = len(survey.tokens) - len(gone)
        if self.size == 0:
            raise VlmtuneError(
                f"{source.name}: every sample exceeds data.max_length {window.max_length} and would be left out; raise "
                "it."
            )

    @property
    def format(self) -> str:
        return self._source.format

    @property
    def identity(self) -> None:
        return None

    def __getitem__(self, index: int) -> Sample:
        return self.fitted(index).sample

    def fitted(self, index: int) -> Fitted:
        """The sample and what was done to it."""
        row = index if self._rows is None else int(self._rows[index])
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


def fit(sample: Sample, encoder: Encoder, window: Window) -> Fitted:
    return window.fit(sample, encoder.count, encoder.pictures.pixel_range)


def survey_source(
    source: SampleSource,
    encoder: Encoder,
    window: Window,
    cache: Path | None = None,
    workers: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
) -> Survey:
    """Count every row of a finite source. cache: folder of surveys; progress: is told how many rows are done.

    Raises VlmtuneError for the first row that cannot be read.
    """
    key = None if cache is None or source.identity is None else _key(source, encoder, window)
    if key is not None and (kept := kept_rows(cache / key)) is not None:
        return _from_kept(*kept)
    tokens = np.zeros(source.size, dtype=np.int32)
    overlong: list[Overlong] = []
    for first, counts, found in _counted(source, encoder, window, workers):
        tokens[first : first + len(counts)] = counts
        overlong += found
        progress(first + len(counts))
    if key is not None:
        keep_rows(cache / key, tokens, [asdict(o) for o in overlong])
    return Survey(tokens, tuple(overlong))


def _from_kept(tokens: np.ndarray, rows: list[dict]) -> Survey:
    fields = [row | {"actions": tuple(row["actions"]), "details": tuple(row["details"])} for row in rows]
    return Survey(tokens, tuple(Overlong(**row) for row in fields))


def _counted(
    source: SampleSource, encoder: Encoder, window: Window, workers: int
) -> Iterator[tuple[int, list[int], list[Overlong]]]:
    loader = DataLoader(
        _Chunks(source, encoder, window),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=one_thread,
        multiprocessing_context="fork" if workers else None,
    )
    for chunk in loader:
        if isinstance(chunk, VlmtuneError):
            raise chunk
        yield chunk


@dataclass(frozen=True)
class _Chunks(Dataset):
    """`chunks[n]`: (first row, tokens of CHUNK rows, those above the limit), or the error that one of them is."""

    source: SampleSource
    encoder: Encoder
    window: Window

    def __len__(self) -> int:
        return -(-self.source.size // CHUNK)

    def __getitem__(self, number: int) -> tuple[int, list[int], list[Overlong]] | VlmtuneError:
        first = number * CHUNK
        counts: list[int] = []
        found: list[Overlong] = []
        try:
            for row in range(first, min(first + CHUNK, self.source.size)):
                sample = self.source[row]
                counts.append(self.encoder.count(sample))
                if counts[-1] > self.window.max_length:
                    found.append(Overlong.of(row, sample, fit(sample, self.encoder, self.window)))
        except VlmtuneError as error:
            return error
        return first, counts, found


def _key(source: SampleSource, encoder: Encoder, window: Window) -> str:
    parts = [source.identity, source.size, encoder.identity, window.max_length, window.reply_reserve]
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
    dropped, changed = [], []
    for o in survey.overlong:
        whole = {"source": name, "id": o.id, "origin": o.origin, "tokens": o.tokens}
        if on_overlong == "drop" or o.is_dropped:
            why = o.details[-1] if o.is_dropped and on_overlong == "trim" else "longer than data.max_length"
            dropped.append(whole | {"reason": why})
        else:
            done = [{"action": a, "detail": d} for a, d in zip(o.actions, o.details, strict=True)]
            changed.append(whole | {"tokens_left": o.left, "changes": done})
    return dropped, changed
