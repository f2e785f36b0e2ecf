"""Whether the processes of a run agree on what they are about to do, asked before the run folder is touched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import metadata

from vlmtune import __version__
from vlmtune.adapt.plan import Plan
from vlmtune.build import fingerprint_tree, source_names
from vlmtune.config import Config, differing_keys
from vlmtune.data.share import Share
from vlmtune.data.sources import SampleSource
from vlmtune.data.survey import Survey, row_tokens
from vlmtune.processes import Processes
from vlmtune.types import Sample, Text, VlmtuneError

LOOKED_AT = 64  # rows of a source whose texts are compared
LIBRARIES = ("torch", "transformers", "peft")
NAMED = 4  # keys in which two configs differ


def require_same_config(processes: Processes, config: Config, restart: bool) -> None:
    """Raise VlmtuneError in all processes where one has another config, another version, or fewer samples in a step
    than there are processes."""
    if processes.size == 1:
        return
    if config.train.batch_size < processes.size:
        raise VlmtuneError(
            f"train.batch_size is {config.train.batch_size}, and {processes.size} processes share the samples of a "
            "step, so some would have none; raise it, or start fewer."
        )
    versions = {"vlmtune": __version__} | {name: metadata.version(name) for name in LIBRARIES}
    mine = {"config": fingerprint_tree(config) | {"run": config.run}, "versions": versions, "restart": restart}
    told = processes.gather("config", json.loads(json.dumps(mine)))
    for rank, other in enumerate(told):
        if keys := differing_keys(told[0], other):
            named = ", ".join(keys[:NAMED]) + (f" and {len(keys) - NAMED} more" if len(keys) > NAMED else "")
            raise VlmtuneError(
                f"rank {rank} was started with something else than rank 0: {named}; start all with one command, config "
                "and version."
            )


def require_same_data(
    processes: Processes, sources: Sequence[SampleSource], surveys: Sequence[Survey | None], plan: Plan
) -> None:
    """Raise VlmtuneError in all processes where one reads other rows, or trains other parameters."""
    if processes.size == 1:
        return
    rows = [
        [name, source.size, _digest(source, survey)]
        for name, source, survey in zip(source_names(sources), sources, surveys, strict=True)
    ]
    shapes = [[name, list(p.shape), str(p.dtype)] for name, p in plan.parameters.items()]
    told = processes.gather("data and plan", {"rows": rows, "plan": _sha(shapes), "parameters": len(shapes)})
    for rank, other in enumerate(told):
        for one, another in zip(told[0]["rows"], other["rows"], strict=True):
            if one != another:
                what = f"{one[1]} rows and {another[1]}" if one[1] != another[1] else "other contents"
                raise VlmtuneError(
                    f"data: {one[0]} is not the same for rank 0 and rank {rank} ({what}); give all machines the same "
                    "files."
                )
        if other["plan"] != told[0]["plan"]:
            raise VlmtuneError(
                f"plan: rank 0 trains {told[0]['parameters']} parameters and rank {rank} {other['parameters']}, or "
                "others; give all machines the same base model."
            )


def share_of(processes: Processes, sources: Sequence[SampleSource], surveys: Sequence[Survey | None]) -> Share | None:
    """What this process takes of every step; None where there is only one."""
    if processes.size == 1:
        return None
    lengths = [
        None if survey is None else row_tokens(source, survey) for source, survey in zip(sources, surveys, strict=True)
    ]
    return Share(processes.rank, processes.size, lengths)


def _digest(source: SampleSource, survey: Survey | None) -> str:
    """Of the lengths of all rows, as far as they are counted, and of the texts of some."""
    size = LOOKED_AT if source.size is None else source.size
    some = range(0, size, max(1, size // LOOKED_AT))
    lengths = None if survey is None else hashlib.sha256(survey.tokens.tobytes()).hexdigest()
    return _sha([lengths, *(_texts(source[row]) for row in some)])


def _texts(sample: Sample) -> list:
    """Without the places of images, which may differ between machines."""
    turns = [[turn.role, *(part.text for part in turn.parts if isinstance(part, Text))] for turn in sample.turns]
    return [sample.id, sample.task, turns]


def _sha(values: list) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
