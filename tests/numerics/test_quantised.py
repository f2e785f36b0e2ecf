"""NF4 against a reference of our own, the bits it takes, and gradients through it (SPEC C3)."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from method_matrix import load_for, logits_of
from scipy.stats import norm
from torch import Tensor, nn
from training_setup import encode_all, encoder_of, full_rules, loss_and_gradients, micro_batches, write_data

from vlmtune.adapt.plan import Policy, apply_plan
from vlmtune.adapt.storage import wanted_quantisation
from vlmtune.models.anatomy import anatomy_of, canonical_name, part_of
from vlmtune.models.load import load_model, meta_model
from vlmtune.models.quantise import Quantisation, is_quantised, require_quantised, stored_bytes
from vlmtune.models.tiny import FAMILIES
from vlmtune.optim.precision import bf16_is_fast
from vlmtune.types import VlmtuneError

BLOCK, OUTER = 64, 256


def nf4_levels() -> Tensor:
    """The 16 levels of Dettmers et al. 2023, appendix E: quantiles of the normal distribution, zero among them."""
    edge = (1 - 1 / 30 + 1 - 1 / 32) / 2  # the probability of the outermost level
    positive = norm.ppf(torch.linspace(edge, 0.5, 9)[:-1].tolist())
    negative = -norm.ppf(torch.linspace(edge, 0.5, 8)[:-1].tolist())
    levels = torch.tensor(sorted([*positive, 0.0, *negative]), dtype=torch.float64)
    return (levels / levels.max()).float()


def reference_nf4(weight: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(weights as NF4 keeps them, largest absolute value of every block of 64). scales: to use instead of those."""
    blocks = weight.reshape(-1, BLOCK)
    largest = blocks.abs().amax(1)
    levels = nf4_levels()
    nearest = (blocks / largest.unsqueeze(1)).unsqueeze(2).sub(levels).abs().argmin(2)
    kept = levels[nearest] * (largest if scales is None else scales).unsqueeze(1)
    return kept.reshape(weight.shape), largest


def dynamic_levels() -> Tensor:
    """The 256 signed levels of Dettmers 2016 / 2022: seven decades, each with twice the levels of the one below it."""
    found = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade
        edges = torch.linspace(0.1, 1, count + 1)
        means = (edges[:-1] + edges[1:]) / 2
        found += [sign * float(m) * 10.0 ** (decade - 6) for m in means for sign in (1, -1)]
    return torch.tensor(sorted(found))


def reference_double(scales: Tensor) -> Tensor:
    """Scales as double quantisation keeps them: distance to their mean, 8 bits each, one float per 256."""
    mean = scales.mean()
    padded = torch.cat([scales - mean, torch.zeros(-len(scales) % OUTER)]).reshape(-1, OUTER)
    largest = padded.abs().amax(1, keepdim=True)
    levels = dynamic_levels()
    nearest = (padded / largest).unsqueeze(2).sub(levels).abs().argmin(2)
    return ((levels[nearest] * largest).reshape(-1)[: len(scales)]) + mean


@pytest.fixture
def weight():
    return torch.randn(256, 320, generator=torch.Generator().manual_seed(0)) * 0.02


def test_the_levels_are_those_of_the_paper():
    table = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    torch.testing.assert_close(nf4_levels(), table, atol=1e-6, rtol=0)  # printed to 7 digits there


def test_nf4_equals_our_reference(weight):
    """Values equal to float32 rounding of one product; a weight half-way between two levels may go either way."""
    packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    kept, largest = reference_nf4(weight)
    torch.testing.assert_close(state.absmax, largest, atol=0, rtol=0)
    theirs = dequantize_4bit(packed, state)
    agree = torch.isclose(theirs, kept, atol=1e-7, rtol=1e-5)
    assert float((~agree).float().mean()) < 1e-4
    assert float((kept - weight).abs().max()) < 0.16 * float(largest.max())  # half of the widest gap of levels


def test_double_quantisation_equals_our_reference(weight):
    packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    _, largest = reference_nf4(weight)
    kept, _ = reference_nf4(weight, reference_double(largest))
    theirs = dequantize_4bit(packed, state)
    agree = torch.isclose(theirs, kept, atol=1e-7, rtol=1e-4)
    assert float((~agree).float().mean()) < 1e-2  # ties between levels of a scale move its whole block
    plain, _ = reference_nf4(weight)
    assert 0 < float((theirs - plain).abs().max()) < 0.02 * float(largest.max())


@pytest.mark.parametrize(("double", "bits"), [(False, 4.5), (True, 4.127)])
def test_bits_per_parameter(double, bits):
    """0.5 bit of constants per weight, or 8 / 64 + 32 / (64 x 256) = 0.127 (plus one float for the mean)."""
    layer = bitsandbytes.nn.Linear4bit(1024, 2048, bias=False, quant_type="nf4", compress_statistics=double)
    layer = layer.to("cpu")
    layer.weight = bitsandbytes.nn.Params4bit(
        torch.randn(2048, 1024), requires_grad=False, quant_type="nf4", compress_statistics=double
    ).to("cpu")
    weights, constants = stored_bytes(layer)
    assert 8 * (weights + constants) / (1024 * 2048) == pytest.approx(bits, abs=5e-4)


# ---- in a model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(tiny_folder, tmp_path_factory):
    encoder = encoder_of(tiny_folder("llava"))
    return micro_batches(encoder, encode_all(encoder, write_data(tmp_path_factory.mktemp("data"), 8)), 8)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_language_model_is_quantised(family, tiny_folder):
    model, _ = load_for(tiny_folder(family), "nf4")
    anatomy = anatomy_of(model)
    quantised = {
        canonical_name(anatomy, f"{path}.weight")
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_quantised(module.weight)
    }
    plain = {
        canonical_name(anatomy, f"{path}.weight")
        for path, module in load_model(str(tiny_folder(family))).named_modules()
        if type(module) is nn.Linear
    }
    assert quantised == {name for name in plain if part_of(name) == "language"} and len(quantised) >= 28
    kept = {p.dtype for n, p in model.named_parameters() if not is_quantised(p)}
    assert kept == {torch.float32}


def gradients_of(model, batch):
    model.zero_grad(set_to_none=True)
    return loss_and_gradients(model, [batch])[1]


def cosine(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The smallest over tensors."""
    pairs = [(one[name].flatten(), other[name].flatten()) for name in one if float(one[name].abs().max()) > 0]
    return min(float(torch.nn.functional.cosine_similarity(*pair, dim=0)) for pair in pairs)


@pytest.fixture
def wide_folder(tmp_path):
    """Layers wide enough for the kernel that loses gradients: 256 features, bfloat16 products."""
    import transformers

    from vlmtune.models.tiny import write_tiny

    folder = write_tiny("llava", tmp_path / "narrow")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.text_config.update({"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64})
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("guarded", [True, False])
def test_gradients_after_an_evaluation(guarded, wide_folder, batch, monkeypatch):
    """An evaluation in between must not change a gradient. Without our guard it does, on CPUs with AVX512-BF16."""
    if not guarded:
        if not bf16_is_fast(torch.device("cpu")):
            pytest.skip("this CPU does not take the kernel that loses gradients")
        monkeypatch.setattr("vlmtune.models.load.guard_gradients", lambda model: None)
    shape = meta_model(str(wide_folder))
    wishes = {"language": Policy("lora", lr=1e-2, rank=4, store="nf4", options={"init_lora_weights": False})}
    rules = [(part, wishes.get(part, Policy("frozen"))) for part, _ in full_rules(shape)]
    quantisation = wanted_quantisation(shape, rules, double=True, compute=torch.bfloat16)
    model = load_model(str(wide_folder), quantisation=quantisation)
    apply_plan(model, rules, "base", seed=0)
    model.train()
    before = gradients_of(model, batch)
    model.eval()
    logits_of(model, batch.inputs)
    model.train()
    after = gradients_of(model, batch)
    if guarded:
        assert cosine(before, after) == pytest.approx(1.0, abs=1e-5)
    else:
        assert cosine(before, after) < 0.9


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("language", Policy("full", store="nf4"))], "train: full; quantised weights have no gradient"),
        ([("*", Policy("lora", store="nf4"))], "covers vision.*only the language model is quantised"),
        ([("language.norm", Policy("frozen", store="nf4"))], "covers no linear module"),
        (
            [("language.layers[0:1]", Policy("lora", store="nf4")), ("language", Policy("lora", store="int8"))],
            "int8 and nf4 in one model",
        ),
    ],
)
def test_what_cannot_be_quantised_is_refused(rules, message, tiny_folder):
    shape = meta_model(str(tiny_folder("llava")))
    rules = [*rules, *([("*", Policy("frozen"))] if rules[0][0] != "*" else [])]
    with pytest.raises(VlmtuneError, match=message):
        wanted_quantisation(shape, rules, double=True, compute=torch.float32)


def test_what_was_quantised_is_asserted(tiny_folder):
    model, rules = load_for(tiny_folder("llava"), "nf4")
    wish = wanted_quantisation(meta_model(str(tiny_folder("llava"))), rules, True, torch.float32)
    require_quantised(model, wish)
    fewer = Quantisation("nf4", wish.modules[1:], True, torch.float32)
    with pytest.raises(VlmtuneError, match="was quantised, but should not be"):
        require_quantised(model, fewer)
    more = Quantisation("nf4", (*wish.modules, "lm_head"), True, torch.float32)
    with pytest.raises(VlmtuneError, match="lm_head should be quantised, but is not"):
        require_quantised(model, more)
    with pytest.raises(VlmtuneError, match="double True.*asked for nf4, double False"):
        require_quantised(model, Quantisation("nf4", wish.modules, False, torch.float32))
    with pytest.raises(VlmtuneError, match="is stored as nf4, but rule 'language' says fp32"):
        apply_plan(model, [(p, Policy("lora") if p == "language" else Policy("frozen")) for p, _ in rules], "b", 0)
