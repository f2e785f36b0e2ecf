"""How what learns begins: every finding passes on what we make, and fails when it was made otherwise (SPEC D6)."""

from __future__ import annotations

import pytest
import torch
from method_matrix import METHODS, load_for, rules_for
from training_setup import encode_all, encoder_of, extend, full_rules, micro_batches, write_data

from vlmtune.adapt.plan import Policy, apply_plan
from vlmtune.checks.before import initial_findings
from vlmtune.models.anatomy import canonical_parameters
from vlmtune.models.initialise import XAVIER_LIMIT
from vlmtune.models.load import load_model
from vlmtune.types import Finding

VOCABULARY = 395  # of the tiny llava's tokenizer


@pytest.fixture(scope="module")
def batch(tiny_folder, tmp_path_factory):
    encoder = encoder_of(tiny_folder("llava"))
    assert len(encoder.processor.tokenizer) <= VOCABULARY + 5
    return micro_batches(encoder, encode_all(encoder, write_data(tmp_path_factory.mktemp("rows"), 4)), 4)[0]


def by_name(findings: list[Finding], part: str) -> Finding:
    (found,) = [finding for finding in findings if part in finding.what]
    return found


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("pissa", "olora")])
def test_what_we_make_begins_as_it_should(method, tiny_folder, batch):
    """Only classic prefixes do not start as the base model, and that is said."""
    model, rules = load_for(tiny_folder("llava"), method)
    plan = apply_plan(model, rules, "base", seed=0)
    findings = initial_findings(model, plan, 390, batch)
    levels = {finding.what: finding.level for finding in findings}
    odd = {what: level for what, level in levels.items() if level != "pass"}
    if method == "prefix_plain":
        assert list(odd.values()) == ["warn"] and "start as the base model" in next(iter(odd))
    else:
        assert odd == {}
    assert any("start as the base model" in what for what in levels) == (method != "full")


@pytest.fixture
def lora(tiny_folder):
    model = load_model(str(tiny_folder("llava")))
    return model, apply_plan(model, rules_for(model, "lora"), "base", seed=0)


def test_an_output_that_is_not_zero(lora, batch):
    model, plan = lora
    with torch.no_grad():
        plan.parameters["language.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = 0.5
    findings = initial_findings(model, plan, 390, batch)
    wrong = by_name(findings, "start at zero")
    assert (
        wrong.level == "fail" and "language.layers.1.mlp.up_proj.lora_B" in wrong.evidence and "0.5" in wrong.evidence
    )
    assert by_name(findings, "start as the base model").level == "warn"


def test_an_a_that_is_not_kaiming(lora):
    model, plan = lora
    with torch.no_grad():
        plan.parameters["language.layers.2.self_attn.q_proj.lora_A.weight"].mul_(3)
    wrong = by_name(initial_findings(model, plan, 390), "Kaiming")
    assert wrong.level == "fail" and "layers.2.self_attn.q_proj" in wrong.evidence


def test_a_projector_drawn_anew(tiny_folder):
    """Xavier below 0.02, biases zero; the same seed draws the same; the rest of the model is untouched."""
    model, again = (load_model(str(tiny_folder("llava"))) for _ in range(2))
    before = {name: p.detach().clone() for name, p in canonical_parameters(model).items()}
    wishes = {"projector": Policy("full", lr=1e-3, init="xavier")}
    rules = [(part, wishes.get(part, Policy("frozen"))) for part, _ in full_rules(model)]
    plan, same = apply_plan(model, rules, "base", seed=5), apply_plan(again, rules, "base", seed=5)
    for name, parameter in canonical_parameters(model).items():
        is_drawn = name.startswith("projector") and name.endswith("weight")  # the biases were zero before
        assert torch.equal(parameter, before[name]) == (not is_drawn)
        assert torch.equal(parameter, canonical_parameters(again)[name])
    matrix, bias = plan.parameters["projector.linear_1.weight"], plan.parameters["projector.linear_1.bias"]
    assert not bool(bias.any()) and 0.015 < float(matrix.std()) < XAVIER_LIMIT
    assert by_name(initial_findings(model, plan, 390), "Xavier").level == "pass"
    with torch.no_grad():
        same.parameters["projector.linear_2.weight"].mul_(2)
    wrong = by_name(initial_findings(again, same, 390), "Xavier")
    assert wrong.level == "fail" and "projector.linear_2.weight" in wrong.evidence


def test_xavier_of_a_wide_layer_is_xaviers(tiny_folder):
    """sqrt(2 / (in + out)) where that is below the limit; 4096 x 4096: 0.0156."""
    from vlmtune.models.initialise import xavier_std

    wide = torch.nn.Parameter(torch.empty(4096, 4096))
    assert xavier_std(wide) == pytest.approx((2 / 8192) ** 0.5)
    linear = torch.empty(4096, 4096)
    torch.nn.init.xavier_normal_(linear, generator=torch.Generator().manual_seed(0))
    assert xavier_std(wide) == pytest.approx(float(linear.std()), rel=1e-3)


def test_a_dead_norm(lora):
    model, plan = lora
    with torch.no_grad():
        canonical_parameters(model)["language.layers.0.input_layernorm.weight"].zero_()
    wrong = by_name(initial_findings(model, plan, 390), "norms")
    assert wrong.level == "warn" and "language.layers.0.input_layernorm.weight" in wrong.evidence


def test_rows_of_new_tokens(tiny_folder):
    model, _, new = extend(tiny_folder("llava"), ["<one>", "<two>", "<three>"], "norm1000")
    wishes = {"embed": Policy("new_rows", lr=1e-3), "lm_head": Policy("new_rows", lr=1e-3)}
    rules = [(part, wishes.get(part, Policy("frozen"))) for part, _ in full_rules(model)]
    plan = apply_plan(model, rules, "base", seed=0, new_tokens=new)
    good = by_name(initial_findings(model, plan, 390), "new tokens")
    assert good.level == "pass" and "3 rows" in good.evidence
    with torch.no_grad():
        plan.parameters["embed.new_rows.weight"][1, 0] += 1
    assert by_name(initial_findings(model, plan, 390), "new tokens").level == "fail"


def test_a_table_that_is_too_small(lora):
    model, plan = lora
    assert by_name(initial_findings(model, plan, 390), "a row for every token").level == "pass"
    wrong = by_name(initial_findings(model, plan, 5000), "a row for every token")
    assert wrong.level == "fail" and "5000 tokens" in wrong.evidence
