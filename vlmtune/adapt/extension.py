"""How a method of ours becomes a method of peft: its type, its config, its layers around whole sub-layers of a block.

peft (0.21) keeps its methods in a closed enum, `PeftType`, and offers `register_peft_method` only to members of it.
We add a member by the enum's own tables; everything else (injection by `inject_adapter_in_model`, state dicts,
saving, loading, switching off) is then peft's code, as for LoRA. A folder with such an adapter loads with peft in a
process that has imported the method's module.

A tuner of ours wraps one module in place. Its parameters lie in containers keyed by adapter name, whose names begin
with the method's prefix (`bottleneck_down.default.weight`), are float32 whatever the base's format, and may be
trained and saved with any number of other methods in the same model. `inject_adapter_in_model` leaves other methods'
layers alone, but makes the new adapter the only active one in all layers of its own method: after injecting a second
adapter of one method under another name, call `set_adapter([name])` on the layers of the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn

from vlmtune.types import VlmtuneError

_ENUM_TABLES = ("_member_names_", "_member_map_", "_value2member_map_")
"""Where Python's enum (3.11 to 3.13) keeps its members."""


def new_peft_type(name: str) -> PeftType:
    """The member `name` (upper case) of peft's closed enum, made if it is new.

    Raises VlmtuneError when peft has a method of this name itself, or its enum is no longer what we know how to extend.
    """
    if name in getattr(PeftType, "__members__", {}):
        raise VlmtuneError(
            f"peft already has a method {name}, so vlmtune's cannot be registered under that name; "
            "install the peft version that vlmtune's pyproject.toml names."
        )
    if not all(hasattr(PeftType, table) for table in _ENUM_TABLES):
        raise _changed("its list of methods is not a plain enum any more")
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType._member_names_)
    member.__objclass__ = PeftType
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    is_found = PeftType(name) is member and PeftType[name] is member and getattr(PeftType, name) is member
    if not is_found or member not in list(PeftType):
        raise _changed(f"the method {name} was added to its list, but is not found there")
    return member


def register(name: str, config: type[PeftConfig], tuner: type[SubLayerTuner]) -> None:
    """Tell peft which config and which tuner belong to the method `name` (lower case)."""
    try:
        register_peft_method(name=name, config_cls=config, model_cls=tuner, prefix=tuner.prefix)
    except (KeyError, ValueError, TypeError) as error:
        raise _changed(f"it refused the method {name} ({str(error).strip().rstrip('.')})") from error


def _changed(what: str) -> VlmtuneError:
    return VlmtuneError(
        f"peft {peft.__version__} cannot take vlmtune's adapters: {what}; "
        "install the peft version that vlmtune's pyproject.toml names."
    )


@dataclass
class SubLayerConfig(PeftConfig):
    """What peft asks of every method: which modules (a regex of full paths, or a list of names), and which not."""

    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)


def require_size(method: str, field: str, value: Any) -> None:
    """VlmtuneError unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise VlmtuneError(f"{method}: {field} is {value!r}; it must be a whole number of at least 1.")


class SubLayer(nn.Module, BaseTunerLayer):
    """A module of the model with an adapter of ours around it. Subclasses name their containers and compute.

    Attributes that the model reads off the wrapped module (`layer_idx`, `attention_type`, `is_sliding` …) are the
    wrapped module's.
    """

    method = ""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # base_layer: not set yet, asking it for itself would never end; how to copy or pickle is each object's own
            if name == "base_layer" or name.startswith("__"):
                raise
            return getattr(self.base_layer, name)

    def update_layer(self, adapter_name: str, config: SubLayerConfig) -> None:
        """Make the parameters of one adapter, in the state in which the adapter changes nothing."""
        raise NotImplementedError

    def active_here(self) -> list[str]:
        """Names of the adapters that take part in the forward pass of this layer, in order."""
        if self.disable_adapters:
            return []
        here = self._get_available_adapters()
        return [name for name in self.active_adapters if name in here]

    def base_device(self) -> torch.device:
        """Where the wrapped module's matrices are: there its adapters belong."""
        return next(linear_modules(self.base_layer)).weight.device

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """For peft, after it filled an adapter made on the meta device; its own method looks for one base weight."""
        for container in (getattr(self, name) for name in self.adapter_layer_names):
            if adapter_name in container:
                container[adapter_name] = container[adapter_name].to(device or self.base_device())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise not_mergeable(self.method)

    def unmerge(self) -> None:
        """Nothing to undo: `merge` always refuses."""


class SubLayerTuner(BaseTuner):
    """Injects one kind of SubLayer wherever the config's `target_modules` point."""

    target_module_mapping: dict[str, list[str]] = {}  # no defaults: paths differ by family, the plan always knows them
    tuner_layer_cls: type[SubLayer]

    def require_supported(self, target: nn.Module, path: str) -> None:
        """VlmtuneError if the method cannot adapt the module at `path`."""
        raise NotImplementedError

    def make_layer(self, target: nn.Module, path: str) -> SubLayer:
        return self.tuner_layer_cls(target)

    def _create_and_replace(
        self,
        peft_config: SubLayerConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        self.require_supported(target, current_key)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        layer = self.make_layer(target, current_key)
        layer.update_layer(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Only that: peft's own method also copies the weight of a linear module, which sub-layers do not have."""
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise not_mergeable(self.tuner_layer_cls.method)


def not_mergeable(method: str) -> VlmtuneError:
    return VlmtuneError(
        f"{method}: this adapter is not a change of a weight matrix, so it cannot be merged into the base model; "
        "keep and load the adapter folder."
    )


def linear_modules(module: nn.Module) -> Iterator[nn.Linear]:
    """The base model's linear modules at or under `module`, in order, quantised ones included, adapters' own not."""
    if isinstance(module, BaseTunerLayer):
        yield from linear_modules(module.base_layer)
    elif isinstance(module, nn.Linear):  # bitsandbytes' Linear4bit and Linear8bitLt are subclasses
        yield module
    else:
        for child in module.children():
            yield from linear_modules(child)


def split_output(output: Any) -> tuple[Tensor, tuple]:
    """(hidden states, the rest) of what a sub-layer returned: a tensor, or a tuple that begins with one."""
    return (output[0], output[1:]) if isinstance(output, tuple) else (output, ())


def join_output(original: Any, hidden: Tensor, rest: tuple) -> Any:
    """Put changed hidden states back into the form the sub-layer returned."""
    return (hidden, *rest) if isinstance(original, tuple) else hidden


def input_of(args: tuple, kwargs: dict[str, Any], where: str) -> Tensor:
    """The hidden states a sub-layer was called with, by position or by name."""
    if args:
        return args[0]
    for name in ("hidden_states", "x", "input"):
        if isinstance(kwargs.get(name), Tensor):
            return kwargs[name]
    raise VlmtuneError(f"{where} was called with {', '.join(kwargs) or 'nothing'}, none of which is its hidden states.")


def float32_linear(inputs: int, outputs: int, device: torch.device, *, bias: bool) -> nn.Linear:
    """A linear layer in float32, even while the default format is another."""
    return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=torch.float32)
