"""`vlmtune export`: a run's checkpoint as a plain model folder or as an adapter folder, each with its proof.

merged: adapters and new rows are put into the base weights; loads with plain `from_pretrained`.
adapter: what plain peft loads where the plan allows it, else a folder that `vlmtune predict --model` takes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from vlmtune.adapt.library import merge_adapters
from vlmtune.adapt.new_rows import merge_new_rows
from vlmtune.adapt.peft_folder import load_plain_peft, write_peft_folder
from vlmtune.adapt.serving import GGUF_REASON, why_not_merged, why_not_plain_peft
from vlmtune.build import build_source, fit_data, load_base, load_model
from vlmtune.build_course import policies
from vlmtune.card import write_card
from vlmtune.checkpoint import copy_weights
from vlmtune.config import Config, dump_config
from vlmtune.data.batch import collate
from vlmtune.data.prompts import system_prompt
from vlmtune.models.anatomy import anatomy_of
from vlmtune.models.load import save_processor, stored_dtype
from vlmtune.models.merging import model_inputs
from vlmtune.models.quantise import QUANTISED
from vlmtune.models.readouts import detach_readouts
from vlmtune.optim.precision import Precision, autocast
from vlmtune.paths import new_folder
from vlmtune.probe import FILE as PROBE
from vlmtune.probe import Probe
from vlmtune.types import Batch, VlmtuneError
from vlmtune.use import Loaded, find_checkpoint, last_stage, load_run

Form = Literal["merged", "adapter", "gguf"]

LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of merged against adapted logits, relative to the largest, by the format of the exported weights. float32: W x +
s·B(A x) and (W + s·B A) x differ by rounding of products of size ~10. The others round every merged weight to 8 or 11
bits, which a stack of layers multiplies by about ten."""


def export_run(run: Path, checkpoint: str, folder: Path, console: Console, form: Form = "merged") -> dict:
    """Write `folder`, reload what was written, and compare its logits with those of the trained model.

    Returns the proof that is also written to vlmtune_export.json. Raises VlmtuneError when the folder exists, for a
    form that this plan cannot take, when a merge changes nothing, and when logits differ by more than LOGIT_TOLERANCE.
    """
    if form == "gguf":
        raise VlmtuneError(f"export --as gguf is not offered: {GGUF_REASON}")
    if folder.exists():
        raise VlmtuneError(f"{folder} exists; export writes a new folder.")
    loaded = load_run(run, checkpoint, as_stored=False)
    if form == "adapter":
        return _export_adapter(loaded, run, checkpoint, folder, console)
    return _export_merged(loaded, run, checkpoint, folder, console)


@torch.inference_mode()
def _logits(model: torch.nn.Module, batch: Batch, precision: Precision = "fp32") -> Tensor:
    """float32[N, V] of the tokens that are not padding."""
    batch = batch.to(next(model.parameters()).device)
    with autocast(precision, batch.inputs["input_ids"].device):
        logits = model(**model_inputs(model, batch), use_cache=False).logits
    return logits[batch.inputs["attention_mask"].bool()].float().cpu()


def _gap(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest value of `other`."""
    return float((one - other).abs().max() / other.abs().max())


# ---- merged -----------------------------------------------------------------------------------------------------


def _export_merged(loaded: Loaded, run: Path, checkpoint: str, folder: Path, console: Console) -> dict:
    """The coordinates that were trained are written into config.json, the token that ends a reply into
    generation_config.json. The weights have the number format of the base model's files."""
    reason = None if loaded.plan is None else why_not_merged(loaded.plan)
    if reason:
        raise VlmtuneError(f"export: {reason}; use `vlmtune export --as adapter`.")
    batch = _probe_batch(loaded, run, checkpoint)
    reference = _logits(loaded.model, batch)
    quantised = _quantised_logits(loaded, run, checkpoint, batch)
    merged = merge_adapters(loaded.model)
    merge_new_rows(loaded.model)
    readouts = detach_readouts(loaded.model)
    if anatomy_of(loaded.model).coordinates != loaded.encoder.coordinates.name:
        loaded.model.config.coordinates = loaded.encoder.coordinates.name
    _stop_at_end_of_reply(loaded)
    dtype = stored_dtype(loaded.model_path)
    with new_folder(folder) as draft:
        loaded.model.to(dtype).save_pretrained(draft)
        if readouts:
            save_file(readouts, draft / "heads.safetensors", metadata={"format": "pt"})
        save_processor(loaded.encoder.processor, loaded.model_path, draft)
        again = load_model(str(draft)).eval()
        final = _logits(again, batch)
        gap = _gap(final, reference)
        if not gap <= LOGIT_TOLERANCE[dtype]:
            raise VlmtuneError(
                f"export: the reloaded model's logits differ from the trained ones by {gap:.2e} "
                f"(limit {LOGIT_TOLERANCE[dtype]:g}); nothing was exported."
            )
        base = load_base(loaded.config, as_stored=False)
        detach_readouts(base.model)
        before, after = base.model.state_dict(), again.state_dict()
        changed = sum(not torch.equal(before[name], after[name]) for name in before)
        if changed == 0:
            raise VlmtuneError(
                "export: every tensor equals the base model's; nothing was trained, nothing was exported."
            )
        proof = {"run": str(run), "checkpoint": _step_of(run, checkpoint), "merged_modules": merged,
                 "readouts": sorted(readouts), "changed_tensors": changed,
                 "tensors": len(before), "new_tokens": len(base.new_tokens), "dtype": str(dtype).removeprefix("torch."),
                 "relative_logit_gap": gap, "system": _system_text(loaded.config)}  # fmt: skip
        if quantised is not None:
            proof["quantised_gaps"] = {
                "quantised to full": _gap(quantised, reference),
                "full to merged": gap,
                "quantised to merged": _gap(final, quantised),
            }
        (draft / "vlmtune_export.json").write_text(json.dumps(proof, indent=1))
        write_card(draft, last_stage(run), folder.name)
    console.print(
        f"{folder}: {merged} modules merged, {changed} of {len(before)} tensors changed, "
        f"reloaded logits agree to {gap:.1e}",
        highlight=False,
    )
    if quantised is not None:
        three = proof["quantised_gaps"]
        console.print(
            "trained on a quantised base, merged into the full one. Largest difference of logits: quantised base + "
            f"adapter to full base + adapter {three['quantised to full']:.1e}, full base + adapter to merged "
            f"{gap:.1e}, quantised base + adapter to merged {three['quantised to merged']:.1e}",
            highlight=False,
        )
    return proof


def _quantised_logits(loaded: Loaded, run: Path, checkpoint: str, batch: Batch) -> Tensor | None:
    """Of the model as it was trained, where its base was quantised: an adapter learned to work with that base."""
    if loaded.plan is None or not any(policy.store in QUANTISED for _, policy in policies(loaded.config)):
        return None
    trained = load_run(run, checkpoint)
    return _logits(trained.model, batch, trained.precision)


# ---- adapter ----------------------------------------------------------------------------------------------------


def _export_adapter(loaded: Loaded, run: Path, checkpoint: str, folder: Path, console: Console) -> dict:
    if loaded.plan is None:
        raise VlmtuneError("export --as adapter: the base model has no adapter; name a checkpoint of the run.")
    reason = why_not_plain_peft(loaded.plan)
    if reason and not loaded.plan.adapters:
        raise VlmtuneError(f"export --as adapter: {reason}. Use `vlmtune export` without --as.")
    batch = _probe_batch(loaded, run, checkpoint)
    reference = _logits(loaded.model, batch)
    step = _step_of(run, checkpoint)
    with new_folder(folder) as draft:
        if reason:
            _write_bundle(loaded, run, checkpoint, draft)
            again = load_run(draft, "latest", as_stored=False).model
            modules: list[str] = []
        else:
            modules = write_peft_folder(loaded.model, loaded.plan, loaded.model_path, draft)
            again = load_plain_peft(load_model(loaded.model_path), draft)
            save_processor(loaded.encoder.processor, loaded.model_path, draft)
        gap = _gap(_logits(again, batch), reference)
        if not gap <= LOGIT_TOLERANCE[torch.float32]:
            raise VlmtuneError(
                f"export: the reloaded adapter's logits differ from the trained by {gap:.2e}; nothing was exported."
            )
        proof = {"run": str(run), "checkpoint": step, "base": loaded.config.model, "loads_with": "vlmtune" if reason
                 else "peft", "why_not_peft": reason, "modules_to_save": modules, "relative_logit_gap": gap,
                 "system": _system_text(loaded.config)}  # fmt: skip
        (draft / "vlmtune_export.json").write_text(json.dumps(proof, indent=1))
        write_card(draft, last_stage(run), folder.name)
    loads = (
        f"loads with vlmtune, not with plain peft ({reason}): vlmtune predict … --model {folder}"
        if reason
        else f"loads with peft, PeftModel.from_pretrained(base, {str(folder)!r}), on the base {loaded.model_path}; and "
        f"with vlmtune predict … --model {folder}"
    )
    console.print(
        f"{folder}: {loads}; reloaded logits agree to {gap:.1e}", highlight=False, markup=False, soft_wrap=True
    )
    return proof


def _write_bundle(loaded: Loaded, run: Path, checkpoint: str, draft: Path) -> None:
    """A run folder with one checkpoint and without the state of training."""
    step = find_checkpoint(run, checkpoint).resolve()
    copy_weights(step, draft / "checkpoints" / step.name)
    (draft / "checkpoints" / "latest").symlink_to(step.name)
    (draft / "config.yaml").write_text(dump_config(loaded.config))


# ---- what both need ---------------------------------------------------------------------------------------------


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


def _probe_batch(loaded: Loaded, run: Path, checkpoint: str) -> Batch:
    """A few training samples of the run, to compare logits on: those stored with the checkpoint, so that the data need
    not be at hand."""
    folder = find_checkpoint(run, checkpoint) if checkpoint != "base" else None
    if folder is not None and (folder / PROBE).is_file():
        return Probe.load(folder).batch
    source = build_source(loaded.config.data.train[0], loaded.config.data)
    source = fit_data(loaded.config, loaded.encoder, [source], {}).sources[0]
    samples = [source[i] for i in range(min(4, source.size or 4))]
    return collate([loaded.encoder.encode(sample) for sample in samples], loaded.encoder.pad_token_id)
