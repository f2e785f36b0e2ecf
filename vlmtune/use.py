"""What one does with a run besides training it: evaluate, predict. `export.py` writes it out."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console

from vlmtune.adapt.peft_folder import load_plain_peft
from vlmtune.adapt.plan import Plan, apply_plan
from vlmtune.build import (
    best_device,
    build_encoder,
    build_eval_groups,
    fit_data,
    load_base,
    load_model,
    resolve_model,
)
from vlmtune.build_course import apply_formats, policies
from vlmtune.checkpoint import checkpoints, load_weights
from vlmtune.config import Config, load_config
from vlmtune.data.encode import Encoder
from vlmtune.data.prompts import system_prompt
from vlmtune.data.sources import with_system
from vlmtune.evaluate.choices import ChoiceRule
from vlmtune.evaluate.evaluation import evaluate, require_chosen
from vlmtune.evaluate.generate import reply
from vlmtune.evaluate.regions import masks_of_sample
from vlmtune.models.load import load_processor
from vlmtune.models.quantise import QUANTISED, place
from vlmtune.models.readouts import readouts_of
from vlmtune.observe.log import CountingBar
from vlmtune.optim.precision import Precision, autocast, resolve_precision
from vlmtune.outcome import metrics_table
from vlmtune.paths import require_run
from vlmtune.probe import require_same_losses
from vlmtune.sealed import stage_folders
from vlmtune.types import Box, Boxes, ImageRef, Point, Sample, Text, Turn, VlmtuneError


@dataclass
class Loaded:
    """A model with a checkpoint's weights in it, in eval mode. precision: what its products need to be computed in."""

    model: torch.nn.Module
    encoder: Encoder
    config: Config
    model_path: str
    plan: Plan | None
    precision: Precision


def load_run(run: Path, checkpoint: str, as_stored: bool = True) -> Loaded:
    """The model of a run folder. checkpoint: latest, best, base (untouched), or step_…

    as_stored: base weights in the formats of the plan, as in training; False: all of them in float32.
    """
    run = last_stage(run)
    require_run(run)
    config = load_config(str(run / "config.yaml"))
    folder = None if checkpoint == "base" else find_checkpoint(run, checkpoint)
    base = load_base(config, as_stored)
    encoder = build_encoder(base.processor, base.model, config.data)
    rules = [(pattern, policy if as_stored else replace(policy, store="fp32")) for pattern, policy in policies(config)]
    plan = None
    if folder is not None:
        plan = apply_plan(base.model, rules, config.model, config.train.seed, base.new_tokens)
        described = load_weights(folder, base.model, plan)
        apply_formats(base.model, plan, config)
        place(base.model, base.model.device)  # read-outs and new rows to where a quantised base was read
    precision = products_of(config) if as_stored else "fp32"
    if folder is not None and (as_stored or not any(policy.store in QUANTISED for _, policy in policies(config))):
        require_same_losses(folder, described, base.model, precision)
    return Loaded(base.model.eval(), encoder, config, base.path, plan, precision)


def products_of(config: Config) -> Precision:
    """The format that products of a finished model need: float32, unless some weights are kept in a shorter one."""
    is_mixed = any(policy.store != "fp32" for _, policy in policies(config))
    return resolve_precision(config.train.precision, best_device()) if is_mixed else "fp32"


def last_stage(run: Path) -> Path:
    """The run folder itself; of a chain of stages that of the last one with a checkpoint."""
    if not (run / "stages.json").is_file():
        return run
    begun = [stage for stage in stage_folders(run) if checkpoints(stage / "checkpoints")]
    if not begun:
        raise VlmtuneError(f"{run}: no stage of this chain has a checkpoint yet; train it first.")
    return begun[-1]


def find_checkpoint(run: Path, name: str) -> Path:
    run = last_stage(run)
    folder = run / "checkpoints" / name
    if not (folder / "state.json").is_file():
        links = [link for link in ("latest", "best") if (run / "checkpoints" / link).exists()]
        known = ", ".join([*links, *(p.name for p in checkpoints(run / "checkpoints"))])
        if not known:
            raise VlmtuneError(f"{run} has no checkpoint at all; train it, or bring back its folder checkpoints.")
        why = " best exists once evaluate.every is set;" if name == "best" else ""
        raise VlmtuneError(f"{run} has no checkpoint {name!r};{why} pass --checkpoint with one of: {known}.")
    return folder


def evaluate_run(run: Path, checkpoint: str, console: Console) -> dict:
    """Metrics of a checkpoint on the run's held-out groups; prints the table."""
    loaded = load_run(run, checkpoint)
    groups = build_eval_groups(loaded.config)
    if not groups:
        raise VlmtuneError(f"{run}: its config has no data.eval, so there is nothing to evaluate on.")
    place(loaded.model, best_device())
    trained = resolve_precision(loaded.config.train.precision, best_device())
    if trained != loaded.precision:
        console.print(f"computed in {loaded.precision}; the run's own evaluations were in {trained}, which rounds more")
    with CountingBar(console) as bar:
        groups = fit_data(loaded.config, loaded.encoder, [], groups, bar).groups
    wish = loaded.config.evaluate
    if wish.metrics:  # data.eval may be another one than in training
        require_chosen(wish.metrics, groups, list(readouts_of(loaded.model) or []), [None])
    result = evaluate(
        loaded.model, loaded.encoder, groups, limit=None, batch_size=wish.batch_size,
        max_new_tokens=wish.max_new_tokens if wish.generate else None, precision=loaded.precision,
        choices=ChoiceRule(wish.choices, wish.alpha), chosen=wish.metrics,
    )  # fmt: skip
    nested: dict[str, dict] = {}
    for name, value in result.metrics.items():
        where, metric = (
            (name[5:], "loss") if name.startswith("loss/") else (name.rpartition("/")[0], name.rpartition("/")[2])
        )
        if where:
            nested.setdefault(where, {})[metric] = {"after": value}
    console.print(metrics_table(dict(sorted(nested.items()))))
    return result.metrics


@dataclass(frozen=True)
class Prediction:
    """A generated reply, with its boxes, points and clicks in original pixels.

    masks: where they were asked for, of the region of the prompt, then of every box of the reply.
    """

    text: str
    boxes: list[Box]
    points: list[Point]
    clicks: list[Point]
    masks: list[Image.Image]


def predict(
    image: Path,
    prompt: str,
    model: str,
    checkpoint: str | None,
    region: str | None,
    max_new_tokens: int,
    system: str | None = None,
    with_masks: bool = False,
) -> Prediction:
    """The reply and what it points at. `[region]` in the prompt stands for `region` "x1,y1,x2,y2".

    checkpoint: of a run (None: the latest); refused for any other model.
    system: a system prompt as in a config; None: that of the run, if `model` is one. with_masks: of a run that trained
    a mask head; raises VlmtuneError for any other, and where nothing has a place to give a mask of.
    """
    if not image.is_file():
        raise VlmtuneError(f"image {image} does not exist.")
    if not prompt.strip():
        raise VlmtuneError("the prompt is empty; write what to ask.")
    is_run = Path(model, "config.yaml").is_file()
    if checkpoint is not None and not is_run:
        raise VlmtuneError(f"--checkpoint {checkpoint}: {model} is not a run folder; leave it out, or pass the run.")
    parts = [ImageRef(image), *_prompt_parts(prompt, region)]
    network, encoder, precision = open_model(model, checkpoint)
    place(network, best_device())
    if is_run and system is None:
        system = load_config(str(last_stage(Path(model)) / "config.yaml")).data.system
    sample = Sample("predict", (Turn("user", tuple(parts)),), origin=str(image))
    if system is not None:
        sample = with_system(sample, system_prompt(system))
    with autocast(precision, network.device):
        text = reply(network, encoder, sample, max_new_tokens)
    geometry = encoder.encode_prompt(sample).geometry[0]
    points, clicks = (encoder.coordinates.parse_points(text, geometry, click) for click in (False, True))
    boxes = encoder.coordinates.parse(text, geometry)
    with autocast(precision, network.device):
        masks = _masks(network, encoder, sample, text, boxes) if with_masks else []
    return Prediction(text, boxes, points, clicks, masks)


def open_model(name: str, checkpoint: str | None = None) -> tuple[torch.nn.Module, Encoder, Precision]:
    """A run folder, an exported folder of either form, or a model's folder or name: the model in eval mode, its
    encoder, and what its products need. checkpoint: of a run (None: the latest)."""
    if Path(name, "config.yaml").is_file():
        loaded = load_run(Path(name), checkpoint or "latest")
        return loaded.model, loaded.encoder, loaded.precision
    return *_load_exported(Path(name), resolve_model(name)), "fp32"


def _load_exported(folder: Path, path: str) -> tuple[torch.nn.Module, Encoder]:
    """A model folder or hub name, or a folder of a peft adapter, which names its base."""
    described = folder / "adapter_config.json"
    if not described.is_file():
        network = load_model(path).eval()
        return network, build_encoder(load_processor(path), network)
    try:
        name = json.loads(described.read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise VlmtuneError(f"{described} is damaged ({error}); export the adapter again.") from error
    if not name:
        raise VlmtuneError(
            f"{described} names no base model; write the base's folder or hub name as base_model_name_or_path."
        )
    base = load_model(name)
    encoder = build_encoder(load_processor(path), base)
    return load_plain_peft(base, folder), encoder


def _masks(network, encoder: Encoder, sample: Sample, text: str, boxes: list[Box]) -> list[Image.Image]:
    if not boxes and not any(isinstance(part, Boxes) for turn in sample.turns for part in turn.parts):
        raise VlmtuneError(f"nothing to give a mask of: no --region, and no box in the reply {text[:60]!r}.")
    if boxes:
        words = encoder.coordinates.without_places(text).strip()
        parts = (*((Text(words + " "),) if words else ()), Boxes(tuple(boxes)))
        sample = replace(sample, turns=(*sample.turns, Turn("assistant", parts)))
    return masks_of_sample(network, encoder, sample)


def _prompt_parts(prompt: str, region: str | None) -> list[Text | Boxes]:
    if region is None:
        if "[region]" in prompt:
            raise VlmtuneError("the prompt says [region], but no --region was given; write --region x1,y1,x2,y2.")
        return [Text(prompt)]
    numbers = region.split(",")
    try:
        x1, y1, x2, y2 = (float(n) for n in numbers)
    except ValueError as error:
        raise VlmtuneError(f"--region {region!r}: write x1,y1,x2,y2 in pixels.") from error
    if x2 < x1 or y2 < y1:
        raise VlmtuneError(f"--region {region!r}: x2 is below x1, or y2 below y1; write left,top,right,bottom.")
    before, mark, after = prompt.partition("[region]")
    if not mark:
        raise VlmtuneError("--region was given, but the prompt does not say [region]; put it where the box belongs.")
    return [part for part in (Text(before), Boxes(((x1, y1, x2, y2),), region=True), Text(after)) if part != Text("")]
