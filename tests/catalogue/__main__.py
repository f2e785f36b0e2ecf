"""`python -m tests.catalogue`: make every case and show all that is said; `--record` writes the page.

NAME… makes these alone. From the root of the repository.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

from . import cases, record  # noqa: E402
from .case import Healthy, ask  # noqa: E402
from .short_model import write_short  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="cases; none: all")
    parser.add_argument("--record", action="store_true", help="write docs/guide/catalogue.md, line by line")
    wish = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vlmtune-catalogue-") as name:
        folder = Path(name)
        os.environ["VLMTUNE_CACHE"] = str(folder / "cache")
        model = write_short(folder / "model")
        wanted = set(wish.names) or {case.name for case in (*cases.CASES, *cases.HEALTHY)}
        if wish.record:
            _record(wanted, model, folder)
        else:
            _show(wanted, model, folder)


def _show(names: set[str], model: Path, folder: Path) -> None:
    for case in (*cases.CASES, *cases.HEALTHY):
        if case.name in names:
            _, argument = record.make(case, model, folder)
            said = ask(case.command, argument)
            print(f"{case.name}: vlmtune {case.command} {argument}: exit code {said.code}")
            for finding in said.odd:
                print(f"  {finding.level}: {finding.what}: {finding.evidence}; {finding.remedy}")


def _record(names: set[str], model: Path, folder: Path) -> None:
    """After each case, so that a run that is stopped has not been in vain; other cases stay as they are recorded."""
    kinds = {case.name: case.kind for case in cases.CASES}
    sound = record.read_healthy()
    for case in (*cases.CASES, *cases.HEALTHY):
        if case.name not in names:
            continue
        entries = {entry.name: entry for entry in record.read()}
        if isinstance(case, Healthy):
            first = ask(case.command, record.make(case, model, folder)[1]).first
            sound[case.name] = "nothing" if first is None else first.what
            print(f"{case.name}: {sound[case.name]}", flush=True)
        else:
            entries[case.name] = record.measured(case, model, folder)
            print(entries[case.name].line, flush=True)
        ordered = [entries[name] for name in kinds if name in entries]
        record.write(ordered, kinds, {c.name: sound[c.name] for c in cases.HEALTHY if c.name in sound})


if __name__ == "__main__":
    main()
