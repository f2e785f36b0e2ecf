"""A checkpoint is one folder: what differs from the base, and everything an exact resume needs (SPEC D8).

    step_000100/
      trained.safetensors     fully trained parameters and new rows (canonical names), buffers of trained modules
      adapter/                adapters in peft's own format, further ones in folders of their names (absent without)
      plan.json               what trained, and how: for people, and for the comparison when it is loaded
      optimizer.safetensors   AdamW state by parameter name
      sampling.safetensors    what active sampling remembers of every row (absent without)
      probe.safetensors       three samples; their losses stand in state.json and are measured again on load
      history.jsonl           what the run had recorded until then
      state.json              step, samples seen, RNG, config fingerprint, versions, new tokens, digests of all files
Files are written to a temporary sibling, synced and renamed: a folder with a final name is complete. No pickle.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vlmtune import __version__
from vlmtune.adapt.plan import Plan
from vlmtune.adapt.record import plan_record, require_same_plan
from vlmtune.adapt.state import load_adapters, load_trained, save_adapters, trained_state
from vlmtune.optim.optimizer import load_optimizer_tensors, optimizer_tensors, stored_like
from vlmtune.paths import DISK_FULL, sync
from vlmtune.probe import FILE as PROBE_FILE
from vlmtune.probe import Probe
from vlmtune.processes import ALONE, Processes
from vlmtune.sealed import digests, read_sealed, require_whole, seal
from vlmtune.tensor_file import fill_in, lay_out, pieces_of, read_tensors
from vlmtune.types import VlmtuneError

FORMAT = 1
SAMPLING = "sampling.safetensors"
VERSIONED = ("torch", "transformers", "peft", "safetensors")
OTHER = "name another checkpoint, or delete this folder and the run continues from the one before"
NO_NEW_TOKENS = {"first": 0, "texts": []}  # of checkpoints written before there were any


@dataclass
class TrainState:
    """Where a run stands. `samples` is the data position: the order is a pure function of it.

    evaluated: step of the last evaluation; waited: evaluations since the last one that was better than `reference` by
    checkpoint.delta; stopped: why the run ended early; lr_scale: what rewinds have left of every learning rate;
    skipped: steps that made no update because their batch was left out; rewinds: (from step, to step);
    overflows: steps without an update because float16 gradients overflowed; loss_scale: of float16.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int | None = None
    evaluated: int | None = None
    reference: float | None = None
    waited: int = 0
    stopped: str | None = None
    lr_scale: float = 1.0
    skipped: list[int] = field(default_factory=list)
    rewinds: list[list[int]] = field(default_factory=list)
    overflows: int = 0
    loss_scale: dict[str, float] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


@dataclass(frozen=True)
class Recorded:
    """What a checkpoint holds besides the training itself.

    probe: its samples, and the losses they have now in `precision`; companions: files of the run folder, copied.
    """

    probe: Probe
    losses: list[float]
    precision: str
    companions: Sequence[Path] = ()


class Draft:
    """A checkpoint on its way: begun by `__init__`, filled by `rows`, and given its name by `rest`, atomically. An
    existing folder of that name is replaced.

    objective: what it learns is saved; writers: of a model in parts all processes make one, and each writes the rows it
    holds; copies: of all tensors are made at once, on the host, so that training may go on while another thread calls
    `rows` and `rest`; sampling: tensors of what draws the samples. Each raises VlmtuneError where it cannot be written
    (a full disk, a quota): after `discard` nothing of it is left, and all earlier checkpoints are as they were.
    """

    def __init__(
        self,
        folder: Path,
        model: torch.nn.Module,
        plan: Plan,
        optimizer: torch.optim.Optimizer,
        state: TrainState,
        fingerprint: str,
        objective: torch.nn.Module,
        recorded: Recorded | None = None,
        writers: Processes = ALONE,
        copies: bool = False,
        sampling: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ):
        self.folder, self.writers, self.writes_all = folder, writers, writers.is_first
        of_first = writers.gather("a checkpoint", os.getpid())[0]
        self._path = folder.with_name(f".{folder.name}.{of_first}.tmp")
        full, adapters = trained_state(model, plan)
        files = {"trained.safetensors": full, "optimizer.safetensors": optimizer_tensors(optimizer)}
        if sampling:
            files[SAMPLING] = sampling
        self._described: dict[str, Any] = {}
        try:
            with writers.agreed("room for a checkpoint"), _explained(folder):
                if self.writes_all:
                    shutil.rmtree(self._path, ignore_errors=True)
                    self._path.mkdir(parents=True)
                    for name, tensors in files.items():
                        lay_out(self._path / name, tensors)
                    save_adapters(adapters, plan, self._path / "adapter")
                    self._described = _described(self._path, plan, state, fingerprint, objective, recorded)
        except VlmtuneError:
            self.discard()
            raise
        self._pieces = {name: pieces_of(tensors, self.writes_all) for name, tensors in files.items()}
        if copies:
            for pieces in self._pieces.values():
                pieces[:] = [(place, tensor.to("cpu", copy=True)) for place, tensor in pieces]

    def rows(self) -> None:
        """Write what this process holds."""
        with _explained(self.folder):
            for name, pieces in self._pieces.items():
                fill_in(self._path / name, pieces)

    def rest(self) -> None:
        """Seal it and name it, once all have written their rows."""
        if not self.writes_all:
            return
        with _explained(self.folder):
            self._described["files"] = digests(self._path)
            (self._path / "state.json").write_text(seal(self._described))
            for path in [*self._path.rglob("*"), self._path]:
                sync(path)
            if self.folder.exists():
                remove_checkpoint(self.folder)
            os.replace(self._path, self.folder)
            sync(self.folder.parent)

    def write(self) -> None:
        """`rows` and `rest`, here and now, together with the other writers."""
        try:
            with self.writers.agreed("rows of a checkpoint"):
                self.rows()
            with self.writers.agreed("the rest of a checkpoint"):
                self.rest()
        except VlmtuneError:
            self.discard()
            raise

    def discard(self) -> None:
        if self.writes_all:
            shutil.rmtree(self._path, ignore_errors=True)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """What the disk says, as a sentence on the checkpoint."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise VlmtuneError(_not_written(folder, error)) from error


def _described(
    draft: Path,
    plan: Plan,
    state: TrainState,
    fingerprint: str,
    objective: torch.nn.Module,
    recorded: Recorded | None,
) -> dict[str, Any]:
    """state.json without the digests of files; writes those that are small."""
    (draft / "plan.json").write_text(json.dumps(plan_record(plan), indent=1))
    learned = {name: value.contiguous() for name, value in objective.state_dict().items()}
    if learned:
        save_file(learned, draft / "objective.safetensors", metadata={"format": "pt"})
    described = {"format": FORMAT, "config": fingerprint, "state": state.__dict__, "rng": rng_state()}
    described["new_tokens"] = _new_tokens(plan)
    described["versions"] = {"vlmtune": __version__} | {name: metadata.version(name) for name in VERSIONED}
    if recorded is not None:
        recorded.probe.save(draft)
        described["probe"] = {"losses": recorded.losses, "precision": recorded.precision}
        for path in recorded.companions:
            if path.is_file():
                shutil.copyfile(path, draft / path.name)
    return json.loads(json.dumps(described))  # as it is now: training may go on while the rest is written


def _not_written(folder: Path, error: Exception) -> str:
    """One sentence on a checkpoint that could not be written."""
    others = latest_checkpoint(folder.parent)
    left = f"{others.name} is whole and" if others else "no earlier checkpoint exists, so"
    full = getattr(error, "errno", None) in DISK_FULL or "os error 28" in str(error)
    remedy = "free some space" if full else "make the folder writable"
    return (
        f"{folder} could not be written ({error}); {left} the same command continues"
        f"{' from there' if others else ' from the beginning'}: {remedy}, or lower checkpoint.keep."
    )


def remove_checkpoint(folder: Path) -> None:
    """Rename first: a kill in between leaves a hidden folder, never half a checkpoint with a valid name."""
    doomed = folder.with_name(f".{folder.name}.doomed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left behind: half-written and half-deleted checkpoints, which have hidden names."""
    for path in [*folder.glob(".step_*.tmp"), *folder.glob(".step_*.doomed")]:
        shutil.rmtree(path)


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint. Raises VlmtuneError if it is absent, not whole, or of an unknown format."""
    return read_sealed(folder / "state.json", FORMAT, "checkpoint", OTHER)


def load_weights(folder: Path, model: torch.nn.Module, plan: Plan) -> dict:
    """Put a checkpoint's weights into a model to which its plan was applied; returns state.json."""
    folder = folder.resolve()  # "latest" is a link; what is damaged, and may be deleted, is the folder behind it
    described = read_state(folder)
    require_whole(folder, described["files"], OTHER)
    if described.get("new_tokens", NO_NEW_TOKENS) != _new_tokens(plan):
        raise VlmtuneError(
            f"{folder}: its new tokens have other rows than they would get now; the base model's tokenizer or the list "
            "of new tokens was changed since. Use the base and the config of that run."
        )
    if (folder / "plan.json").is_file():  # of checkpoints written before there was one, the tensors are compared
        require_same_plan(json.loads((folder / "plan.json").read_text()), plan_record(plan), str(folder))
    load_trained(model, plan, _tensors(folder / "trained.safetensors", plan.parameters), str(folder))
    load_adapters(model, plan, folder / "adapter")
    return described


def load_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    fingerprint: str,
    objective: torch.nn.Module,
) -> TrainState:
    """Everything for an exact resume. Raises VlmtuneError for damage and for a checkpoint of another config."""
    described = read_state(folder)
    if described["config"] != fingerprint:
        raise VlmtuneError(
            f"{folder} belongs to another config; resume with the config of that run, or choose another run folder."
        )
    load_weights(folder, model, plan)
    if objective.state_dict():
        objective.load_state_dict(_tensors(folder / "objective.safetensors"))
    load_optimizer_tensors(optimizer, _tensors(folder / "optimizer.safetensors", stored_like(optimizer)))
    restore_rng(described["rng"])
    return TrainState(**described["state"])


def load_sampling(folder: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of each sample; nothing where the sampling remembers none."""
    return _tensors(folder / SAMPLING) if (folder / SAMPLING).is_file() else {}


def copy_weights(checkpoint: Path, folder: Path) -> None:
    """A checkpoint without what only a resume needs (the states of optimizer, loss and random generators, the history),
    and without the stored samples: whoever passes an adapter on does not pass on training data."""
    described = read_state(checkpoint)
    require_whole(checkpoint, described["files"], OTHER)
    left_out = (
        "optimizer.safetensors", "objective.safetensors", SAMPLING, "history.jsonl", "gradients.jsonl", PROBE_FILE,
    )  # fmt: skip
    described["files"] = {name: digest for name, digest in described["files"].items() if name not in left_out}
    for name in described["files"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint / name, folder / name)
    described["rng"] = {}
    described.pop("probe", None)
    (folder / "state.json").write_text(seal(described))


def _new_tokens(plan: Plan) -> dict:
    """Which token each trained row belongs to: the tokenizer itself lies with the base model."""
    return {"first": plan.new_tokens.first, "texts": list(plan.new_tokens.texts)}


def checkpoints(folder: Path) -> list[Path]:
    """Complete periodic checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step_*") if (p / "state.json").is_file())


def latest_checkpoint(folder: Path) -> Path | None:
    found = checkpoints(folder)
    return found[-1] if found else None


def checkpoint_folders(folder: Path) -> list[Path]:
    """Everything that has the name of a checkpoint, whole or damaged, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def newest_whole_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint without damage, and a sentence for every newer one that has some, naming the file.

    Raises VlmtuneError where there are checkpoints and every one of them is damaged.
    """
    complaints: list[str] = []
    for path in reversed(checkpoint_folders(folder)):
        try:
            require_whole(path, read_state(path)["files"], OTHER)
        except VlmtuneError as error:
            complaints.append(str(error).partition(";")[0])
        else:
            return path, complaints
    if complaints:
        raise VlmtuneError(
            f"{complaints[0]}, and no other checkpoint in {folder} is whole; put the file back from a copy, or start "
            "over with --restart."
        )
    return None, []


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint: it is never taken for one again, and nothing of it is lost. Returns the new name."""
    aside = folder.with_name(f"damaged_{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def point(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to a sibling, atomically."""
    draft = link.with_name(f".{link.name}.tmp")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target.name)
    os.replace(draft, link)


def config_fingerprint(tree: dict) -> str:
    """sha256 of what determines the training; `build.NOT_FINGERPRINTED` says what is left out."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def rng_state() -> dict:
    """State of Python's, NumPy's and torch's generators as JSON values."""
    version, internal, gauss = random.getstate()
    numpy_state = np.random.get_state()
    described = {
        "python": [version, list(internal), gauss],
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        "torch": _encode_bytes(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        described["cuda"] = [_encode_bytes(torch.cuda.get_rng_state())]  # of the one that this process uses
    return described


def restore_rng(described: dict) -> None:
    version, internal, gauss = described["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = described["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_decode_bytes(described["torch"]))
    if "cuda" in described and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode_bytes(described["cuda"][0]))


def _encode_bytes(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _tensors(path: Path, like: Mapping[str, torch.Tensor] = MappingProxyType({})) -> dict[str, torch.Tensor]:
    """like: name -> a tensor whose rows this process needs, where that is in parts."""
    try:
        return read_tensors(path, like)
    except (OSError, SafetensorError, ValueError) as error:
        raise VlmtuneError(f"{path} is missing or damaged ({error}); {OTHER}.") from error
