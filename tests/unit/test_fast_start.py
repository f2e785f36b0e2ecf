"""What a start keeps of the faster ways when one of them gives other states than the model."""

from __future__ import annotations

import pytest
import torch
from training_setup import encode_all, encoder_of, micro_batches, write_data

from vlmtune.adapt.fused import is_fused
from vlmtune.adapt.plan import Policy, apply_plan
from vlmtune.errors import VlmtuneError
from vlmtune.fast_start import FUSED, PACKED, start_fast
from vlmtune.models import packing
from vlmtune.models.anatomy import canonical_parameters, part_of
from vlmtune.models.fused import _Gated
from vlmtune.models.load import load_model
from vlmtune.models.packing import is_packing


@pytest.fixture
def start(tiny_folder, tmp_path):
    folder = tiny_folder("qwen2_5_vl")
    encoder = encoder_of(folder)
    (batch,) = micro_batches(encoder, encode_all(encoder, write_data(tmp_path, 3)), 3)
    model = load_model(str(folder))
    parts = dict.fromkeys(part_of(name) for name in canonical_parameters(model))
    rules = [(part, Policy("lora", lr=1e-3) if part == "language" else Policy("frozen")) for part in parts]
    plan = apply_plan(model, rules, "base", 0)

    def begin(**wish):
        findings = start_fast(model, plan, batch=batch, precision="fp32", **{"fused": True, "packing": "auto"} | wish)
        return model, {finding.what: finding for finding in findings}

    return begin


def broken_gate(ctx, gate, up):
    ctx.save_for_backward(gate, up)
    return torch.relu(gate) * up


def broken_attention(module, query, key, value, **options):
    return packing.sdpa_attention_forward(module, query, key, value, None, **options)[0] * 1.01


def test_both_are_kept_where_both_are_right(start):
    model, found = start()
    assert is_fused(model) and is_packing(model)
    assert found[FUSED].level == found[PACKED].level == "pass"


def test_a_wrong_module_costs_no_packing(start, monkeypatch):
    monkeypatch.setattr("vlmtune.models.fused._is_same", lambda *_: True)
    monkeypatch.setattr(_Gated, "forward", staticmethod(broken_gate))
    model, found = start()
    assert not is_fused(model) and is_packing(model)
    assert found[FUSED].level == "warn" and found[FUSED].evidence.startswith("no: largest difference")
    assert found[PACKED].level == "pass"


def test_wrong_packing_costs_no_modules(start, monkeypatch):
    monkeypatch.setattr(packing, "_causal", broken_attention)
    model, found = start()
    assert is_fused(model) and not is_packing(model)
    assert found[FUSED].level == "pass" and found[PACKED].level == "warn"


def test_both_wrong(start, monkeypatch):
    monkeypatch.setattr("vlmtune.models.fused._is_same", lambda *_: True)
    monkeypatch.setattr(_Gated, "forward", staticmethod(broken_gate))
    monkeypatch.setattr(packing, "_causal", broken_attention)
    model, found = start()
    assert not is_fused(model) and not is_packing(model)
    assert found[FUSED].level == found[PACKED].level == "warn"


def test_wrong_packing_that_was_asked_for_is_refused(start, monkeypatch):
    monkeypatch.setattr(packing, "_causal", broken_attention)
    with pytest.raises(VlmtuneError, match="train.packing: no: largest difference .* set it to auto or false"):
        start(packing=True)


def test_states_that_are_not_finite_are_not_the_same(start, monkeypatch):
    monkeypatch.setattr(packing, "_causal", lambda *args, **options: broken_attention(*args, **options) * float("nan"))
    model, found = start()
    assert not is_packing(model) and found[PACKED].level == "warn"
