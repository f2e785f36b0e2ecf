"""What training changed: the tensors of a checkpoint, out of a model and back into it (SPEC D8, PAINS 4, 7)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from vlmtune.adapt.library import adapter_folder, adapter_state, load_adapter, save_adapter
from vlmtune.adapt.plan import Plan
from vlmtune.shards import fold, own_rows
from vlmtune.types import VlmtuneError


def trained_state(model: nn.Module, plan: Plan) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """(fully trained tensors by canonical name, adapter name -> its tensors by peft name): all that differs from the
    base. Those of a sharded model may be in parts.

    Buffers of modules that train (BatchNorm statistics) belong to the first. Raises VlmtuneError unless every trainable
    parameter is in exactly one of them, and whatever else they hold is a fixed tensor that an adapter brought.
    """
    fold(model)
    full = {name: p.detach() for name, p in plan.parameters.items() if name not in plan.adapter_parameters}
    adapters = {adapter.name: adapter_state(model, adapter) for adapter in plan.adapters}
    saved = [own_rows(value).data_ptr() for value in full.values()]
    saved += [value.data_ptr() for state in adapters.values() for value in state.values()]
    held = {name: own_rows(parameter) for name, parameter in plan.parameters.items()}
    # of a short tensor in parts a process may hold no row, which lies nowhere
    counts = {name: saved.count(rows.data_ptr()) for name, rows in held.items() if rows.numel()}
    wrong = [name for name, count in counts.items() if count != 1]
    if wrong:
        raise VlmtuneError(
            f"checkpoint: {wrong[0]} trains, but {counts[wrong[0]]} saved tensors hold it; what is saved and the "
            f"{len(plan.parameters)} trainable parameters do not agree. This is a bug, please report the plan."
        )
    return full | trained_buffers(model, plan), adapters


def trained_buffers(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Persistent buffers of modules with a parameter of their own that trains at some time, as `buffer:<name>`."""
    persistent = model.state_dict().keys()
    trained = {id(parameter) for parameter in plan.parameters.values()}
    return {
        f"buffer:{path}.{leaf}": buffer
        for path, module in model.named_modules()
        if any(id(p) in trained for p in module.parameters(recurse=False))
        for leaf, buffer in module.named_buffers(recurse=False)
        if f"{path}.{leaf}" in persistent
    }


def load_trained(model: nn.Module, plan: Plan, tensors: dict[str, Tensor], where: str) -> None:
    """Copy fully trained tensors back. Missing, unexpected or misshapen ones are errors naming `where`.

    tensors: of those in parts the rows of this process.
    """
    fold(model)  # what a forward gathered would be an old copy
    current = {name: p for name, p in plan.parameters.items() if name not in plan.adapter_parameters}
    current |= trained_buffers(model, plan)
    if set(current) != set(tensors):
        odd = sorted(set(current) ^ set(tensors))
        raise VlmtuneError(f"{where}: stored tensors do not fit the plan, for example {odd[0]}; was the plan changed?")
    for name, value in tensors.items():
        own = own_rows(current[name])
        if own.shape != value.shape:
            raise VlmtuneError(f"{where}: {name} has shape {tuple(value.shape)}, the plan {tuple(own.shape)}.")
        own.copy_(value)


def save_adapters(states: dict[str, dict[str, Tensor]], plan: Plan, root: Path) -> None:
    for adapter in plan.adapters:
        save_adapter(states[adapter.name], adapter.config, adapter_folder(root, adapter))


def load_adapters(model: nn.Module, plan: Plan, root: Path) -> None:
    """Raises VlmtuneError where the folder holds other adapters than the plan, or other tensors in them."""
    planned = {adapter_folder(root, adapter) for adapter in plan.adapters}
    stored = {path.parent for path in root.rglob("adapter_config.json")} if root.is_dir() else set()
    if planned != stored:
        odd = sorted(str(path) for path in planned ^ stored)
        raise VlmtuneError(f"{root.parent}: the plan and the checkpoint disagree about the adapter in {odd[0]}.")
    for adapter in plan.adapters:
        load_adapter(model, adapter, adapter_folder(root, adapter))
