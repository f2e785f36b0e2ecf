"""The table of docs/guide/catalogue.md: written here, and read back."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmtune.types import Finding

from .case import REFUSED, Case, Healthy, ask
from .workshop import Workshop

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "catalogue.md"
BEGIN, END = "<!-- recorded: begin -->", "<!-- recorded: end -->"
HEAD = "| case | what is wrong | command | said first | named |"
LONGEST = 170  # characters of what is said
KINDS = {"config": "Configs and models", "data": "Data", "run": "Runs"}


@dataclass(frozen=True)
class Entry:
    """A line of the table."""

    name: str
    wrong: str
    command: str
    said: str
    is_named: bool

    @property
    def line(self) -> str:
        named = "yes" if self.is_named else "no"
        return f"| `{self.name}` | {self.wrong} | `{self.command}` | {self.said} | {named} |"


def make(case: Case | Healthy, model: Path, folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """(folder, argument of the command) of a case made in a new folder below `folder`."""
    place = Path(tempfile.mkdtemp(prefix=f"{case.name}-", dir=folder))
    return place, case.build(Workshop(place, model, seed))


def measured(case: Case, model: Path, folder: Path) -> Entry:
    place, argument = make(case, model, folder)
    first = ask(case.command, argument).first
    return Entry(case.name, case.wrong, case.command, shown(first, place), case.names_it(first))


def shown(first: Finding | None, place: Path) -> str:
    if first is None:
        return "nothing"
    what = "" if first.what == REFUSED else f"{first.what}: "
    text = f"{what}{first.evidence}".replace(f"{place}/", "")
    text = re.sub(r"/\S*/(?=\w+\.py)", "", text).replace("`", "'").replace("|", "\\|")
    return f"{first.level}: `{text[:LONGEST]}{'…' if len(text) > LONGEST else ''}`"


def rate_line(entries: Sequence[Entry]) -> str:
    named = sum(entry.is_named for entry in entries)
    return f"The true cause is named first in **{named} of {len(entries)}** cases ({named / len(entries):.0%})."


def healthy_lines(sound: Mapping[str, str]) -> list[str]:
    """sound: name -> the `what` of its first complaint, or "nothing"."""
    odd = sum(first != "nothing" for first in sound.values())
    lines = [f"Of {len(sound)} sound configs and runs **{odd}** get a complaint:", ""]
    return [*lines, *(f"- `{name}`: {first}" for name, first in sound.items())]


def write(entries: Sequence[Entry], kinds: Mapping[str, str], sound: Mapping[str, str]) -> None:
    """Put the tables into the page, in place of the earlier ones. kinds: name of a case -> its kind."""
    lines = [rate_line(entries), ""]
    for kind, title in KINDS.items():
        mine = [entry for entry in entries if kinds[entry.name] == kind]
        named = sum(entry.is_named for entry in mine)
        lines += ["", f"### {title}: {named} of {len(mine)}", "", HEAD, "| --- | --- | --- | --- | --- |"]
        lines += [entry.line for entry in mine]
    lines += ["", "### Sound cases", "", *healthy_lines(sound)]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


def read() -> list[Entry]:
    """The lines of all tables, in order."""
    return list(_entries(PAGE.read_text(encoding="utf-8").splitlines()))


def read_healthy() -> dict[str, str]:
    """Sound cases, as `healthy_lines` writes them."""
    return dict(re.findall(r"^- `(\w+)`: (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))


def _entries(lines: Iterable[str]) -> Iterable[Entry]:
    for line in lines:
        if line.startswith("| `"):
            name, wrong, command, said, named = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            yield Entry(name.strip("`"), wrong, command.strip("`"), said, named == "yes")
