"""Where the result of a plan can be used, said before it is trained (PAINS 11)."""

from __future__ import annotations

import math

from peft import LoraConfig
from torch import nn

from vlmtune.adapt.methods import Adapter, alpha_of, rank_of
from vlmtune.adapt.plan import Plan
from vlmtune.models.anatomy import anatomy_of, canonical_name, part_of

NONLINEAR = {
    "adapter": "bottleneck adapters",
    "cross_modal": "cross-modal adapters",
    "prefix": "prefixes in the attention",
}
"""Method that no weight stands for, so that it cannot be merged -> in words."""
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # its option --max-lora-rank

GGUF_REASON = (
    "GGUF needs the language model and the vision part in two files (the second is llama.cpp's mmproj), and vlmtune "
    "has no conversion whose answers were compared with the trained model's. Export with --as merged and convert that "
    "folder with llama.cpp's convert_hf_to_gguf.py, once with and once without --mmproj, then compare answers."
)


def why_not_merged(plan: Plan) -> str | None:
    """None where every adapter can be merged into the weights, else the reason."""
    found = _nonlinear(plan)
    return f"{found} cannot be merged, because no weight stands for them" if found else None


def _nonlinear(plan: Plan) -> str:
    methods = {adapter.method for adapter in plan.adapters}
    return " and ".join(name for method, name in NONLINEAR.items() if method in methods)


def why_not_plain_peft(plan: Plan) -> str | None:
    """None where one folder of plain peft holds all that the plan trains, else the reason."""
    ours = _nonlinear(plan)
    if not plan.adapters:
        return "there is no adapter in the plan; its result is a whole model"
    if ours:
        return f"peft has no {ours}"
    if len(plan.adapters) > 1:
        methods = ", ".join(adapter.method for adapter in plan.adapters)
        return (
            f"rules with other methods, options or dropout make {len(plan.adapters)} adapters ({methods}), and peft "
            "has one active at a time"
        )
    if plan.new_tokens:
        return "the rows of new tokens are not part of a peft folder"
    if any(name.startswith("heads.") for name in plan.parameters):
        return "read-outs are not part of a peft folder"
    if plan.adapters[0].config.__dict__.get("init_lora_weights") in ("pissa", "olora"):
        return f"{plan.adapters[0].config.init_lora_weights} changes the base weights when it starts"
    return None


def why_not_vllm_lora(model: nn.Module, plan: Plan) -> str | None:
    """None where vLLM can serve the checkpoint's adapter beside the base model, else the reason.

    vLLM reads one rank and one alpha from adapter_config.json (`vllm/lora/peft_helper.py`): other ranks are fine as
    long as alpha / rank is the same everywhere.
    """
    reason = why_not_plain_peft(plan)
    if reason:
        return reason
    adapter = plan.adapters[0]
    if adapter.method != "lora":
        return f"vLLM has no {adapter.method}"
    config: LoraConfig = adapter.config
    if config.use_dora:
        return "vLLM has no DoRA"
    if config.lora_bias or config.bias != "none":
        return "vLLM has no LoRA with bias"
    full = [name for name in plan.parameters if name not in plan.adapter_parameters]
    if full:
        return f"{part_of(full[0])} is trained in full, and vLLM takes LoRA alone"
    anatomy = anatomy_of(model)
    outside = [path for path in adapter.targets if part_of(canonical_name(anatomy, f"{path}.weight")) != "language"]
    if outside:
        return f"LoRA on {outside[0]} is not in the language model, which vLLM ignores for most families"
    if max(rank_of(target) for target in adapter.targets.values()) > _VLLM_RANKS[-1]:
        return f"its rank is above {_VLLM_RANKS[-1]}"
    if len({_scaling(adapter, path) for path in adapter.targets}) > 1:
        return "alpha / rank differs between modules, and vLLM reads one of them"
    return None


def _scaling(adapter: Adapter, path: str) -> float:
    target = adapter.targets[path]
    rank = rank_of(target)
    return alpha_of(target) / (math.sqrt(rank) if adapter.config.use_rslora else rank)


def serving_notes(model: nn.Module, plan: Plan) -> list[str]:
    """One line for every way of using the result: merged folder, plain peft, vLLM."""
    merged, peft, vllm = why_not_merged(plan), why_not_plain_peft(plan), why_not_vllm_lora(model, plan)
    own_tower = type(model.get_submodule(anatomy_of(model).vision)).__module__.startswith("vlmtune.")
    if merged is not None:
        notes = [f"merged: not possible, {merged}; keep it with `vlmtune export --as adapter`"]
    elif own_tower:
        notes = ["merged: `vlmtune export`, for from_pretrained after `import vlmtune.models.efficientnet` (its tower)"]
    else:
        notes = ["merged: `vlmtune export` writes a folder for plain from_pretrained, which vLLM serves too"]
    notes.append("plain peft: `vlmtune export --as adapter`" if peft is None else f"plain peft: no, {peft}")
    if own_tower:
        notes.append("vLLM: no, the vision tower is vlmtune's own")
    elif vllm is None:
        rank = max(rank_of(target) for target in plan.adapters[0].targets.values())
        limit = next(size for size in _VLLM_RANKS if size >= rank)
        notes.append(f"vLLM beside the base model: --enable-lora --max-lora-rank {limit}")
    elif merged is None:
        notes.append(f"vLLM beside the base model: no, {vllm}; serve the merged export")
    else:
        notes.append(f"vLLM: no, {vllm}")
    return notes
