"""The one door to peft's models: inject adapters by full module path, read their weights, load them, merge them."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmtune.adapt.methods import Adapter
from vlmtune.types import VlmtuneError

DEFAULT = "default"
MERGE_TOLERANCE = 1e-4
"""Of a merged layer in float32, relative to its largest output: rounding of (W + dW) x against W x + dW x."""


def inject(model: nn.Module, adapters: list[Adapter], seed: int) -> set[str]:
    """Put the adapters into `model` in place; what they draw at random comes from `seed` alone.

    Returns the names (as in `model.named_parameters()`) of their trainable parameters: some methods keep fixed ones.
    Raises VlmtuneError when peft refuses, or adapts other modules than planned.
    """
    trainable: set[str] = set()
    for adapter in adapters:
        known = {id(parameter) for parameter in model.parameters()}
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _kept_in_float32():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # several adapters are meant
            warnings.filterwarnings("ignore", ".*a tied layer is part of the adapter")  # merging unties it
            warnings.filterwarnings("ignore", module=r"peft\.tuners\.(boft|vera|pvera)\.")  # of kernels, of seeds
            torch.manual_seed(seed)
            try:
                # as peft.inject_adapter_in_model does, which refuses methods that share tensors drawn from a seed
                PEFT_TYPE_TO_TUNER_MAPPING[adapter.config.peft_type](model, adapter.config, adapter_name=adapter.name)
            except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
                rule = next(iter(adapter.targets.values())).rule
                raise VlmtuneError(
                    f"plan: rule {rule!r}: peft cannot put {adapter.method} into these modules "
                    f"({' '.join(str(error).split())})."
                ) from error
        trainable |= {name for name, p in model.named_parameters() if id(p) not in known and p.requires_grad}
        wrapped = {path for path, module in tuner_layers(model) if adapter.name in _adapters_in(module)}
        if wrapped != set(adapter.targets):
            odd = sorted(wrapped ^ set(adapter.targets))[:3]
            raise VlmtuneError(f"plan: peft adapted other modules than planned: {', '.join(odd)}.")
    for adapter in adapters:  # a later adapter switches the earlier ones off
        for path in adapter.targets:
            model.get_submodule(path).set_adapter([adapter.name])
    return trainable


@contextlib.contextmanager
def _kept_in_float32() -> Iterator[None]:
    """Inside, what peft draws is not rounded to the format of a base in bfloat16 on its way to float32: the same seed
    begins with the same numbers over every base."""
    original = BaseTunerLayer._get_base_layer_device_and_dtype

    def asked(self: BaseTunerLayer, *args: Any) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = original(self, *args)
        return device, torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

    BaseTunerLayer._get_base_layer_device_and_dtype = asked
    try:
        yield
    finally:
        BaseTunerLayer._get_base_layer_device_and_dtype = original


def tuner_layers(model: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _adapters_in(layer: BaseTunerLayer) -> set[str]:
    """Names of the adapters that have weights in this layer."""
    held = (getattr(layer, name, {}) for name in layer.adapter_layer_names)
    return {key for container in held if hasattr(container, "keys") for key in container.keys()}  # noqa: SIM118


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, every adapter is switched off: the base model, with what was trained in full."""
    layers = [layer for _, layer in tuner_layers(model)]
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for name, parameter in model.named_parameters():  # switching changes what trains
            parameter.requires_grad_(flags[name])


# ---- on disk ----------------------------------------------------------------------------------------------------


def adapter_state(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Tensors of one adapter under peft's own names."""
    return get_peft_model_state_dict(model, adapter_name=adapter.name, save_embedding_layers=False)


def adapter_folder(root: Path, adapter: Adapter) -> Path:
    """peft's own layout: the default adapter lies in the folder itself, the others in folders of their names."""
    return root if adapter.name == DEFAULT else root / adapter.name


def save_adapter(state: dict[str, Tensor], config: PeftConfig, folder: Path) -> None:
    """A folder that `peft.PeftModel.from_pretrained(base, folder)` loads: names carry peft's `base_model.model.`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}": value.contiguous() for name, value in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    described = config.to_dict()
    for key, value in described.items():
        if isinstance(value, set):
            described[key] = sorted(value)
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=2, default=str))


def load_adapter(model: nn.Module, adapter: Adapter, folder: Path) -> None:
    """Load into an adapter that is already injected. Any missing or unexpected tensor is an error (PAINS 16)."""
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (FileNotFoundError, SafetensorError) as error:
        raise VlmtuneError(f"{folder}/adapter_model.safetensors is missing or damaged ({error}).") from error
    tensors = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    expected = adapter_state(model, adapter)
    if set(tensors) != set(expected):
        odd = sorted(set(tensors) ^ set(expected))
        raise VlmtuneError(
            f"{folder}: adapter tensors do not fit the plan, for example {odd[0]}; was the plan changed?"
        )
    wrong = [name for name in tensors if tensors[name].shape != expected[name].shape]
    if wrong:
        raise VlmtuneError(f"{folder}: {wrong[0]} has another shape than the plan's; was the rank changed?")
    set_peft_model_state_dict(model, tensors, adapter_name=adapter.name)


# ---- merging ----------------------------------------------------------------------------------------------------


def merge_adapters(model: nn.Module) -> int:
    """Put every adapter into its base weight and the plain module back; returns how many modules were merged.

    Each merge is proved on random inputs: the merged layer answers as the adapted one did, and its weight has changed
    unless the adapter did nothing. Raises VlmtuneError where that fails, and for a method that cannot be merged.
    """
    layers = tuner_layers(model)
    for path, layer in layers:
        require_mergeable(layer, path)
    _untie_adapted_head(model)
    for path, layer in layers:
        _merge(model, path, layer)
    return len(layers)


def _untie_adapted_head(model: nn.Module) -> None:
    """Give a tied head that has an adapter a weight of its own: merged into the shared one, it would change the
    embedding too."""
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, BaseTunerLayer) or head.get_base_layer().weight is not embed.weight:
        return
    base = head.get_base_layer()
    base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def require_mergeable(layer: BaseTunerLayer, path: str) -> None:
    """Raises VlmtuneError for an adapter around a whole sub-layer (it is no weight), and a quantised base weight."""
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear):
        raise VlmtuneError(
            f"merge: the adapter of {path} is not linear, so no weight can stand for it; keep the adapter: "
            "`vlmtune export --as adapter`."
        )
    if not base.weight.is_floating_point():
        raise VlmtuneError(f"merge: the base weight of {path} is quantised; merge into the base that it was made from.")


@torch.no_grad()
def _merge(model: nn.Module, path: str, layer: BaseTunerLayer) -> None:
    base = layer.get_base_layer()
    probe = torch.randn(4, base.in_features, generator=torch.Generator().manual_seed(0)).to(base.weight)
    plain, adapted = base(probe), layer(probe)
    before = base.weight.detach().clone()
    try:
        layer.merge(safe_merge=True)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise VlmtuneError(f"merge: peft cannot merge {path} ({' '.join(str(error).split())}).") from error
    base = layer.get_base_layer()
    if not torch.equal(plain, adapted) and torch.equal(before, base.weight):
        raise VlmtuneError(f"merge: {path} did not change although its adapter is not zero (lost to rounding?).")
    gap = float((base(probe) - adapted).abs().max() / adapted.abs().max().clamp(min=1e-12))
    allowed = max(MERGE_TOLERANCE, 8 * torch.finfo(base.weight.dtype).eps)
    if not gap <= allowed:
        raise VlmtuneError(
            f"merge: {path} answers differently by {gap:.1e} once merged (allowed {allowed:.1e}); this method or this "
            "number format cannot be merged, use `vlmtune export --as adapter`."
        )
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, base)
