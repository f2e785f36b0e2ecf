"""What is said before training about where the result can be used."""

from __future__ import annotations

import pytest
from method_matrix import load_for, rules_for
from training_setup import full_rules

from vlmtune.adapt.plan import Policy, apply_plan
from vlmtune.adapt.serving import serving_notes, why_not_merged, why_not_plain_peft, why_not_vllm_lora
from vlmtune.models.load import load_model


def lora_only(model, **wishes):
    return [(part, wishes.get(part, Policy("frozen"))) for part, _ in full_rules(model)]


@pytest.fixture
def llava(tiny_folder):
    return load_model(str(tiny_folder("llava")))


def test_plain_lora_on_the_language_model_is_served_beside_the_base(llava):
    plan = apply_plan(llava, lora_only(llava, language=Policy("lora", rank=12)), "base", 0)
    assert why_not_vllm_lora(llava, plan) is None
    notes = serving_notes(llava, plan)
    assert notes[0].startswith("merged: `vlmtune export`") and notes[1] == "plain peft: `vlmtune export --as adapter`"
    assert notes[2] == "vLLM beside the base model: --enable-lora --max-lora-rank 16"


@pytest.mark.parametrize(
    ("wishes", "reason"),
    [
        ({"language": Policy("lora", rank=4, options={"use_dora": True})}, "vLLM has no DoRA"),
        ({"language": Policy("lora", rank=4), "projector": Policy("full")}, "projector is trained in full"),
        ({"language": Policy("lora", rank=4), "vision": Policy("lora", rank=4)}, "is not in the language model"),
        ({"language": Policy("lora", rank={"qk": 2, "vo": 2, "up": 4, "down": 4}, alpha=8.0)}, "alpha / rank differs"),
        ({"language": Policy("ia3")}, "vLLM has no ia3"),
        ({"language": Policy("lora", rank=4, options={"init_lora_weights": "pissa"})}, "changes the base weights"),
        ({"language": Policy("full")}, "there is no adapter"),
        ({"language": Policy("prefix")}, "peft has no prefixes in the attention"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_why_vllm_cannot(wishes, reason, llava):
    plan = apply_plan(llava, lora_only(llava, **wishes), "base", 0)
    assert reason in why_not_vllm_lora(llava, plan)


def test_ranks_by_kind_with_alpha_twice_the_rank_are_fine_for_vllm(llava):
    ranks = {"qk": 2, "vo": 4, "up": 8, "down": 4}
    plan = apply_plan(llava, lora_only(llava, language=Policy("lora", rank=ranks)), "base", 0)
    assert why_not_vllm_lora(llava, plan) is None
    assert serving_notes(llava, plan)[2].endswith("--max-lora-rank 8")


def test_a_mixed_plan_stays_with_us(tiny_folder):
    model, _ = load_for(tiny_folder("llava"), "mixed")
    plan = apply_plan(model, rules_for(model, "mixed"), "base", 0)
    assert "bottleneck adapters cannot be merged" in why_not_merged(plan)
    assert "bottleneck adapters" in why_not_plain_peft(plan)
    assert serving_notes(model, plan)[2].startswith("vLLM: no, ")
