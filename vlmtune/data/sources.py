"""What the mixture draws from: a source is indexable and pure, `source[i]` is the same sample in any process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from vlmtune.data.atlas import atlas
from vlmtune.data.files import open_reader
from vlmtune.data.negatives import objects_of
from vlmtune.data.prompts import SystemPrompt
from vlmtune.data.rows import Row, format_of, parse_row
from vlmtune.data.scenes import SceneRecipe
from vlmtune.types import Sample, Text, Turn, VlmtuneError

LOOKED_AT = 64  # rows that a limit leaves out


class SampleSource(Protocol):
    """`size` is None for a source without end. `format` says what it reads, for people.

    identity: a text that other contents do not have; None where there is no telling, or no need to.
    """

    name: str
    size: int | None

    @property
    def identity(self) -> str | None: ...

    @property
    def format(self) -> str: ...

    def __getitem__(self, index: int) -> Sample: ...

    def tasks(self) -> list[str]:
        """The task of every sample; of a source without end, its one task once. Reads every row."""


class SceneSource:
    """Generated scenes of one task. Index i is scene `start` + i: every epoch of training draws fresh ones.

    `turns`: up to so many questions about each scene.
    """

    def __init__(self, concepts: str, task: str, split: str, limit: int | None = None, turns: int = 1, start: int = 0):
        self.name = f"scenes/{concepts}/{task}/{split}"
        self.size = limit
        self._task, self._split, self._turns, self._start = task, split, turns, start
        self._recipe = SceneRecipe(concepts)

    @property
    def identity(self) -> None:
        return None

    @property
    def format(self) -> str:
        return "generated scenes" + ("" if self.size is None else f", {self.size:,} of them")

    def __getitem__(self, index: int) -> Sample:
        return self._recipe.sample(self._task, self._start + index, self._split, self._turns)

    def tasks(self) -> list[str]:
        return [self._task] * (self.size or 1)

    def names(self) -> dict[str, str]:
        """Name -> kind of everything these scenes are made of."""
        return {name: atlas()[name].kind for name in self._recipe.names}


class PromptedSource:
    """A source whose conversations begin with a system prompt, unless they have a system turn of their own."""

    def __init__(self, source: SampleSource, prompt: SystemPrompt):
        self._source, self._prompt = source, prompt
        self.name, self.size = source.name, source.size

    @property
    def identity(self) -> str | None:
        return None if self._source.identity is None else f"{self._source.identity} {self._prompt.text}"

    @property
    def format(self) -> str:
        return f"{self._source.format}, system prompt {self._prompt.name}"

    def __getitem__(self, index: int) -> Sample:
        return with_system(self._source[index], self._prompt)

    def tasks(self) -> list[str]:
        return self._source.tasks()

    def tasks_left_out(self) -> list[str]:
        return self._source.tasks_left_out()

    def row(self, index: int) -> Row:
        return self._source.row(index)

    def parse(self, row: Row) -> Sample:
        return with_system(self._source.parse(row), self._prompt)


def with_system(sample: Sample, prompt: SystemPrompt) -> Sample:
    """The sample with this system turn, unless it begins with one of its own."""
    if sample.turns[0].role == "system":
        return sample
    return replace(sample, turns=(Turn("system", (Text(prompt.text),)), *sample.turns))


class FileSource:
    """Rows of a file, a folder or a hub data set (`hub:owner/name`) as samples; how: `vlmtune.data.files`.

    image_root: where relative image paths start (default: the folder of the file); task: for rows without one; split:
    of a folder or hub data set that has several; cache: folder of the indexes (None: not kept).
    """

    def __init__(
        self,
        path: Path | str,
        image_root: Path | None = None,
        task: str | None = None,
        limit: int | None = None,
        split: str = "train",
        cache: Path | None = None,
    ):
        self._reader = open_reader(path, split, cache)
        self.name = self._reader.name
        folder = self._reader.folder if image_root is None else image_root
        self._roots = [] if folder is None else [folder]
        self._task = task or "default"
        self.size = min(self._reader.size, limit) if limit else self._reader.size

    @property
    def identity(self) -> str:
        return f"{self._reader.identity} {self._roots}"

    @property
    def format(self) -> str:
        """ "OpenAI messages, JSONL, 1,204 rows". The conversation format is that of the first row, if it has one."""
        rows = f"{self._reader.size:,} rows" + (
            f", the first {self.size:,} used" if self.size < self._reader.size else ""
        )
        try:
            conversations = format_of(self._reader.row(0))
        except VlmtuneError:  # whoever reads the row hears of it; a name for the log is not the place
            conversations = "first row unreadable"
        return f"{conversations}, {self._reader.container}, {rows}"

    def row(self, index: int) -> Row:
        """The row as the file holds it. Raises VlmtuneError where it is not even that."""
        return self._reader.row(index)

    def parse(self, row: Row) -> Sample:
        return parse_row(row, self._roots, self._task)

    def __getitem__(self, index: int) -> Sample:
        return self.parse(self.row(index))

    def tasks(self) -> list[str]:
        return [self[index].task for index in range(self.size)]

    def tasks_left_out(self) -> list[str]:
        """The tasks of some rows behind the limit, evenly spread; those that cannot be read are nobody's."""
        behind = self._reader.size - self.size
        looked_at = min(behind, LOOKED_AT)
        found = []
        for number in range(looked_at):
            try:
                found.append(self[self.size + number * behind // looked_at].task)
            except VlmtuneError:
                continue
        return found

    def names(self) -> dict[str, str]:
        """Name -> kind of all objects that rows tell of in `meta.objects`. Reads every row."""
        found: dict[str, str] = {}
        for index in range(self.size):
            try:
                found |= {thing.name: thing.kind for thing in objects_of(self[index])}
            except VlmtuneError:  # whoever uses the row hears of it; on_bad_row says whether that ends the run
                continue
        return found
