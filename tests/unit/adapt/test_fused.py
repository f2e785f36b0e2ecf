"""LoRA, norms and gated parts in fewer passes: their derivatives, and when the module's own forward is kept."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import nn

from vlmtune.adapt.fused import FusedLora, _Adapted, use_fused, use_stock
from vlmtune.models.fused import FusedGate, FusedNorm, _Gated, _Normalised, fuse


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_derivatives():
    """Against finite differences in float64 (torch.autograd.gradcheck, its own tolerance of 1e-5)."""
    torch.manual_seed(0)
    frozen = draw(5, 4).detach()

    def adapted(x, a, b):
        return _Adapted.apply(x, frozen, None, a, b, 1.7, torch.float64)

    assert torch.autograd.gradcheck(adapted, (draw(3, 4), draw(2, 4), draw(5, 2)))
    assert torch.autograd.gradcheck(lambda x, w: _Normalised.apply(x, w, 1e-6), (draw(2, 3, 4), draw(4)))
    assert torch.autograd.gradcheck(_Gated.apply, (draw(3, 4), draw(3, 4)))


@pytest.mark.parametrize("needed", [("x",), ("a",), ("b",), ("x", "a", "b")])
def test_only_the_gradients_that_are_needed(needed):
    inputs = {"x": draw(3, 4), "a": draw(2, 4), "b": draw(5, 2)}
    for name, value in inputs.items():
        value.requires_grad_(name in needed)
    out = _Adapted.apply(inputs["x"], draw(5, 4).detach(), None, inputs["a"], inputs["b"], 2.0, torch.float64)
    out.sum().backward()
    assert {name for name, value in inputs.items() if value.grad is not None} == set(needed)


class Model(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.first = nn.Linear(6, 4, bias=bias)

    def forward(self, x):
        return self.first(x)


def adapted_model(name: str = "default", **settings) -> Model:
    torch.manual_seed(0)
    model = Model()
    config = LoraConfig(r=2, target_modules=["first"], init_lora_weights=False, **settings)
    return inject_adapter_in_model(config, model, name)


def fused_calls(model: nn.Module, monkeypatch) -> list[bool]:
    calls: list[bool] = []
    original = _Adapted.apply
    monkeypatch.setattr(_Adapted, "apply", lambda *args: calls.append(True) or original(*args))
    assert use_fused(model) == 1 and type(model.first) is FusedLora
    return calls


def set_disabled(model):
    model.first.enable_adapters(False)


def set_merged(model):
    model.first.merge()


def add_second(model):
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["first"], init_lora_weights=False), model, "second")
    model.first.set_adapter(["default", "second"])


def train_base(model):
    model.first.base_layer.weight.requires_grad_(True)


@pytest.mark.parametrize(
    "settings, change",
    [
        ({}, set_disabled), ({}, set_merged), ({}, add_second), ({}, train_base), ({"use_dora": True}, None),
        ({"lora_bias": True}, None), ({"lora_dropout": 0.5}, nn.Module.train),
    ],
    ids=["disabled", "merged", "two adapters", "base trains", "dora", "bias", "dropout"],
)  # fmt: skip
def test_peft_computes_what_is_not_plain(settings, change, monkeypatch):
    """Bit for bit what the layer computes without the exchange."""
    model, x = adapted_model(**settings).eval(), torch.randn(2, 3, 6)
    if change is not None:
        change(model)
    torch.manual_seed(1)
    theirs = model(x)
    calls = fused_calls(model, monkeypatch)
    torch.manual_seed(1)
    assert torch.equal(model(x), theirs) and not calls


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}], ids=["lora", "rslora", "eval"])
def test_the_plain_layer_is_exchanged(settings, monkeypatch):
    model, x = adapted_model(**settings).eval(), torch.randn(2, 3, 6)
    theirs = model(x)
    calls = fused_calls(model, monkeypatch)
    torch.testing.assert_close(model(x), theirs)  # float32 defaults: 1.3e-6 relative
    assert calls
    use_stock(model)
    assert type(model.first) is Linear and torch.equal(model(x), theirs)


def test_a_merge_of_an_exchanged_layer_is_exact():
    model, x = adapted_model().eval(), torch.randn(2, 6)
    use_fused(model)
    before = model(x)
    model.first.merge()
    torch.testing.assert_close(model(x), before)


class OtherNorm(nn.Module):
    """Gemma's: 1 + weight."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(8)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class OtherGate(nn.Module):
    def __init__(self, activation, scale):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn, self.scale = activation, scale

    def forward(self, x):
        return self.scale * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize(
    "module, exchanged",
    [
        (OtherNorm(), False),
        (OtherGate(nn.GELU(), 1), False),
        (OtherGate(nn.SiLU(), 2), False),
        (OtherGate(nn.SiLU(), 1), True),
    ],
    ids=["norm", "gelu", "scaled", "same"],
)
def test_another_formula_keeps_its_forward(module, exchanged):
    model = nn.ModuleList([module])
    assert fuse(model) == (["0"] if exchanged else [])
    assert isinstance(model[0], (FusedNorm, FusedGate)) == exchanged
