"""The attention of samples in one row: per sample, and what is asked of a GPU's kernel for all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlmtune.models.packing import _in_one_kernel, packed_attention

LENGTHS = (5, 1, 9)


def plain_varlen(query, key, value, ends_q, ends_k, longest_q, longest_k, *, scale, window_size, enable_gqa):
    """torch.nn.attention.varlen's contract, written out: [T, heads, D], a window of (left, right) keys."""
    assert longest_q == longest_k == max(LENGTHS) and torch.equal(ends_q, ends_k)
    assert ends_q.dtype == torch.int32 and window_size[1] == 0
    out = torch.empty_like(query)
    for start, end in zip(ends_q[:-1].tolist(), ends_q[1:].tolist(), strict=True):
        places = torch.arange(end - start)
        back = places[:, None] - places[None]
        seen = (back >= 0) & ((back <= window_size[0]) | torch.tensor(window_size[0] == -1))
        q, k, v = (states[start:end].transpose(0, 1) for states in (query, key, value))
        if enable_gqa:
            k, v = (states.repeat_interleave(len(q) // len(states), 0) for states in (k, v))
        out[start:end] = F.scaled_dot_product_attention(q, k, v, seen, scale=scale).transpose(0, 1)
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv", [4, 2])
def test_one_kernel_for_all_samples_is_asked_for_the_same(window, kv, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, sum(LENGTHS), 8) for heads in (4, kv, kv))
    ends = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    row = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9, "max_length_k": 9}
    module = nn.Module()
    module.num_key_value_groups = 4 // kv
    module.is_causal = True
    options = {"scaling": 0.5, "sliding_window": window, "dropout": 0.0, **row}
    each, _ = packed_attention(module, query, key, value, None, segments=LENGTHS, **options)
    at_once = _in_one_kernel(query, key, value, **options)
    torch.testing.assert_close(at_once, each)  # float32: another order of a few sums
