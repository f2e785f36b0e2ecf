"""Padding never reaches the model: the tokens of a micro-batch run as one row, every sample with its own positions and
an attention of its own.

A batch stays `[B, T]` with padding everywhere else in vlmtune: rows are samples for losses, read-outs and diagnoses.
Only here its real tokens are taken out, and what the model makes of them put back in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmtune.models.last_block import compute_everything, compute_only_what_is_read

PACKED_ATTENTION = "vlmtune_packed"

_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "llava", "llava_resampler", "internvl")
"""Those whose language model only ever looks back within a sample. Gemma 3 and PaliGemma look ahead within images, by
masks that transformers makes from padded rows; LLaVA-NeXT is untested."""

_LAYERS = {"full_attention", "sliding_attention"}
_BY_TOKEN = ("token_type_ids", "mm_token_type_ids")

_running: ContextVar[bool] = ContextVar("packed forward is running", default=False)


def packing_refusal(model: PreTrainedModel) -> str | None:
    """Why samples cannot run as one row through this model; None where they can."""
    kind, text = model.config.model_type, model.config.get_text_config()
    if kind not in _FAMILIES:
        return f"the attention of {kind} looks ahead within images or is not known"
    if text._attn_implementation not in ("sdpa", PACKED_ATTENTION):
        return f"the attention function of its language model is {text._attn_implementation}, not sdpa"
    if others := sorted(set(getattr(text, "layer_types", None) or ()) - _LAYERS):
        return f"its language model has layers of {', '.join(others)}"
    return None


def use_packed_attention(model: PreTrainedModel) -> None:
    """From now on `VLM` takes padding out before the model runs; plain forwards and generation work as before."""
    model.set_attn_implementation({"text_config": PACKED_ATTENTION})
    compute_only_what_is_read(model)


def use_padding(model: PreTrainedModel) -> None:
    """Undo `use_packed_attention`."""
    model.set_attn_implementation({"text_config": "sdpa"})
    compute_everything(model)


def is_packing(model: PreTrainedModel) -> bool:
    return model.config.get_text_config()._attn_implementation == PACKED_ATTENTION


@dataclass(frozen=True)
class PackedRow:
    """inputs: keyword arguments of the model's forward for one row of all real tokens, in the order of samples; real:
    bool[B, T], the places of the batch they came from."""

    inputs: dict[str, Any]
    real: Tensor

    def positions(self) -> Tensor:
        """int64[B, T]: of every real token its place in the row."""
        return (self.real.flatten().cumsum(0) - 1).view_as(self.real)

    def padded(self, states: Tensor) -> Tensor:
        """float[B, T, D] of float[1, N, D], zero where there is no token."""
        out = states.new_zeros(*self.real.shape, states.shape[-1])
        return out.index_put((self.real,), states[0])


def pack(model: PreTrainedModel, inputs: dict[str, Any]) -> PackedRow:
    """inputs: of a right-padded batch, attention_mask int64[B, T] among them."""
    mask = inputs["attention_mask"]
    real = mask.bool()
    lengths = mask.sum(dim=1, dtype=torch.int32)
    ends = lengths.cumsum(0, dtype=torch.int32)
    row = {name: value for name, value in inputs.items() if name != "attention_mask"}
    for name in ("input_ids", *_BY_TOKEN):
        if name in row:
            row[name] = row[name][real].unsqueeze(0)
    row["position_ids"] = _positions(model, inputs)[..., real].unsqueeze(-2)
    row["cu_seq_lens_q"] = row["cu_seq_lens_k"] = torch.cat([ends.new_zeros(1), ends])
    segments = tuple(lengths.tolist())  # on a GPU the host waits here, once
    row["segments"] = segments
    row["max_length_q"] = row["max_length_k"] = max(segments)
    return PackedRow(row, real)


def _positions(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """int64[B, T], or int64[4, B, T] of the Qwen-VL families: the place in the sample, then time, height and width."""
    mask = inputs["attention_mask"]
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    body = model.base_model
    if not hasattr(body, "get_rope_index"):
        return places
    if "image_grid_thw" not in inputs:  # text alone: all of them count tokens
        return places.expand(4, *places.shape)
    by_image, _ = body.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=mask,
    )
    return torch.cat([places.unsqueeze(0), by_image.to(places.device)])


@contextmanager
def packed_forward() -> Iterator[None]:
    """Around a forward with the inputs of a PackedRow: no mask is made, `packed_attention` needs none."""
    token = _running.set(True)
    try:
        yield
    finally:
        _running.reset(token)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query float[B, heads, Q, D], key, value float[B, KV, K, D] -> float[B, Q,
    heads, D].

    segments: lengths of the samples in the row; causal attention runs within each, at the cost of each. None: plain
    sdpa. They come as an argument because checkpointed layers run again in the backward, outside of any context.
    In half precision a GPU has one kernel for all samples (FlashAttention; Dao 2023); elsewhere each has its own call.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if _has_one_kernel(query) and not options.get("dropout"):
        return _in_one_kernel(query, key, value, **options), None
    if len(set(segments)) == 1 and query.shape[0] == 1:  # one call for all of them
        split = [_as_batch(states, len(segments)) for states in (query, key, value)]
        out = _causal(module, *split, **options)
        return out.reshape(1, -1, *out.shape[2:]), None
    parts = zip(*(states.split(segments, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([_causal(module, q, k, v, **options) for q, k, v in parts], dim=1), None


def _format(states: Tensor) -> torch.dtype:
    """In which attention runs: autocast does not know every kernel."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _has_one_kernel(query: Tensor) -> bool:
    fits = query.is_cuda and query.shape[-1] <= 256 and _format(query) in (torch.bfloat16, torch.float16)
    return fits and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _in_one_kernel(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_lens_q: Tensor, max_length_q: int, **options: Any
) -> Tensor:
    """float[1, Q, heads, D]; the kernel looks at itself and so many tokens to the left (-1: at all of them)."""
    from torch.nn.attention import varlen

    window = options.get("sliding_window")
    rows = (states[0].transpose(0, 1).to(_format(states)) for states in (query, key, value))
    return varlen.varlen_attn(
        *rows, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=options.get("scaling"),
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=query.shape[1] != key.shape[1],
    ).unsqueeze(0)  # fmt: skip


def _as_batch(states: Tensor, count: int) -> Tensor:
    """float[count, heads, L, D] of float[1, heads, count * L, D]."""
    return states[0].unflatten(1, (count, -1)).transpose(0, 1)


def _causal(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """float[B, L, heads, D] of samples of one length; a sliding window is kept to."""
    window, mask, length = options.get("sliding_window"), None, query.shape[2]
    if window is not None and length > window:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)[None, None]
    return sdpa_attention_forward(module, query, key, value, mask, **options)[0]


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _running.get() else sdpa_mask(*args, **kwargs)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _mask)
