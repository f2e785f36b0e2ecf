"""What a case is, and what counts as naming its cause."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlmtune import cli
from vlmtune.types import Finding

from .workshop import Workshop

Kind = Literal["config", "data", "run"]
REFUSED = "refused"
"""`what` of a case whose command ends with one sentence on standard error, before anything is looked at."""


@dataclass(frozen=True)
class Case:
    """One thing that is wrong.

    wrong: what somebody did, in one sentence; build: makes it in a folder and returns the argument of the command;
    what, says: the first finding's `what`, and a text within its evidence; says must tell this cause from others that
    share the `what`.
    """

    name: str
    kind: Kind
    wrong: str
    build: Callable[[Workshop], Path]
    what: str
    says: str = ""
    command: Literal["check", "doctor"] = "check"
    is_slow: bool = False

    def names_it(self, first: Finding | None) -> bool:
        return first is not None and first.what == self.what and self.says in first.evidence


@dataclass(frozen=True)
class Healthy:
    """A config (check) or run (doctor) with nothing wrong."""

    name: str
    build: Callable[[Workshop], Path]
    command: Literal["check", "doctor"] = "check"
    is_slow: bool = False


@dataclass(frozen=True)
class Said:
    """Of a command: its exit code, and all findings in the order of its output."""

    code: int
    findings: list[Finding]

    @property
    def odd(self) -> list[Finding]:
        """What is not `pass`, by weight: what a reader is told first comes first."""
        return [f for level in ("fail", "warn") for f in self.findings if f.level == level]

    @property
    def first(self) -> Finding | None:
        return self.odd[0] if self.odd else None


def ask(command: str, path: Path) -> Said:
    """`vlmtune COMMAND PATH --json`, in this process."""
    code, out, err = run_command(command, path, "--json")
    if not out.strip():
        return Said(code, [Finding("fail", REFUSED, " ".join(err.split()).removeprefix("error: "))])
    return Said(code, findings_of(json.loads(out)))


def findings_of(record: Any) -> list[Finding]:
    """Of `--json` of either command: a list, or a record with the causes of a failed step in front."""
    rows = record if isinstance(record, list) else [*(record.get("now") or {}).get("causes", []), *record["findings"]]
    return [Finding(row["level"], row["what"], row["evidence"], row["remedy"]) for row in rows]


def run_command(*arguments: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `vlmtune ARGUMENTS`."""
    before, sys.argv = sys.argv, ["vlmtune", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()
