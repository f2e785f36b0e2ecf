"""What one does with a run besides training it: evaluate, predict, inspect, export."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from vlmtune.adapt.library import merge_adapters
from vlmtune.adapt.new_rows import merge_new_rows
from vlmtune.adapt.plan import Plan, apply_plan
from vlmtune.build import (
    build_encoder,
    build_eval_groups,
    build_source,
    fit_data,
    load_base,
    load_model,
    policies,
    resolve_model,
)
from vlmtune.checkpoint import checkpoints, load_weights
from vlmtune.config import Config, load_config
from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.prompts import system_prompt
from vlmtune.data.sources import with_system
from vlmtune.evaluate.evaluation import evaluate
from vlmtune.evaluate.generate import reply
from vlmtune.evaluate.regions import masks_of_sample
from vlmtune.models.anatomy import anatomy_of
from vlmtune.models.load import load_processor, save_processor
from vlmtune.models.readouts import detach_readouts
from vlmtune.observe.log import CountingBar
from vlmtune.outcome import metrics_table
from vlmtune.types import Box, Boxes, ImageRef, Point, Sample, Text, Turn, VlmtuneError

LOGIT_TOLERANCE = 1e-4
"""Merged and adapter logits in float32: W x + s·B(A x) and (W + s·B A) x differ by rounding of products of size ~10."""


@dataclass
class Loaded:
    """A model with a checkpoint's weights in it, in eval mode."""

    model: torch.nn.Module
    encoder: Encoder
    config: Config
    model_path: str
    plan: Plan | None


def load_run(run: Path, checkpoint: str) -> Loaded:
    """The model of a run folder. checkpoint: latest, best, base (untouched), or step_…"""
    if not (run / "config.yaml").is_file():
        raise VlmtuneError(f"{run} is not a run folder: config.yaml is missing.")
    config = load_config(str(run / "config.yaml"))
    folder = None if checkpoint == "base" else find_checkpoint(run, checkpoint)
    base = load_base(config)
    encoder = build_encoder(base.processor, base.model, config.data)
    plan = None
    if folder is not None:
        plan = apply_plan(base.model, policies(config), config.model, config.train.seed, base.new_tokens)
        load_weights(folder, base.model, plan)
    return Loaded(base.model.eval(), encoder, config, base.path, plan)


def find_checkpoint(run: Path, name: str) -> Path:
    folder = run / "checkpoints" / name
    if not (folder / "state.json").is_file():
        links = [link for link in ("latest", "best") if (run / "checkpoints" / link).exists()]
        known = ", ".join([*links, *(p.name for p in checkpoints(run / "checkpoints"))]) or "none"
        why = " best exists once evaluate.every is set;" if name == "best" else ""
        raise VlmtuneError(f"{run} has no checkpoint {name!r};{why} pass --checkpoint with one of: {known}.")
    return folder


def evaluate_run(run: Path, checkpoint: str, console: Console) -> dict:
    """Metrics of a checkpoint on the run's held-out groups; prints the table."""
    loaded = load_run(run, checkpoint)
    groups = build_eval_groups(loaded.config)
    if not groups:
        raise VlmtuneError(f"{run}: its config has no data.eval, so there is nothing to evaluate on.")
    with CountingBar(console) as bar:
        groups = fit_data(loaded.config, loaded.encoder, [], groups, bar).groups
    wish = loaded.config.evaluate
    result = evaluate(
        loaded.model, loaded.encoder, groups, limit=None, batch_size=wish.batch_size,
        max_new_tokens=wish.max_new_tokens if wish.generate else None,
    )  # fmt: skip
    nested: dict[str, dict] = {}
    for name, value in result.metrics.items():
        place, metric = (
            (name[5:], "loss") if name.startswith("loss/") else (name.rpartition("/")[0], name.rpartition("/")[2])
        )
        if place:
            nested.setdefault(place, {})[metric] = {"after": value}
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
    if is_run:
        loaded = load_run(Path(model), checkpoint or "latest")
        network, encoder = loaded.model, loaded.encoder
        system = loaded.config.data.system if system is None else system
    else:
        path = resolve_model(model)
        network = load_model(path).eval()
        encoder = build_encoder(load_processor(path), network)
    sample = Sample("predict", (Turn("user", tuple(parts)),), origin=str(image))
    if system is not None:
        sample = with_system(sample, system_prompt(system))
    text = reply(network, encoder, sample, max_new_tokens)
    geometry = encoder.encode_prompt(sample).geometry[0]
    points, clicks = (encoder.coordinates.parse_points(text, geometry, click) for click in (False, True))
    boxes = encoder.coordinates.parse(text, geometry)
    masks = _masks(network, encoder, sample, text, boxes) if with_masks else []
    return Prediction(text, boxes, points, clicks, masks)


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


# ---- export -----------------------------------------------------------------------------------------------------


def export_run(run: Path, checkpoint: str, folder: Path, console: Console) -> dict:
    """Merge adapters and new rows into the base, write a plain model folder with its processor, reload it and compare
    logits with the adapter model. The coordinates that were trained are written into config.json, the token that ends
    a reply into generation_config.json.

    Raises VlmtuneError when the folder exists, when a merge changes nothing, or when the reloaded logits differ by more
    than LOGIT_TOLERANCE (relative to the largest logit).
    """
    if folder.exists():
        raise VlmtuneError(f"{folder} exists; export writes a new folder.")
    loaded = load_run(run, checkpoint)
    batch = _probe_batch(loaded)
    with torch.inference_mode():
        reference = loaded.model(**batch.inputs, use_cache=False).logits
    merged = merge_adapters(loaded.model)
    merge_new_rows(loaded.model)
    readouts = detach_readouts(loaded.model)
    if anatomy_of(loaded.model).coordinates != loaded.encoder.coordinates.name:
        loaded.model.config.coordinates = loaded.encoder.coordinates.name
    _stop_at_end_of_reply(loaded)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        loaded.model.save_pretrained(draft)
        if readouts:
            save_file(readouts, draft / "heads.safetensors", metadata={"format": "pt"})
        save_processor(loaded.encoder.processor, loaded.model_path, draft)
        again = load_model(str(draft)).eval()
        with torch.inference_mode():
            logits = again(**batch.inputs, use_cache=False).logits
        carries = batch.inputs["attention_mask"].bool()
        gap = float((logits - reference)[carries].abs().max() / reference[carries].abs().max())
        if not gap <= LOGIT_TOLERANCE:
            raise VlmtuneError(
                f"export: the reloaded model's logits differ from the trained ones by {gap:.2e} "
                f"(limit {LOGIT_TOLERANCE:g}); nothing was exported."
            )
        base = load_base(loaded.config)
        detach_readouts(base.model)
        before, after = base.model.state_dict(), again.state_dict()
        changed = sum(not torch.equal(before[name], after[name]) for name in before)
        if changed == 0:
            raise VlmtuneError(
                "export: every tensor equals the base model's; nothing was trained, nothing was exported."
            )
        proof = {"run": str(run), "checkpoint": _step_of(run, checkpoint), "merged_modules": merged,
                 "readouts": sorted(readouts), "changed_tensors": changed,
                 "tensors": len(before), "new_tokens": len(base.new_tokens),
                 "relative_logit_gap": gap, "system": _system_text(loaded.config)}  # fmt: skip
        (draft / "vlmtune_export.json").write_text(json.dumps(proof, indent=1))
        for file in draft.iterdir():  # safetensors writes files that only their owner may read
            shutil.copymode(draft / "vlmtune_export.json", file)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    console.print(
        f"{folder}: {merged} modules merged, {changed} of {len(before)} tensors changed, "
        f"reloaded logits agree to {gap:.1e}",
        highlight=False,
    )
    return proof


def _step_of(run: Path, checkpoint: str) -> str:
    """The name that does not move on with the run: "step_000100" for "latest"."""
    return checkpoint if checkpoint == "base" else find_checkpoint(run, checkpoint).resolve().name


def _stop_at_end_of_reply(loaded: Loaded) -> None:
    """Plain `generate` stops where training taught the model to: at the token behind each reply."""
    config, end = loaded.model.generation_config, loaded.encoder.end_of_reply
    known = config.eos_token_id
    stops = known if isinstance(known, list) else [] if known is None else [known]
    if end not in stops:
        config.eos_token_id = [*stops, end]


def _system_text(config: Config) -> str | None:
    """The system prompt that the exported model is used with; the model folder itself has no place for one."""
    return None if config.data.system is None else system_prompt(config.data.system).text


def _probe_batch(loaded: Loaded):
    """A few training samples of the run, to compare logits on."""
    source = build_source(loaded.config.data.train[0], loaded.config.data)
    source = fit_data(loaded.config, loaded.encoder, [source], {}).sources[0]
    samples = [source[i] for i in range(min(4, source.size or 4))]
    return collate([loaded.encoder.encode(sample) for sample in samples], loaded.encoder.pad_token_id)
