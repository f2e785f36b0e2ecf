"""The one door to peft: inject LoRA by full module path, read its weights, load them, merge them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmtune.types import VlmtuneError

ADAPTER = "default"


@dataclass(frozen=True)
class LoraTarget:
    """LoRA on one linear module: y = W x + (alpha / rank) · B A x."""

    rank: int
    alpha: float
    dropout: float


def inject_lora(model: nn.Module, targets: Mapping[str, LoraTarget], base_name: str, seed: int) -> LoraConfig:
    """Wrap the named modules (full paths) in place; A is Kaiming-uniform from `seed`, B is zero.

    Full paths only: suffixes would also hit a tower whose layers have the same names (PAINS 8).
    """
    dropouts = {t.dropout for t in targets.values()}
    if len(dropouts) > 1:
        raise VlmtuneError(
            f"plan: LoRA rules with different dropout ({sorted(dropouts)}) cannot share one adapter yet."
        )
    first = next(iter(targets.values()))
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        lora_dropout=first.dropout,
        target_modules="|".join(re.escape(name) for name in targets),
        rank_pattern={f"^{re.escape(n)}$": t.rank for n, t in targets.items() if t.rank != first.rank},
        alpha_pattern={f"^{re.escape(n)}$": t.alpha for n, t in targets.items() if t.alpha != first.alpha},
        base_model_name_or_path=base_name,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER)
    wrapped = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if wrapped != set(targets):
        raise VlmtuneError(f"plan: peft adapted other modules than planned: {sorted(wrapped ^ set(targets))[:3]}.")
    return config


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Adapter tensors under peft's own names, empty without an adapter."""
    if not has_adapter(model):
        return {}
    return get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)


def has_adapter(model: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def save_adapter(state: dict[str, Tensor], config: LoraConfig, folder: Path) -> None:
    """A folder that `peft.PeftModel.from_pretrained(base, folder)` loads: names carry peft's `base_model.model.`."""
    folder.mkdir(parents=True)
    tensors = {f"base_model.model.{name}": value.contiguous() for name, value in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    described = config.to_dict()
    described["target_modules"] = (
        sorted(described["target_modules"])
        if isinstance(described["target_modules"], set)
        else described["target_modules"]
    )
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=2, default=str))


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Load into an adapter that is already injected. Any missing or unexpected tensor is an error (PAINS 16)."""
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    expected = adapter_state(model)
    if set(tensors) != set(expected):
        odd = sorted(set(tensors) ^ set(expected))
        raise VlmtuneError(
            f"{folder}: adapter tensors do not fit the plan, for example {odd[0]}; was the plan changed?"
        )
    wrong = [name for name in tensors if tensors[name].shape != expected[name].shape]
    if wrong:
        raise VlmtuneError(f"{folder}: {wrong[0]} has another shape than the plan's; was the rank changed?")
    set_peft_model_state_dict(model, tensors, adapter_name=ADAPTER)


def merge_adapters(model: nn.Module) -> int:
    """Add every adapter to its base weight and put the plain module back; returns how many modules changed.

    Raises VlmtuneError if a merged weight equals the base although its adapter is not zero.
    """
    merged = 0
    for name, module in list(model.named_modules()):
        if not isinstance(module, BaseTunerLayer):
            continue
        before = module.get_base_layer().weight.detach().clone()
        delta = module.get_delta_weight(ADAPTER)
        module.merge(safe_merge=True, adapter_names=[ADAPTER])
        base = module.get_base_layer()
        if bool(delta.abs().max() > 0) and torch.equal(before, base.weight):
            raise VlmtuneError(f"merge: {name} did not change although its adapter is not zero (lost to rounding?).")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, base)
        merged += 1
    return merged
