"""Prefix tuning as a method of peft: learned keys and values that every token of a decoder block attends to.

Li & Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation. peft's own prefix tuning puts the prefix
into the KV cache, where multi-dimensional rotary positions (Qwen2.5-VL, Qwen3-VL) and bidirectional image masks
(Gemma 3) do not survive it; here it enters inside the attention function (`models/attention.py`), which all families
share. The gate that starts at zero is that of Zhang et al. 2023, LLaMA-Adapter, per head: at step 0 the model is the
base model, bit for bit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from vlmtune.adapt.extension import SubLayer, SubLayerConfig, SubLayerTuner, new_peft_type, register, require_size
from vlmtune.models.anatomy import anatomy_of
from vlmtune.models.attention import Prefix, attending_to, use_plain_attention, use_prefix_attention
from vlmtune.types import VlmtuneError

PREFIXKV = new_peft_type("PREFIXKV")

_SPREAD = 0.02
"""Standard deviation of new keys and values: that of embeddings in the families we know."""


@dataclass
class PrefixConfig(SubLayerConfig):
    """length: how many keys and values per key-value head. gated: start as the base model; False is Li & Liang's form.

    target_modules: attention modules of the language model's blocks (`…layers.7.self_attn`).
    """

    length: int = 16
    gated: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PREFIXKV
        require_size("prefix", "length", self.length)
        if not isinstance(self.gated, bool):
            raise VlmtuneError(f"prefix: gated is {self.gated!r}; write true or false.")


class PrefixLayer(SubLayer):
    """An attention module that also attends to the keys and values of its active adapter."""

    method = "prefix"
    adapter_layer_names = ("prefixkv_key", "prefixkv_value", "prefixkv_gate")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.prefixkv_key = nn.ParameterDict()
        self.prefixkv_value = nn.ParameterDict()
        self.prefixkv_gate = nn.ParameterDict()

    def update_layer(self, adapter_name: str, config: PrefixConfig) -> None:
        attention = self.get_base_layer()
        heads = attention.config.num_attention_heads
        shape = (attention.config.num_key_value_heads, config.length, attention.head_dim)
        options = {"dtype": torch.float32, "device": self.base_device()}
        self.prefixkv_key[adapter_name] = nn.Parameter(torch.randn(shape, **options) * _SPREAD)
        self.prefixkv_value[adapter_name] = nn.Parameter(torch.randn(shape, **options) * _SPREAD)
        if config.gated:
            self.prefixkv_gate[adapter_name] = nn.Parameter(torch.zeros(heads, **options))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the attention module returns."""
        active = self.active_here()
        if not active:
            return self.base_layer(*args, **kwargs)
        if len(active) > 1:
            raise VlmtuneError(f"prefix: {', '.join(active)} are active on one attention module; activate one of them.")
        (name,) = active
        gate = self.prefixkv_gate.get(name)
        with attending_to(self.get_base_layer(), Prefix(self.prefixkv_key[name], self.prefixkv_value[name], gate)):
            return self.base_layer(*args, **kwargs)


class PrefixTuner(SubLayerTuner):
    prefix = "prefixkv_"
    tuner_layer_cls = PrefixLayer

    def require_supported(self, target: nn.Module, path: str) -> None:
        blocks = anatomy_of(self.model).language_layers
        attention = target.get_base_layer() if isinstance(target, SubLayer) else target
        is_attention = all(hasattr(attention, name) for name in ("config", "head_dim", "num_key_value_groups"))
        if not re.fullmatch(rf"{re.escape(blocks)}\.\d+\.\w+", path) or not is_attention:
            raise VlmtuneError(
                f"prefix: {path} ({type(attention).__name__}) is not the attention module of a block in {blocks}; "
                "a prefix can be learned there only."
            )

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        use_prefix_attention(model)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        use_plain_attention(model)
        return model


register("prefixkv", PrefixConfig, PrefixTuner)
