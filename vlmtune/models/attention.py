"""Attention functions of ours, registered with transformers: SDPA that also attends to a learned prefix.

`vlmtune_prefix` is transformers' own `sdpa` function, bit for bit, until a module carries a Prefix (`attending_to`).
Then every query also attends to the prefix's keys: they have no position (no rotary embedding), and no mask ever
hides them. Masks are those of `sdpa`, so that packing, padding, sliding windows and bidirectional images stay what
they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmtune.types import VlmtuneError

PREFIX_ATTENTION = "vlmtune_prefix"

_CARRIED = "_vlmtune_prefix"
"""Attribute of an attention module, present during its forward only, that holds its Prefix."""


@dataclass(frozen=True)
class Prefix:
    """key, value float[KV, L, head_dim] of KV key-value heads. gate float[heads]: None is classic prefix tuning.

    With a gate g the attention's output is base + g · (joint - base): g = 0 is the base model, g = 1 the classic form.
    """

    key: Tensor
    value: Tensor
    gate: Tensor | None


@contextmanager
def attending_to(attention: nn.Module, prefix: Prefix) -> Iterator[None]:
    """Within, `attention` (an attention module of the text model) attends to `prefix` too."""
    setattr(attention, _CARRIED, prefix)
    try:
        yield
    finally:
        delattr(attention, _CARRIED)


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query float[B, heads, Q, D], key, value float[B, KV, K, D] -> float[B, Q,
    heads, D].

    attention_mask: bool[B, 1, Q, K] (True: attend), a float one that is added, or None.
    """
    prefix: Prefix | None = getattr(module, _CARRIED, None)
    options = {"dropout": dropout, "scaling": scaling, **kwargs}
    if prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **options)
    joint_key, joint_value, joint_mask = _prepend(module, prefix, query, key, value, attention_mask, is_causal)
    joint, _ = sdpa_attention_forward(module, query, joint_key, joint_value, joint_mask, is_causal=False, **options)
    if prefix.gate is None:
        return joint, None
    base, _ = sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **options)
    return base + (prefix.gate.view(1, 1, -1, 1) * (joint - base)).to(base.dtype), None


def _prepend(
    module: nn.Module,
    prefix: Prefix,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask with the prefix in front of them."""
    length, queries = prefix.key.shape[1], query.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if mask is None and causal and queries > 1:
        # without a mask, SDPA is causal from the first key on; keys beyond are empty slots of a static cache
        key, value = key[:, :, :queries], value[:, :, :queries]
        mask = torch.ones(1, 1, queries, queries, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        mask = F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)

    def in_front(learned: Tensor, own: Tensor) -> Tensor:
        return torch.cat([learned.to(own.dtype).expand(own.shape[0], -1, -1, -1), own], dim=2)

    return in_front(prefix.key, key), in_front(prefix.value, value), mask


AttentionInterface.register(PREFIX_ATTENTION, prefix_attention)
AttentionMaskInterface.register(PREFIX_ATTENTION, sdpa_mask)


def use_prefix_attention(model: PreTrainedModel) -> None:
    """Switch the text model to `vlmtune_prefix`; the tower keeps its attention.

    Raises VlmtuneError unless the text model uses sdpa: other functions hide what a prefix needs.
    """
    current = model.config.get_text_config()._attn_implementation
    if current not in ("sdpa", PREFIX_ATTENTION):
        raise VlmtuneError(
            f"prefix tuning needs the text model's attention to be sdpa, but it is {current!r}; "
            "load the model with sdpa."
        )
    _set_text_attention(model, PREFIX_ATTENTION)


def use_plain_attention(model: PreTrainedModel) -> None:
    """Switch the text model back to sdpa, if it was on `vlmtune_prefix`."""
    if model.config.get_text_config()._attn_implementation == PREFIX_ATTENTION:
        _set_text_attention(model, "sdpa")


def _set_text_attention(model: PreTrainedModel, name: str) -> None:
    model.set_attn_implementation({"text_config": name})
    for config in (model.config.get_text_config(), model.get_decoder().config):
        if config._attn_implementation != name:
            raise VlmtuneError(
                f"the text model of {type(model).__name__} did not take the attention function {name!r}; "
                "prefix tuning does not work on this family."
            )
