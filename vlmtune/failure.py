"""A step that was not finite: diagnosed, saved as it was, read back (SPEC F5).

    failures/step_000123/
      batch.safetensors    every tensor of its micro-batches
      failure.json         samples, tasks, step, precision, scale, lr, histories, random state, diagnosis, checksums
      samples.txt          the tokens by kind, for people
      images/              what the model saw, for people; pixels that are not finite are magenta
      checkpoint/          the state before the update (written by the trainer)
failure.json is written last: a folder that has one is complete. No pickle.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmtune.adapt.fused import own_forward
from vlmtune.checkpoint import restore_rng, rng_state
from vlmtune.checks.causes import GROWN, rank_causes
from vlmtune.checks.examine import Picture, examine_inputs, pictures_of
from vlmtune.checks.nonfinite import Origin, first_nonfinite, largest_finite
from vlmtune.data.batch import batches_of, tensors_of
from vlmtune.data.encode import Encoder
from vlmtune.data.loader import Steps
from vlmtune.losses.objective import StepWeights
from vlmtune.models.anatomy import canonical_parameters
from vlmtune.models.batchnorm import SharedTower
from vlmtune.models.vocabulary import embedding_rows
from vlmtune.optim.clip import gradient_norms
from vlmtune.optim.precision import autocast
from vlmtune.paths import write_text, write_whole
from vlmtune.recovery import NonFinite
from vlmtune.sealed import digest, read_sealed, require_whole, seal
from vlmtune.step import TrainingModule
from vlmtune.trainer import Trainer
from vlmtune.types import Batch, Finding, Kind

FORMAT = 1
BATCH = "batch.safetensors"
REQUIRED = ("step", "progress", "precision", "scale", "lr", "norm_history", "loss_history")
DAMAGED = "the failure cannot be replayed; the other files are still readable"
MAGENTA = (255, 0, 255)


# ---- diagnosis ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagnosis:
    """What the rerun of a failed step showed.

    origin: the first that is not finite (None: the rerun was finite); micro_batch: its place in the step (None: there
    is none, or all of them ran together); samples: ids of that micro-batch; causes: the most probable first; examined:
    what was looked at, "pass" where it is ruled out.
    """

    origin: Origin | None
    micro_batch: int | None
    samples: tuple[str, ...]
    causes: list[Finding]
    examined: list[Finding]

    @property
    def findings(self) -> list[Finding]:
        return [*self.causes, *self.examined]

    @property
    def sentence(self) -> str:
        """One line: where first, the most probable cause, its remedy."""
        first = self.causes[0]
        where = "the rerun of the step was finite" if self.origin is None else self.origin.sentence()
        return f"{where}; most probable: {first.what} ({first.evidence}); {first.remedy}."

    def record(self) -> dict[str, Any]:
        """JSON values, from which `of_record` makes it again."""
        return {
            "sentence": self.sentence,
            "origin": None if self.origin is None else asdict(self.origin),
            "micro_batch": self.micro_batch,
            "samples": list(self.samples),
            "causes": [asdict(finding) for finding in self.causes],
            "examined": [asdict(finding) for finding in self.examined],
        }

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Diagnosis:
        origin = record["origin"]
        if origin is not None:
            origin = Origin(**origin | {"samples": tuple(origin["samples"]), "broken": tuple(origin["broken"])})
        findings = {name: [Finding(**finding) for finding in record[name]] for name in ("causes", "examined")}
        return cls(origin, record["micro_batch"], tuple(record["samples"]), **findings)


def diagnose(
    model: torch.nn.Module,
    module: TrainingModule,
    micro_batches: Sequence[Batch],
    weights: StepWeights,
    precision: str,
    scale: float,
    rng: dict,
    norm_history: Sequence[Mapping[str, float]],
    loss_history: Sequence[float],
    lr: Mapping[str, float],
    vocabulary_size: int,
    encoder: Encoder | None = None,
    tower: SharedTower | None = None,
) -> Diagnosis:
    """Run the micro-batches of a step again, watched, until something is not finite; say where it began, and why.

    module: holds `model`; scale: of the loss; rng: `checkpoint.rng_state()` before the first forward of the step;
    norm_history, loss_history: of the steps before, oldest first (rule -> norm, with "total"); lr: rule -> learning
    rate; vocabulary_size: `embedding_rows`; encoder: knows placeholders and colours of images (None: images are
    compared with nothing); tower: where it runs over all images of the step at once.

    Afterwards parameters, buffers, random state and what the objective gathers are as before, and gradients are None.
    """
    examined = examine_batches(model, micro_batches, vocabulary_size, encoder)
    # the objective may gather gradients and draw samples: the rerun gets one of its own, on the same parameters
    own = {id(parameter): parameter for parameter in model.parameters()}
    watched = TrainingModule(module.vlm, copy.deepcopy(module.objective, own))
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    before = rng_state()
    try:
        restore_rng(rng)
        step = _Step(watched, [batch.to(model.device) for batch in micro_batches], weights, precision, tower)
        step.forget_gradients()
        with own_forward(model):
            origin, number, without_scale = _rerun(model, step, scale, vocabulary_size)
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter in (*module.parameters(), *watched.parameters()):
            parameter.grad = None
        restore_rng(before)
    largest = {name: largest_finite(p) for name, p in canonical_parameters(model).items() if p.is_floating_point()}
    grown = {name: value for name, value in largest.items() if value is not None and value > GROWN}
    causes = rank_causes(origin, examined, norm_history, loss_history, precision, scale, lr, without_scale, grown)
    samples = () if number is None else tuple(micro_batches[number].sample_ids)
    return Diagnosis(origin, number, samples, causes, examined)


def examine_batches(
    model: torch.nn.Module, micro_batches: Sequence[Batch], vocabulary_size: int, encoder: Encoder | None = None
) -> list[Finding]:
    """What is wrong with micro-batches themselves, and what is in order. Arguments as of `diagnose`."""
    token = getattr(model.config, "image_token_id", None)
    placeholders = {model.config.image_token_index if token is None else token}
    mean, std = (None, None) if encoder is None else colours(encoder.processor.image_processor)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return _merged(
        [examine_inputs(batch, vocabulary_size, placeholders, mean, std, longest) for batch in micro_batches]
    )


def _rerun(
    model: torch.nn.Module, step: _Step, scale: float, vocabulary_size: int
) -> tuple[Origin | None, int | None, bool | None]:
    """(origin, number of the micro-batch, whether it is finite with a scale of 1; None: not tried)."""
    for number, run in step.runs():
        wrong = [_without_a_row(model, batch, vocabulary_size) for batch in step.batches_of(number)]
        if any(wrong):
            return next(filter(None, wrong)), number, None
        at_start = rng_state()
        origin = first_nonfinite(step.module, partial(run, scale), model)
        if origin is None:
            continue
        without_scale = None
        if scale > 1 and origin.kind in ("gradient", "sum", "loss"):
            step.forget_gradients()
            restore_rng(at_start)
            without_scale = first_nonfinite(step.module, partial(run, 1.0), model) is None
        return origin, number, without_scale
    return _too_large(step.module), None, None


def _without_a_row(model: torch.nn.Module, batch: Batch, vocabulary_size: int) -> Origin | None:
    """Ids that the embedding has no row for. Told without running: on a GPU nothing runs any more after it."""
    ids = batch.inputs["input_ids"]
    wrong = ids[(ids < 0) | (ids >= vocabulary_size)]
    if not wrong.numel():
        return None
    layer = type(model.get_input_embeddings()).__name__
    detail = f"{wrong.numel()} ids, the first {int(wrong[0])}, have no row in a table of {vocabulary_size}"
    return Origin("exception", "embed", layer, detail)


@dataclass(frozen=True)
class _Step:
    """Forward and backward of the micro-batches of a step, as the trainer does them."""

    module: TrainingModule
    batches: Sequence[Batch]
    weights: StepWeights
    precision: str
    tower: SharedTower | None

    def runs(self) -> list[tuple[int | None, Callable[[float], Tensor]]]:
        """(number, scale -> loss) of what can be run by itself: a micro-batch, or (None) all of them, where the tower
        sees all images at once."""
        if self.tower is not None:
            return [(None, self._all)]
        return [(number, partial(self._one, number)) for number in range(len(self.batches))]

    def batches_of(self, number: int | None) -> Sequence[Batch]:
        return self.batches if number is None else [self.batches[number]]

    def forget_gradients(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None

    def _all(self, scale: float) -> Tensor:
        with autocast(self.precision, self._device):
            self.tower.begin(self.batches)
        total = torch.stack([self._one(number, scale) for number in range(len(self.batches))]).sum()
        self.tower.finish()
        return total

    def _one(self, number: int, scale: float) -> Tensor:
        batch = self.batches[number] if self.tower is None else self.tower.inputs(number, self.batches[number])
        with autocast(self.precision, self._device):
            total = self.module(batch, self.weights).total
        if total.requires_grad:  # text alone reaches nothing where only vision and projector train
            (total * scale).backward()
        return total.detach()

    @property
    def _device(self) -> torch.device:
        return self.batches[0].kinds.device


def _too_large(module: TrainingModule) -> Origin | None:
    """Gradients that are finite, but whose norm is not."""
    named = {name: [p] for name, p in module.named_parameters() if p.grad is not None}
    if not named:
        return None
    norms = {name: float(norm) for name, norm in gradient_norms(named).items()}
    total = torch.linalg.vector_norm(torch.tensor(list(norms.values())))
    if math.isfinite(float(total)):
        return None
    name = max(norms, key=norms.get)
    largest = float(named[name][0].grad.abs().max())
    return Origin(
        "sum", "the sum of the micro-batches", "",
        f"all gradients are finite, but their norm is not: {name} reaches {largest:.3g}", parameter=name,
        largest=largest,
    )  # fmt: skip


def _merged(of_batches: Sequence[Sequence[Finding]]) -> list[Finding]:
    """All that is wrong, then what is right in every micro-batch, with the evidence of the first that has any."""
    everything = [finding for findings in of_batches for finding in findings]
    wrong = [finding for level in ("fail", "warn") for finding in everything if finding.level == level]
    right: dict[str, Finding] = {}
    for finding in everything:
        if finding.level == "pass" and finding.what not in {other.what for other in wrong}:
            of = f"{finding.evidence} (first of {len(of_batches)} micro-batches)"
            right.setdefault(finding.what, finding if len(of_batches) == 1 else replace(finding, evidence=of))
    return [*wrong, *right.values()]


def colours(image_processor: Any) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """(mean, std) by channel that pixels were normalised with; None where they were not."""
    if not getattr(image_processor, "do_normalize", False):
        return None, None
    return image_processor.image_mean, image_processor.image_std


# ---- on disk -----------------------------------------------------------------------------------------------------


@dataclass
class Failure:
    """A saved failure. micro_batches: exactly the tensors of the step; record: failure.json; diagnosis: the one made
    then, None where none was."""

    folder: Path
    micro_batches: list[Batch]
    record: dict[str, Any]
    rng: dict
    diagnosis: Diagnosis | None = None
    checkpoint: Path = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoint = self.folder / "checkpoint"


def failure_name(step: int) -> str:
    """Folder of a failure. step: the number of the update that was not made, counted from 1."""
    return f"step_{step:06d}"


def save_failure(
    folder: Path,
    micro_batches: Sequence[Batch],
    record: Mapping[str, Any],
    rng: dict,
    diagnosis: Diagnosis | None = None,
    encoder: Encoder | None = None,
) -> None:
    """Write the step to `folder`, whole or not at all; what lies beside (a checkpoint) stays.

    record: step (updates made before), progress (in [0, 1], as given to the objective), precision, scale, lr (rule ->
    rate), norm_history (of dictionaries) and loss_history; other JSON values may stand beside them. rng:
    `checkpoint.rng_state()` before the first forward. encoder: decodes samples and images for people.
    """
    missing = [key for key in REQUIRED if key not in record]
    if missing:
        raise ValueError(f"the record of a failure lacks {', '.join(missing)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failure.json").unlink(missing_ok=True)
    tensors, described = tensors_of(micro_batches)
    write_whole(folder / BATCH, lambda draft: save_file(tensors, draft, metadata={"format": "pt"}))
    if encoder is not None:
        write_text(folder / "samples.txt", _readable(micro_batches, encoder))
        shutil.rmtree(folder / "images", ignore_errors=True)
        _write_images(folder / "images", micro_batches, encoder)
    whole = {
        "format": FORMAT,
        **json_values(record),
        "micro_batches": described,
        "rng": rng,
        "diagnosis": None if diagnosis is None else json_values(diagnosis.record()),
        "files": {BATCH: digest(folder / BATCH)},
    }
    write_text(folder / "failure.json", seal(whole))


def load_failure(folder: Path) -> Failure:
    """Exactly what was saved. Raises VlmtuneError naming the file that is missing or damaged."""
    record = read_sealed(folder / "failure.json", FORMAT, "saved failure", DAMAGED)
    require_whole(folder, record["files"], DAMAGED)
    tensors = load_file(folder / BATCH)
    micro_batches = batches_of(tensors, record.pop("micro_batches"))
    rng, diagnosis = record.pop("rng"), record.pop("diagnosis")
    record["norm_history"] = [{rule: float(norm) for rule, norm in step.items()} for step in record["norm_history"]]
    record["loss_history"] = [float(loss) for loss in record["loss_history"]]
    record["scale"] = float(record["scale"])
    return Failure(folder, micro_batches, record, rng, None if diagnosis is None else Diagnosis.of_record(diagnosis))


def json_values(value: Any) -> Any:
    """JSON has no word for numbers that are not finite: they become "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: json_values(part) for key, part in value.items()}
    return [json_values(part) for part in value] if isinstance(value, (list, tuple)) else value


# ---- in a run ------------------------------------------------------------------------------------------------------


def investigator(folder: Path, trainer: Trainer, encoder: Encoder, steps: Steps) -> Callable[[NonFinite, dict], str]:
    """What happens at a step that is not finite: it is run again watched, and saved with the weights it had.

    steps: gives the batches of a step once more, with all their pixels.
    """

    def investigate(failure: NonFinite, rng: dict) -> str:
        state = trainer.state
        if any(batch.images for batch in failure.micro_batches):
            failure.micro_batches = steps[state.step]
        record = _record_of(trainer) | {
            "what": failure.what,
            "scale_history": [past.scale for past in trainer.history],
        }
        diagnosis = diagnose_step(trainer, failure.micro_batches, rng, encoder, trainer.share.weights)
        rank = trainer.processes.rank
        place = folder / "failures" / (failure_name(state.step + 1) + (f"_rank{rank}" if rank else ""))
        trainer.write(place / "checkpoint")
        save_failure(place, failure.micro_batches, record, rng, diagnosis, encoder)
        return f"{diagnosis.sentence[0].upper()}{diagnosis.sentence[1:]} Saved in {place}."

    return investigate


def diagnose_step(
    trainer: Trainer, micro_batches: Sequence[Batch], rng: dict, encoder: Encoder, weights: StepWeights | None = None
) -> Diagnosis:
    """`diagnose` the step that a trainer could not make. rng: as there; weights: of the whole step, where others have
    shares of it."""
    record, model = _record_of(trainer), trainer.model
    weights = weights or trainer.module.objective.weights(micro_batches, record["progress"])
    return diagnose(
        model, trainer.module, micro_batches, weights, record["precision"], record["scale"], rng,
        record["norm_history"], record["loss_history"], record["lr"], embedding_rows(model), encoder, trainer.tower,
    )  # fmt: skip


def _record_of(trainer: Trainer) -> dict[str, Any]:
    """What `REQUIRED` names, as it is now."""
    state, settings = trainer.state, trainer.settings
    return {
        "step": state.step, "progress": state.step / settings.total_steps, "precision": settings.precision,
        "scale": 1.0 if trainer.scale is None else trainer.scale.value,
        "lr": {group["rule"]: group["lr"] for group in trainer.optimizer.param_groups},
        "norm_history": [past.norms for past in trainer.history],
        "loss_history": [past.loss for past in trainer.history],
    }  # fmt: skip


# ---- for people --------------------------------------------------------------------------------------------------


def _readable(micro_batches: Sequence[Batch], encoder: Encoder) -> str:
    """Every sample: id, task, and its tokens by kind, one line for each run of a kind."""
    lines = []
    for number, batch in enumerate(micro_batches):
        for row, name in enumerate(batch.sample_ids):
            lines.append(f"micro-batch {number + 1}, sample {name}, task {batch.tasks[row]}")
            ids, kinds = batch.inputs["input_ids"][row].tolist(), batch.kinds[row].tolist()
            for kind, run in groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
                lines.append(f"  {_kind(kind):12} {_text([id_ for _, id_ in run], kind, encoder)}")
            lines.append("")
    return "\n".join(lines)


def _kind(kind: int) -> str:
    return Kind(kind).name.lower() if kind in Kind._value2member_map_ else f"kind {kind}?"


def _text(ids: list[int], kind: int, encoder: Encoder) -> str:
    if kind == Kind.PADDING:
        return f"× {len(ids)}"
    known = len(encoder.tokenizer)
    pieces = []
    for is_placeholder, run in groupby(ids, key=lambda id_: id_ in encoder.image_token_ids):
        run = list(run)
        if is_placeholder:
            pieces.append(f"⟨image × {len(run)}⟩")
            continue
        for is_known, part in groupby(run, key=lambda id_: 0 <= id_ < known):
            part = list(part)
            said = encoder.tokenizer.decode(part, clean_up_tokenization_spaces=False) if is_known else f"⟨ids {part}⟩"
            pieces.append(said.replace("\n", "↵"))
    return "".join(pieces)


def _write_images(folder: Path, micro_batches: Sequence[Batch], encoder: Encoder) -> None:
    for number, batch in enumerate(micro_batches):
        for place, picture in enumerate(pictures_of(batch, encoder.image_token_ids)):
            shown = draw(picture, encoder.processor.image_processor)
            if shown is not None:
                folder.mkdir(exist_ok=True)
                sample = "".join(c if c.isalnum() or c in "-_" else "_" for c in picture.sample)[:60]
                shown.save(folder / f"{number + 1}_{place + 1}_{sample}.png")


def draw(picture: Picture, image_processor: Any) -> Image.Image | None:
    """What the model saw, back in colours; None for pixels of a layout that is not known."""
    pixels = _pixels(picture, image_processor)
    if pixels is None or pixels.dim() != 3 or pixels.shape[0] not in (1, 3):
        return None
    pixels = pixels.float().cpu().expand(3, -1, -1)
    mean, std = colours(image_processor)
    if mean is not None:
        pixels = pixels * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    broken = ~torch.isfinite(pixels).all(dim=0)
    shades = (pixels.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    shades[broken] = torch.tensor(MAGENTA, dtype=torch.uint8)
    return Image.fromarray(shades.numpy())


def _pixels(picture: Picture, image_processor: Any) -> Tensor | None:
    """float[C, H, W] of the first frame."""
    if picture.grid is None:
        return picture.values
    patch, merge, frames = (getattr(image_processor, f"{n}_size", None) for n in ("patch", "merge", "temporal_patch"))
    if None in (patch, merge, frames) or picture.values.shape[1] % (frames * patch * patch):
        return None
    _, rows, columns = picture.grid.tolist()
    # patches are listed block by block of merge x merge
    values = picture.values.view(-1, rows // merge, columns // merge, merge, merge, picture.values.shape[1])[0]
    values = values.unflatten(-1, (-1, frames, patch, patch))[..., 0, :, :]  # h, w, m, m, C, P, P
    return values.permute(4, 0, 2, 5, 1, 3, 6).reshape(-1, rows * patch, columns * patch)
