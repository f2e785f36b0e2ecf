"""Several processes that train together, forked from this one: no torchrun, no imports, a file in place of a server."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from vlmtune.config import load_config
from vlmtune.interrupt import Interrupted, StopRequest
from vlmtune.processes import Group
from vlmtune.run import train
from vlmtune.types import VlmtuneError

PATIENCE = 60.0

Work = Callable[[Group], Any]


def fork_group(size: int, folder: Path, work: Work, patience: float = PATIENCE) -> list[int]:
    """Process ids of children that do `work`. What each returns (JSON values) will be in folder/RANK.json; "error: …"
    where it raised VlmtuneError, "interrupted: …" for Interrupted, a traceback for anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_fork(rank, size, folder, work, patience) for rank in range(size)]


def wait_for_all(children: Sequence[int]) -> list[int]:
    """Exit codes: 0 where a sentence or a result was left, negative for a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def said_by(size: int, folder: Path) -> list[Any]:
    """None: nothing was left."""
    paths = [folder / f"{rank}.json" for rank in range(size)]
    return [json.loads(path.read_text()) if path.exists() else None for path in paths]


def together(size: int, folder: Path, work: Work, patience: float = PATIENCE) -> list[Any]:
    """What `work` left in each process (`fork_group`). Raises AssertionError where one ended otherwise."""
    codes = wait_for_all(fork_group(size, folder, work, patience))
    said = said_by(size, folder)
    for rank, code in enumerate(codes):
        assert code == 0, f"rank {rank} ended with {code}: {said[rank]}"
    return said


def training(*configs: Path, before: Work = lambda group: None) -> Work:
    """Train what a config says (several: one for each rank). before: is done first."""

    def work(group: Group) -> dict:
        before(group)
        config = load_config(str(configs[group.rank % len(configs)]))
        with Path(os.devnull).open("w") as nowhere, StopRequest().listening() as stop:
            return train(config, Console(file=nowhere), stop=stop, processes=group)

    return work


def train_together(size: int, folder: Path, *configs: Path, before: Work = lambda group: None) -> list[Any]:
    """Summaries, or sentences."""
    return together(size, folder, training(*configs, before=before))


def _fork(rank: int, size: int, folder: Path, work: Work, patience: float) -> int:
    pid = os.fork()
    if pid:
        return pid
    code, leave = 1, partial(_leave, folder / f"{rank}.json")
    try:
        torch.set_num_threads(1)
        try:
            group = Group(dist.FileStore(str(folder / "store"), size), rank, size, patience, local_rank=rank)
            leave(work(group))
            group.close()
            code = 0
        except VlmtuneError as error:
            leave(f"error: {error}")
            code = 0
        except Interrupted as interrupted:
            leave(f"interrupted: {interrupted}")
            code = 0
        except BaseException:
            leave(traceback.format_exc())
    finally:
        os._exit(code)


def _leave(path: Path, said: Any) -> None:
    path.write_text(json.dumps(said))
