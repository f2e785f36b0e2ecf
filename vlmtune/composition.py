"""What a run is going to read: every source, its share, how often it is walked, how long its samples are (SPEC E3), and
which bytes those were (SPEC H3).
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from vlmtune import __version__
from vlmtune.build import cache_folder, source_names
from vlmtune.config import Config, Source
from vlmtune.data.files import ENDINGS, open_reader
from vlmtune.data.fingerprint import fingerprint
from vlmtune.data.loader import Steps
from vlmtune.data.sources import SampleSource
from vlmtune.types import Encoded


def composition(
    steps: Steps, sources: Sequence[SampleSource], encoded: Sequence[tuple[int, Encoded]]
) -> list[dict[str, Any]]:
    """A row for every source of data.train.

    encoded: (source, sample) of some samples of the run, from which mean lengths are taken. samples and share are those
    of the whole run, or of what is decided where the order follows losses; epochs: samples / rows, None without end.
    """
    decided = steps.order.decide(0)
    counts = steps.order.counts(decided)
    rows = []
    for number, (name, source, count) in enumerate(zip(source_names(sources), sources, counts, strict=True)):
        seen = [sample for owner, sample in encoded if owner == number]
        rows.append(
            {"source": name, "tasks": sorted(set(source.tasks())), "rows": source.size, "samples": count,
             "share": count / decided, "epochs": None if not source.size else count / source.size,
             "measured_on": len(seen),
             "tokens": statistics.mean(map(len, seen)) if seen else None,
             "supervised_tokens": statistics.mean(int(s.supervised().sum()) for s in seen) if seen else None,
             "images": statistics.mean(len(s.geometry) for s in seen) if seen else None}
        )  # fmt: skip
    return rows


def composition_table(rows: Sequence[dict[str, Any]]) -> Table:
    """For the console, before step 0."""
    table = Table(title="what the run reads", title_justify="left")
    for name in ("source", "tasks", "share", "samples", "rows", "epochs", "tokens", "supervised", "images"):
        is_text = name in ("source", "tasks")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(
            row["source"], ", ".join(row["tasks"]), f"{row['share']:.1%}", f"{row['samples']:,}",
            "endless" if row["rows"] is None else f"{row['rows']:,}", _shown(row["epochs"], "{:.2f}"),
            _shown(row["tokens"], "{:.0f}"), _shown(row["supervised_tokens"], "{:.1f}"),
            _shown(row["images"], "{:.1f}"),
        )  # fmt: skip
    return table


def data_record(config: Config) -> list[dict[str, Any]]:
    """A row for every source: where it is used, its name without folders, and a fingerprint of its contents.

    Raises VlmtuneError for files that cannot be read.
    """
    places = [("train", source) for source in config.data.train]
    places += [(f"eval/{group}", source) for group, sources in config.data.eval.items() for source in sources]
    return [{"place": place, "limit": source.limit, **_fingerprinted(source)} for place, source in places]


def _fingerprinted(source: Source) -> dict[str, Any]:
    if source.scenes is not None:  # drawn by this version of vlmtune, always the same
        text = json.dumps([__version__, source.model_dump(mode="json")], sort_keys=True)
        name = f"scenes/{source.scenes}/{source.task}/{source.split}"
        return {
            "name": name,
            "files": 0,
            "bytes": 0,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "whole": True,
        }
    if source.path.startswith("hub:"):  # a data set that `datasets` keeps, with a fingerprint of its own
        identity = open_reader(source.path, source.split, cache_folder() / "indexes").identity
        sha256 = hashlib.sha256(identity.encode()).hexdigest()
        return {"name": source.path, "files": 0, "bytes": 0, "sha256": sha256, "whole": True}
    path = Path(source.path)
    files = (
        [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and p.suffix in (*ENDINGS, ".arrow")]
    )
    return {"name": "/".join(path.parts[-2:]), **asdict(fingerprint(files))}


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
