"""Whether the processes of a run agree on what they are about to do, asked before the run folder is touched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import metadata

import torch

from vlmtune import __version__
from vlmtune.build import source_names
from vlmtune.config import Config, differing_keys
from vlmtune.data.sources import SampleSource
from vlmtune.data.survey import Survey
from vlmtune.prepare import Prepared
from vlmtune.processes import Processes
from vlmtune.types import Sample, Text, VlmtuneError

LOOKED_AT = 64  # rows of a source whose texts are compared
LIBRARIES = ("torch", "transformers", "peft")
NAMED = 4  # keys in which two processes differ
FREE = (("data", "workers"), ("train", "threads"))  # what may differ between machines


def require_same_config(processes: Processes, config: Config, restart: bool, check: bool) -> None:
    """Raise VlmtuneError in all processes where one was started with something else, or where a step has fewer samples
    than there are processes."""
    if processes.size == 1:
        return
    tree = config.model_dump(mode="json")
    for section, key in FREE:
        del tree[section][key]
    versions = {"vlmtune": __version__} | {name: metadata.version(name) for name in LIBRARIES}
    told = processes.gather("config", {"config": tree, "versions": versions, "restart": restart, "check": check})
    _require_equal(
        told, "was started with something else than rank 0", "start all with one command, config and version"
    )
    if config.train.batch_size < processes.size:
        raise VlmtuneError(
            f"train.batch_size is {config.train.batch_size}, and {processes.size} processes share the samples of a "
            "step, so some would have none; raise it, or start fewer."
        )


def require_same_data(processes: Processes, made: Prepared, device: torch.device) -> None:
    """Raise VlmtuneError in all processes where one reads other rows, starts from other weights, trains other
    parameters, or computes in another precision or on another kind of device."""
    if processes.size == 1:
        return
    surveys = dict(made.fitted.surveys)
    rows = {
        f"{group}{name}": f"{source.size} rows, {_digest(source, surveys.get(f'{group}{name}'))[:12]}"
        for group, sources in {"": made.sources, **{f"{name}/": found for name, found in made.groups.items()}}.items()
        for name, source in zip(source_names(sources), sources, strict=True)
    }
    described = {
        "data (rows, digest)": rows,
        "base model (digests of weights)": made.plan.base,
        "plan": _sha([list(pair) for pair in made.digests.items()]),
        "train.precision": made.settings.precision,
        "device": device.type,
    }
    told = processes.gather("data and weights", json.loads(json.dumps(described)))
    _require_equal(told, "is not about to do what rank 0 does", "give all machines the same files, base model and kind")


def _require_equal(told: Sequence[dict], what: str, remedy: str) -> None:
    """told: by each rank."""
    for rank, other in enumerate(told):
        if keys := differing_keys(told[0], other):
            named = ", ".join(keys[:NAMED]) + (f" and {len(keys) - NAMED} more" if len(keys) > NAMED else "")
            raise VlmtuneError(f"rank {rank} {what}: {named}; {remedy}.")


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
