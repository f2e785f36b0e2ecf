"""Rules become modules and configs of peft: roles of linear modules, sub-layers, groups, options (SPEC C1-C4, C8)."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from method_matrix import METHODS, rules_for
from peft import get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from training_setup import full_rules

from vlmtune.adapt.library import inject, tuner_layers
from vlmtune.adapt.methods import alpha_of, build_adapters, find_targets, rank_of
from vlmtune.adapt.plan import Policy, apply_plan
from vlmtune.adapt.record import plan_record, require_same_plan
from vlmtune.config import RankKind
from vlmtune.models.anatomy import (
    RANK_KINDS,
    anatomy_of,
    canonical_parameters,
    linear_role,
    rank_kind,
    unreachable_parameters,
)
from vlmtune.models.load import load_model
from vlmtune.rules import assign
from vlmtune.types import VlmtuneError

FROZEN = Policy("frozen")
SMALL = {"shira": {"r": 2}, "road": {"group_size": 8}, "c3a": {"block_size": 16}, "waveft": {"n_frequency": 64}}
"""Options for layers of 64 features, where peft's defaults are made for wider ones."""


@pytest.fixture
def model(tiny_folder, family):
    return load_model(str(tiny_folder(family)))


@pytest.fixture
def llava(tiny_folder):
    return load_model(str(tiny_folder("llava")))


def targets_of(model: nn.Module, *rules: tuple[str, Policy]):
    every = [*rules, *(() if rules[-1][0] == "*" else (("*", FROZEN),))]
    assignment = assign(every, canonical_parameters(model))
    return find_targets(model, anatomy_of(model), assignment, unreachable_parameters(model))


def test_every_linear_module_of_a_block_has_a_role(model):
    """A family with other names would silently get no ranks by kind and no IA3: its names belong into LINEAR_ROLES."""
    anatomy = anatomy_of(model)
    for blocks in (anatomy.vision_layers, anatomy.language_layers):
        roles = {
            path: linear_role(f"{blocks}.{path}")
            for path, module in model.get_submodule(blocks).named_modules()
            if type(module) is nn.Linear
        }
        assert roles and "other" not in roles.values(), roles
        for block in {path.split(".")[0] for path in roles}:
            mine = {role for path, role in roles.items() if path.split(".")[0] == block}
            assert {"o", "down", "up"} <= mine and (mine >= {"q", "k", "v"} or "qkv" in mine)


@pytest.mark.parametrize(
    ("path", "role", "kind"),
    [
        ("model.language_model.layers.3.self_attn.q_proj", "q", "qk"),
        ("language.layers.3.self_attn.v_proj", "v", "vo"),
        ("model.visual.blocks.0.attn.qkv", "qkv", "qk"),
        ("model.visual.blocks.0.attn.proj", "o", "vo"),
        ("model.vision_tower.encoder.layer.1.attention.projection_layer", "o", "vo"),
        ("language.layers.3.mlp.gate_proj", "gate", "up"),
        ("language.layers.3.cross_attn.q_proj", "cross", "cross"),
        ("model.multi_modal_projector.linear_1", "other", "other"),
        ("lm_head", "other", "other"),
        ("model.visual.merger.proj", "other", "other"),  # a name of blocks, outside of them
    ],
)
def test_roles(path, role, kind):
    assert (linear_role(path), rank_kind(path)) == (role, kind)
    assert role in RANK_KINDS[kind]


def test_the_config_knows_the_same_kinds():
    """Written there again because a config is read without torch."""
    assert get_args(RankKind) == tuple(RANK_KINDS)


def test_ranks_by_kind_reach_peft(model):
    ranks = {"qk": 2, "vo": 3, "up": 5, "down": 4}
    plan = apply_plan(model, [("language", Policy("lora", lr=1e-3, rank=ranks)), ("*", FROZEN)], "base", seed=0)
    found = {path: layer.r["default"] for path, layer in tuner_layers(model)}
    assert found == {path: ranks[rank_kind(path)] for path in found} and set(found.values()) == set(ranks.values())
    assert all(layer.scaling["default"] == 2.0 for _, layer in tuner_layers(model))  # alpha is 2 x rank of each
    assert plan.rows[0]["method"].startswith(("lora qk:r2", "frozen")) or any("qk:r2" in r["method"] for r in plan.rows)


def test_a_kind_without_a_rank_is_named(llava):
    rules = [("*", Policy("lora", rank={"qk": 4, "vo": 4, "up": 4, "down": 4}))]
    with pytest.raises(VlmtuneError, match=r"covers model\.multi_modal_projector\.linear_1 too.*'other'; add other"):
        apply_plan(llava, rules, "base", seed=0)


def test_ia3_takes_keys_values_and_what_comes_down(model):
    targets = targets_of(model, ("language", Policy("ia3")))
    assert {linear_role(target.path) for target in targets} == {"k", "v", "down"}
    config = build_adapters(targets, "base")[0].config
    assert config.feedforward_modules.count("down_proj") == len(targets) // 3


def test_adapters_go_around_whole_sublayers(model):
    """Two to a block, in the tower as well, and only where one rule covers all of a part."""
    anatomy = anatomy_of(model)
    targets = [target.path for target in targets_of(model, ("language", Policy("adapter")))]
    assert len(targets) == 2 * len(model.get_submodule(anatomy.language_layers))
    in_tower = [t.path for t in targets_of(model, ("vision.layers[0:1]", Policy("adapter")))]
    assert len(in_tower) == 2 and all(path.startswith(anatomy.vision_layers) for path in in_tower)
    mlp = [t.path for t in targets_of(model, ("language.layers.*.mlp", Policy("adapter")))]
    assert mlp == [path for path in targets if path.endswith("mlp")]
    split = (("language.layers.0.mlp.up_proj", FROZEN), ("language.layers[0:1]", Policy("adapter")))
    assert [t.path.rsplit(".")[-1] for t in targets_of(model, *split)] == ["self_attn"]


def test_blocks_out_of_reach_get_no_adapter(llava):
    """LLaVA reads its tower before the last block: an adapter there would never learn."""
    for method in ("adapter", "lora"):
        paths = [target.path for target in targets_of(llava, ("vision", Policy(method)))]
        assert {path.split("layers.")[1].split(".")[0] for path in paths} == {"0", "1"}


def test_cross_modal_stands_once_in_a_block(llava):
    paths = [t.path for t in targets_of(llava, ("language", Policy("cross_modal")))]
    assert [path.rsplit(".", 1)[-1] for path in paths] == ["mlp"] * 4
    attention = [t.path for t in targets_of(llava, ("language.layers.*.self_attn", Policy("cross_modal")))]
    assert [path.rsplit(".", 1)[-1] for path in attention] == ["self_attn"] * 4


def test_one_config_of_peft_is_one_adapter(llava):
    """Ranks and alphas may differ within an adapter; dropout and options make another. Order of options does not."""
    options = {"use_dora": True, "use_rslora": True}
    rules = [
        ("language.layers[0:1]", Policy("lora", rank=2, alpha=2.0)),
        ("language.layers[1:2]", Policy("lora", rank=4)),
        ("language.layers[2:3]", Policy("lora", rank=4, options=options)),
        ("language.layers.3.mlp", Policy("lora", rank=8, options=dict(reversed(options.items())))),
        ("language.layers[3:4]", Policy("lora", rank=4, dropout=0.1)),
    ]
    adapters = build_adapters(targets_of(llava, *rules), "base")
    assert [(a.name, len(a.targets)) for a in adapters] == [("default", 14), ("lora_2", 7 + 3), ("lora_3", 4)]
    sizes = {(rank_of(t), alpha_of(t)) for t in adapters[0].targets.values()}
    assert sizes == {(2, 2.0), (4, 8.0)}


def test_all_adapters_of_a_model_are_active_and_apart(llava):
    """peft switches earlier adapters off when it injects another; each has its own tensors, and no other's."""
    rules = [
        ("language.layers[0:2]", Policy("lora", rank=2)),
        ("language.layers[2:3]", Policy("lora", rank=2, dropout=0.1)),
        ("language.layers[3:4]", Policy("adapter", options={"dim": 4})),
    ]
    adapters = build_adapters(targets_of(llava, *rules), "base")
    names = inject(llava, adapters, seed=0)
    assert all(layer.active_adapters for _, layer in tuner_layers(llava))
    states = [set(get_peft_model_state_dict(llava, adapter_name=adapter.name)) for adapter in adapters]
    assert [len(state) for state in states] == [2 * 14, 2 * 7, 2 * 4]
    assert not set.intersection(*states) and len(names) == sum(map(len, states))


def test_what_peft_offers_is_reachable_or_refused_with_a_reason(tiny_folder):
    """Every method of peft: it trains on a language model, or one sentence says why it does not."""
    works, refused = set(), {}
    for kind in PEFT_TYPE_TO_TUNER_MAPPING:
        method = kind.value.lower()
        model = load_model(str(tiny_folder("llava")))
        policy = Policy("peft", lr=1e-3, method=method, options=SMALL.get(method, {}))
        rules = [("language.layers.*.self_attn", policy), ("*", FROZEN)]
        try:
            plan = apply_plan(model, rules, "base", seed=0)
        except VlmtuneError as error:
            refused[method] = str(error)
            continue
        assert plan.parameters and {plan.rule_of[name] for name in plan.parameters} == {rules[0][0]}
        model(input_ids=torch.arange(10, 20)[None]).logits.sum().backward()
        assert [name for name, p in plan.parameters.items() if p.grad is None] == []
        works.add(method)
    assert works >= {
        "beft", "boft", "c3a", "deft", "delora", "fourierft", "glora", "gralora", "hira", "hra", "lily", "ln_tuning",
        "loha", "lokr", "miss", "oft", "osf", "peanut", "psoft", "randlora", "road", "shira", "supertuning", "waveft",
        "vera", "pvera",
    }  # fmt: skip
    assert {"vblora", "unilora", "adalora", "xlora", "poly", "adaption_prompt", "trainable_tokens"} <= set(refused)
    assert "outside of the layers" in refused["vblora"] and "write train: lora" in refused["lora"]
    assert all(message.startswith("plan: ") and message.endswith(".") for message in refused.values())


def test_the_record_of_a_plan_tells_plans_apart(tiny_folder):
    def record(seed: int = 0, **more):
        from vlmtune.models.tiny import write_tiny

        folder = tiny_folder("llava") if seed == 0 else write_tiny("llava", tiny_folder("llava").parent / "other", seed)
        model = load_model(str(folder))
        policy = Policy(**{"train": "lora", "rank": 4} | more)
        return plan_record(apply_plan(model, [("language.layers[0:2]", policy), ("*", FROZEN)], "base", seed=0))

    first = record()
    require_same_plan(first, record(), "HERE")
    for other, message in (
        (record(rank=2), r"HERE: .* has rank 4, in the plan 2"),
        (record(train="ia3", rank=16), r"adapter 'default' is lora, in the plan ia3"),
        (
            record(seed=1),
            r"HERE was trained on another base model: \d+ of \d+ tensors had .* first vision",
        ),
    ):
        with pytest.raises(VlmtuneError, match=message):
            require_same_plan(first, other, "HERE")
    fewer = plan_record(
        apply_plan(
            load_model(str(tiny_folder("llava"))),
            [("language.layers[0:1]", Policy("lora", rank=4)), ("*", FROZEN)], "base", seed=0,
        )
    )  # fmt: skip
    with pytest.raises(VlmtuneError, match=r"adapt different modules, for example model\.language_model\.layers\.1"):
        require_same_plan(first, fewer, "HERE")


def test_a_quantised_copy_has_the_digest_of_its_base(tiny_folder):
    """Otherwise a QLoRA run could not be merged into the base that it was made from."""
    from method_matrix import load_for

    quantised, rules = load_for(tiny_folder("llava"), "nf4")
    one = apply_plan(quantised, rules, "base", 0).base
    full = [(pattern, policy if policy.store == "fp32" else Policy("lora", rank=4)) for pattern, policy in rules]
    other = apply_plan(load_model(str(tiny_folder("llava"))), full, "base", 0).base
    assert all(other[name] == digest for name, digest in one.items())
    missing = other.keys() - one.keys()  # what is quantised: the whole rule's
    assert missing and {name.split(".")[0] for name in missing} == {"language"}


def test_the_learning_rate_of_b(llava):
    """LoRA+: B learns faster than A; both follow the rule."""
    rules = [(part, Policy("lora", lr=1e-3, rank=2, lr_b=16.0) if part == "language" else FROZEN)
             for part, _ in full_rules(llava)]  # fmt: skip
    groups = apply_plan(llava, rules, "base", 0).optimizer_groups()
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-3}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {16e-3}


@pytest.mark.parametrize("method", ["adapter", "cross_modal", "prefix", "ia3", "dora", "loha"])
def test_no_adapter_decays(method, tiny_folder):
    """SPEC G3, for what every method brings: matrices of bottlenecks and keys of prefixes too."""
    model = load_model(str(tiny_folder("llava")))
    rules = [(p, replace(r, weight_decay=0.1) if r.train != "frozen" else r) for p, r in rules_for(model, method)]
    plan = apply_plan(model, rules, "base", 0)
    decays = {name: group["weight_decay"] for group in plan.optimizer_groups() for name in group["names"]}
    assert {decays[name] for name in plan.adapter_parameters} == {0.0}
    assert decays["projector.linear_1.weight"] == 0.1 and decays["projector.linear_1.bias"] == 0.0


def test_the_matrix_names_methods_of_peft():
    assert {policy.language.method for policy in METHODS.values()} - {""} == {"loha", "lokr", "oft", "boft", "vera"}
