"""Rules become frozen, fully trained and adapted parameters; errors say what to change (SPEC C1, C8, G3)."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from training_setup import encode_all, encoder_of, full_rules, lora_rules, make_trainer, micro_batches, write_data

from vlmtune.adapt.plan import Policy, apply_plan
from vlmtune.adapt.state import load_adapters, load_trained, save_adapters, trained_state
from vlmtune.models.anatomy import anatomy_of, canonical_name, canonical_parameters, part_of, unreachable_parameters
from vlmtune.models.load import load_model
from vlmtune.optim.optimizer import build_adamw, set_learning_rates
from vlmtune.types import VlmtuneError

FROZEN = Policy("frozen")


@pytest.fixture
def model(tiny_folder, family):
    return load_model(str(tiny_folder(family)))


@pytest.fixture
def llava(tiny_folder):
    return load_model(str(tiny_folder("llava")))


def rules_of(model: nn.Module, **wishes: Policy) -> list[tuple[str, Policy]]:
    """One rule per part, frozen unless wished otherwise."""
    return [(part, wishes.get(part, FROZEN)) for part, _ in full_rules(model)]


def test_every_parameter_is_in_the_table_once(model):
    total = len(list(model.parameters()))
    size = sum(p.numel() for p in model.parameters())
    plan = apply_plan(model, lora_rules(model), "base", seed=0)
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert sum(row["tensors"] for row in plan.rows) == total + len(adapters)
    assert sum(row["parameters"] for row in plan.rows) == size + sum(p.numel() for p in adapters)
    assert sum(row["trainable"] for row in plan.rows) == sum(p.numel() for p in plan.parameters.values())
    assert {id(p) for p in plan.parameters.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert set(plan.rule_of) == set(canonical_parameters(model))


@pytest.mark.parametrize(
    "language",
    [
        Policy("lora", lr=1e-3, rank=4),
        Policy("adapter", lr=1e-3, options={"dim": 8}),
        Policy("cross_modal", lr=1e-3, options={"dim": 8, "heads": 2}),
        Policy("prefix", lr=1e-3, options={"length": 4, "gated": False}),
    ],
    ids=lambda policy: policy.train,
)
@pytest.mark.parametrize("store", ["auto", "bf16"])
def test_what_is_drawn_does_not_depend_on_the_format_of_the_base(language, store, tiny_folder):
    """Not rounded to bfloat16 on its way to float32 either."""
    drawn = []
    for kept in ("fp32", store):
        model = load_model(str(tiny_folder("llava")))
        rules = rules_of(model, language=dataclasses.replace(language, store=kept))
        drawn.append(apply_plan(model, rules, "base", seed=0).parameters)
        assert (torch.bfloat16 in {p.dtype for p in model.parameters()}) == (kept != "fp32")
    assert drawn[0].keys() == drawn[1].keys()
    assert all(torch.equal(parameter, drawn[1][name]) for name, parameter in drawn[0].items())
    assert any(parameter.any() for parameter in drawn[0].values())


def test_lora_only_on_the_planned_modules(model):
    """Full paths: towers have q_proj too, and stay untouched; every linear layer of the language model is adapted."""
    anatomy = anatomy_of(model)
    linear = {path for path, m in model.named_modules() if type(m) is nn.Linear}
    mine = {p for p in linear if part_of(canonical_name(anatomy, f"{p}.weight")) == "language"}
    others = {path: type(m) for path, m in model.named_modules() if not path.startswith(tuple(mine))}
    plan = apply_plan(model, rules_of(model, language=Policy("lora", lr=1e-3, rank=4)), "base", seed=0)
    wrapped = {path for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert wrapped == mine and len(wrapped) >= 4 * 7 and len(wrapped) % 7 == 0
    assert {path: type(model.get_submodule(path)) for path in others} == others
    assert {part_of(name) for name in plan.parameters} == {"language"}
    assert all(".lora_" in name for name in plan.parameters)


def test_full_and_lora_together_both_train(model, tmp_path, tiny_folder, family):
    """peft freezes everything but its adapter; the projector's rule must win (a past bug)."""
    plan = apply_plan(model, lora_rules(model), "base", seed=0)
    projector = {n for n in canonical_parameters(model) if part_of(n) == "projector"} - unreachable_parameters(model)
    assert projector and projector <= set(plan.parameters)
    setup = make_trainer(
        tiny_folder(family), write_data(tmp_path / "data", 8), tmp_path / "c", total_steps=2, checkpoint_every=9
    )
    before = {name: p.detach().clone() for name, p in setup.plan.parameters.items()}
    setup.trainer.fit()
    still = [name for name, p in setup.plan.parameters.items() if torch.equal(p, before[name])]
    assert still == []


def test_layer_ranges_and_two_ranks(llava):
    """language.layers[0:2] at rank 2 and alpha 2, the rest of the language model at rank 8 and alpha 32."""
    rules = [
        ("language.layers[0:2]", Policy("lora", lr=1e-3, rank=2, alpha=2.0)),
        ("language", Policy("lora", lr=1e-4, rank=8, alpha=32.0)),
        ("*", FROZEN),
    ]
    plan = apply_plan(llava, rules, "base", seed=0)
    for path, module in llava.named_modules():
        if isinstance(module, BaseTunerLayer):
            layer = int(path.split("layers.")[1].split(".")[0])
            rank, scaling = (2, 1.0) if layer < 2 else (8, 4.0)
            assert module.r["default"] == rank and module.scaling["default"] == scaling
            assert module.lora_A["default"].weight.shape[0] == rank
    assert {plan.rule_of[n] for n in plan.parameters if ".layers.1." in n} == {"language.layers[0:2]"}
    assert {plan.rule_of[n] for n in plan.parameters if ".layers.2." in n} == {"language"}


def test_an_adapter_follows_the_rule_of_its_weight(llava):
    """A pattern that ends in .weight covers the base weight only; its adapter trains under the same rule."""
    rules = [("language.*.q_proj.weight", Policy("lora", lr=3e-3, rank=2)), ("*", FROZEN)]
    plan = apply_plan(llava, rules, "base", seed=0)
    assert len(plan.parameters) == 2 * 4
    assert {plan.rule_of[name] for name in plan.parameters} == {"language.*.q_proj.weight"}
    assert {group["lr"] for group in plan.optimizer_groups()} == {3e-3}


def test_seed_decides_the_adapter_and_nothing_else(llava, tiny_folder):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one = apply_plan(llava, lora_rules(llava), "base", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    again = load_model(str(tiny_folder("llava")))
    other = load_model(str(tiny_folder("llava")))
    same = apply_plan(again, lora_rules(again), "base", seed=3).parameters
    different = apply_plan(other, lora_rules(other), "base", seed=4).parameters
    assert all(torch.equal(p, same[name]) for name, p in one.parameters.items())
    assert not torch.equal(
        one.parameters["language.layers.0.self_attn.q_proj.lora_A.weight"],
        different["language.layers.0.self_attn.q_proj.lora_A.weight"],
    )


# ---- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [("language", Policy("lora", rank=65)), ("*", FROZEN)],
            r"rule 'language': rank 65 exceeds model\.language_model.* 64; lower",
        ),
        ([("embed", Policy("lora", rank=4)), ("*", FROZEN)], r"'embed' asks for LoRA, but covers no linear"),
        ([("language.norm", Policy("lora", rank=4)), ("*", FROZEN)], r"'language\.norm' asks for LoRA"),
        ([("*", FROZEN)], r"nothing would train"),
        ([("vision.layers.2", Policy("full")), ("*", FROZEN)], r"vision\.layers\.2.* can learn"),
        ([("language", Policy("full"))], r"no rule covers vision"),
        ([("langauge", Policy("full")), ("*", FROZEN)], r"'langauge' covers nothing \(did you mean 'language'\?\)"),
        ([("*", Policy("full")), ("vision", FROZEN)], r"'vision' comes after rules that already cover"),
        ([("language", Policy("lora")), ("language", Policy("full")), ("*", FROZEN)], r"two rules for 'language'"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(f"{p}:{r.train}" for p, r in value),
)
def test_clear_errors(rules, message, llava):
    """The tower's last block (vision.layers.2) is never read: vision_feature_layer is -2."""
    with pytest.raises(VlmtuneError, match=message):
        apply_plan(llava, rules, "base", seed=0)


def test_lora_on_a_raw_parameter_is_refused(tiny_folder):
    """Gemma 3's projector is a parameter and a norm, with no linear module around it."""
    with pytest.raises(VlmtuneError, match=r"'projector' asks for LoRA, but covers no linear module; use train: full"):
        apply_plan(load_model(str(tiny_folder("gemma3"))), [("projector", Policy("lora")), ("*", FROZEN)], "base", 0)


@pytest.mark.parametrize("images", [False, True])
def test_a_parameter_without_gradient_stops_the_run_and_is_named(images, tiny_folder, tmp_path):
    """Text-only data never reaches the projector. With images the same plan trains."""
    setup = make_trainer(
        tiny_folder("llava"),
        write_data(tmp_path / "data", 8, images),
        tmp_path / "c",
        total_steps=2,
        checkpoint_every=9,
    )
    if images:
        assert setup.trainer.fit().step == 2
        return
    before = {name: p.detach().clone() for name, p in setup.plan.parameters.items()}
    with pytest.raises(
        VlmtuneError, match=r"4 of \d+ parameters .* got no gradient, first projector\.linear_1\.weight"
    ):
        setup.trainer.fit()
    assert all(torch.equal(p, before[name]) for name, p in setup.plan.parameters.items()), "stopped before the update"
    assert list(tmp_path.glob("c/step_*")) == []


# ---- groups -----------------------------------------------------------------------------------------------------


def test_no_decay_on_lora_norms_and_biases(model):
    """Everything decays at 0.1 by wish; only matrices that train fully do."""
    wishes = {
        "vision": Policy("full", lr=1e-5, weight_decay=0.1),
        "projector": Policy("full", lr=1e-4, weight_decay=0.1),
        "language": Policy("lora", lr=1e-3, weight_decay=0.1, rank=4),
    }
    plan = apply_plan(model, rules_of(model, **wishes), "base", seed=0)
    groups = plan.optimizer_groups()
    seen = [name for group in groups for name in group["names"]]
    assert sorted(seen) == sorted(plan.parameters)
    for group in groups:
        assert group["lr"] == wishes[group["rule"]].lr
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert plan.parameters[name] is parameter and part_of(name) == group["rule"]
            spared = ".lora_" in name or parameter.dim() < 2
            assert group["weight_decay"] == (0.0 if spared else 0.1), name
    assert {(g["rule"], g["weight_decay"]) for g in groups} >= {("vision", 0.1), ("vision", 0.0), ("language", 0.0)}
    assert ("language", 0.1) not in {(g["rule"], g["weight_decay"]) for g in groups}


def test_the_schedule_scales_every_rule_from_its_own_peak(llava):
    rules = rules_of(llava, projector=Policy("full", lr=4e-3), language=Policy("lora", lr=1e-2, rank=2))
    optimizer = build_adamw(apply_plan(llava, rules, "base", seed=0).optimizer_groups(), (0.9, 0.999), 1e-8)
    for factor in (0.5, 1.0, 0.25):  # not cumulative
        assert set_learning_rates(optimizer, lambda rule, factor=factor: factor) == {
            "projector": 4e-3 * factor,
            "language": 1e-2 * factor,
        }
        assert {group["lr"] for group in optimizer.param_groups} == {4e-3 * factor, 1e-2 * factor}


# ---- saving -----------------------------------------------------------------------------------------------------


def test_saved_is_what_trains(model):
    plan = apply_plan(model, lora_rules(model), "base", seed=0)
    full, adapters = trained_state(model, plan)
    (adapter,) = adapters.values()
    assert len(full) + len(adapter) == len(plan.parameters)
    saved = {t.data_ptr() for t in (*full.values(), *adapter.values())}
    assert saved == {p.data_ptr() for p in plan.parameters.values()}


def test_saving_something_else_than_what_trains_is_refused(llava):
    """A parameter that trains, but is not saved, is the worst bug a trainer can have (PAINS 4, 7)."""
    plan = apply_plan(llava, lora_rules(llava), "base", seed=0)
    name = "language.layers.0.self_attn.q_proj.weight"
    more = plan.parameters | {name: canonical_parameters(llava)[name]}
    lost = dataclasses.replace(plan, parameters=more, adapter_parameters=plan.adapter_parameters | {name})
    with pytest.raises(VlmtuneError, match=f"{name} trains, but 0 saved tensors hold it"):
        trained_state(llava, lost)
    twice = dataclasses.replace(plan, adapter_parameters=frozenset())
    with pytest.raises(VlmtuneError, match="trains, but 2 saved tensors hold it"):
        trained_state(llava, twice)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_the_adapter_loads_with_plain_peft(family, model, tiny_folder, tmp_path):
    """Two ranks, trained values: `PeftModel.from_pretrained` on a fresh base gives equal logits and equal config."""
    folder = tiny_folder(family)
    data = write_data(tmp_path / "data", 8)
    encoder = encoder_of(folder)
    (batch,) = micro_batches(encoder, encode_all(encoder, data), 8)
    with torch.no_grad():
        base = model(**batch.inputs).logits
    rules = [
        ("language.layers[0:2]", Policy("lora", lr=1e-3, rank=2, alpha=16.0)),
        ("language", Policy("lora", lr=1e-3, rank=4, alpha=8.0)),
        ("*", FROZEN),
    ]
    plan = apply_plan(model, rules, str(folder), seed=0)
    with torch.no_grad():
        for parameter in plan.parameters.values():
            parameter.normal_(std=0.1)
        ours = model.eval()(**batch.inputs).logits
    save_adapters(trained_state(model, plan)[1], plan, tmp_path / "adapter")
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(folder) and described["peft_type"] == "LORA"

    plain = PeftModel.from_pretrained(load_model(str(folder)), tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = plain(**batch.inputs).logits
    carries = batch.inputs["attention_mask"].bool()
    assert float((ours - base)[carries].abs().max()) > 0.01 * float(base[carries].abs().max())
    assert torch.equal(theirs[carries], ours[carries])  # the same modules, the same numbers, the same order


def test_an_adapter_of_another_plan_is_refused(llava, tiny_folder, tmp_path):
    plan = apply_plan(llava, lora_rules(llava), "base", seed=0)
    save_adapters(trained_state(llava, plan)[1], plan, tmp_path / "adapter")
    wider, fewer = load_model(str(tiny_folder("llava"))), load_model(str(tiny_folder("llava")))
    other = apply_plan(wider, lora_rules(wider, rank=8), "base", seed=0)
    with pytest.raises(VlmtuneError, match="another shape .* rank"):
        load_adapters(wider, other, tmp_path / "adapter")
    rules = [("language.layers[0:2]", Policy("lora", rank=4)), ("*", FROZEN)]
    other = apply_plan(fewer, rules, "base", seed=0)
    with pytest.raises(VlmtuneError, match="do not fit the plan"):
        load_adapters(fewer, other, tmp_path / "adapter")


def test_fully_trained_tensors_of_another_plan_are_refused(llava):
    plan = apply_plan(llava, rules_of(llava, projector=Policy("full")), "base", seed=0)
    full, _ = trained_state(llava, plan)
    name = "projector.linear_1.weight"
    with pytest.raises(
        VlmtuneError, match=r"HERE: stored tensors do not fit the plan, for example projector\.linear_1"
    ):
        load_trained(llava, plan, {k: v for k, v in full.items() if k != name}, "HERE")
    with pytest.raises(VlmtuneError, match=r"HERE: projector\.linear_1\.weight has shape \(3,\)"):
        load_trained(llava, plan, full | {name: torch.zeros(3)}, "HERE")
