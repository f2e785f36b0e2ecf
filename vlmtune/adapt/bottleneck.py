"""Bottleneck adapters as a method of peft: a narrow two-layer network after, or beside, a sub-layer of a block.

Sequential: y + s · up(act(down(y))) with y the sub-layer's output (Houlsby et al. 2019, Parameter-Efficient Transfer
Learning for NLP). Parallel: y + s · up(act(down(x))) with x its input (He et al. 2022, Towards a Unified View of
Parameter-Efficient Transfer Learning). `up` starts at zero: at step 0 the model is the base model, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vlmtune.adapt.extension import (
    SubLayer,
    SubLayerConfig,
    SubLayerTuner,
    float32_linear,
    input_of,
    join_output,
    linear_modules,
    new_peft_type,
    register,
    require_size,
    split_output,
)
from vlmtune.types import VlmtuneError

BOTTLENECK = new_peft_type("BOTTLENECK")

_ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


@dataclass
class BottleneckConfig(SubLayerConfig):
    """dim: width of the bottleneck. scale: s, by which its output is multiplied.

    target_modules: whole sub-layers (`…layers.7.self_attn`, `…layers.7.mlp`, a tower's too) or single linear modules.
    """

    dim: int = 64
    mode: Literal["sequential", "parallel"] = "sequential"
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK
        require_size("bottleneck", "dim", self.dim)
        if self.mode not in ("sequential", "parallel"):
            raise VlmtuneError(f"bottleneck: mode is {self.mode!r}; write sequential or parallel.")
        if self.activation not in _ACTIVATIONS:
            raise VlmtuneError(f"bottleneck: activation is {self.activation!r}; write {', '.join(_ACTIVATIONS)}.")
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float) or not math.isfinite(self.scale):
            raise VlmtuneError(f"bottleneck: scale is {self.scale!r}; it must be a finite number.")


class BottleneckLayer(SubLayer):
    """A sub-layer with bottlenecks around it. It may return a tuple: the first element is adapted."""

    method = "bottleneck"
    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_options",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_options: dict[str, BottleneckConfig] = {}

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        linears = list(linear_modules(self.base_layer))
        width_in, width_out = linears[0].in_features, linears[-1].out_features
        width_down = width_in if config.mode == "parallel" else width_out
        down = float32_linear(width_down, config.dim, self.base_device(), bias=True)
        up = float32_linear(config.dim, width_out, self.base_device(), bias=True)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        self.bottleneck_options[adapter_name] = config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the sub-layer returns, its hidden states float[..., D] adapted."""
        output = self.base_layer(*args, **kwargs)
        active = self.active_here()
        if not active:
            return output
        hidden, rest = split_output(output)
        for name in active:
            if self.bottleneck_options[name].mode == "parallel":
                source = input_of(args, kwargs, type(self.get_base_layer()).__name__)
            else:
                source = hidden
            hidden = hidden + self._correction(name, source).to(hidden.dtype)
        return join_output(output, hidden, rest)

    def _correction(self, name: str, source: Tensor) -> Tensor:
        """s · up(act(down(source))): float[..., width in] -> float[..., width out]."""
        down, up, options = self.bottleneck_down[name], self.bottleneck_up[name], self.bottleneck_options[name]
        narrow = _ACTIVATIONS[options.activation](down(source.to(down.weight.dtype)))
        return options.scale * up(narrow)


class BottleneckTuner(SubLayerTuner):
    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def require_supported(self, target: nn.Module, path: str) -> None:
        if next(linear_modules(target), None) is None:
            raise VlmtuneError(
                f"bottleneck: {path} ({type(target).__name__}) holds no linear module, so its width is unknown; "
                "target the attention or the feed-forward module of a block, or a linear module."
            )


register("bottleneck", BottleneckConfig, BottleneckTuner)


def find_sublayers(block: nn.Module) -> list[str]:
    """Names of the block's own children that compute with matrices: its attention and its feed-forward module.

    Norms hold no matrix. Empty for a convolutional block.
    """
    return [name for name, child in block.named_children() if next(linear_modules(child), None) is not None]
