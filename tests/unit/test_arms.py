"""The arms of a comparison: the language model's rule is replaced, and nothing else is."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmtune.adapt.plan import assign_rules
from vlmtune.build_course import policies
from vlmtune.checks.settings import usual_rate
from vlmtune.comparison.arms import METHODS, build_arms, described_rule, kept_rules, of_seed
from vlmtune.config import Config, parse_config
from vlmtune.models.anatomy import canonical_parameters, part_of
from vlmtune.models.load import meta_model
from vlmtune.types import VlmtuneError

FROZEN = [{"match": part, "train": "frozen"} for part in ("embed", "lm_head")]
PLANS = {  # of a LLaVA with two blocks
    "parts": [
        {"match": "vision", "train": "frozen"},
        {"match": "projector", "train": "full", "lr": 3e-4},
        {"match": "language", "train": "lora", "rank": 4, "dropout": 0.1, "lr": 1e-3},
        *FROZEN,
    ],
    "one rule": [{"match": "*", "train": "full", "lr": 1e-5}],
    "by layer": [
        {"match": "language.layers[0:1]", "train": "adapter", "options": {"dim": 8}},
        {"match": "*.layers[1:2]", "train": "lora", "rank": 2},
        {"match": "language", "train": "frozen"},
        {"match": "vision", "train": "frozen"},
        {"match": "projector", "train": "full"},
        *FROZEN,
    ],
}


def config_of(model: object, plan: list[dict], **sections) -> Config:
    tree = {
        "model": str(model), "data": {"train": [{"path": "train.jsonl"}], "eval": {"val": [{"path": "val.jsonl"}]}},
        "plan": plan, "train": {"batch_size": 4, "micro_batch_size": 2}, **sections,
    }  # fmt: skip
    return parse_config(tree)


@pytest.fixture(scope="module")
def llava(tiny_folder) -> str:
    return str(tiny_folder("llava"))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(PLANS)), st.lists(st.sampled_from(sorted(METHODS)), min_size=2, max_size=4, unique=True))
def test_everything_but_the_language_model_keeps_its_rule(llava, which, methods):
    config = config_of(llava, PLANS[which])
    model = meta_model(llava)
    before = assign_rules(model, policies(config))
    arms = build_arms(config, methods, {})
    assert [arm.name for arm in arms] == methods
    for arm in arms:
        after = assign_rules(model, policies(arm.config))
        for name in before:
            if part_of(name) == "language":
                pattern, policy = after[name]
                assert (pattern, policy.train) == ("language", METHODS[arm.name]["train"])
                assert policy.store == METHODS[arm.name].get("store", "fp32") and policy.lr == arm.rate
            else:
                assert after[name] == before[name]


def test_settings_of_a_method_are_taken_from_its_rule_but_the_rate_is_the_usual_one(llava):
    config = config_of(llava, PLANS["parts"])
    full, lora, qlora, adapter = build_arms(config, ["full", "lora", "qlora", "adapter"], {"adapter": 5e-5})
    rules = [arm.config.plan[0].model_dump(exclude_unset=True) for arm in (full, lora, qlora, adapter)]
    size = sum(p.numel() for n, p in canonical_parameters(meta_model(llava)).items() if part_of(n) == "language")
    assert full.rate == pytest.approx(usual_rate(size, False), rel=0.05)
    assert lora.rate == pytest.approx(10 * full.rate, rel=0.05)
    lora_rule = {"match": "language", "train": "lora", "lr": lora.rate, "rank": 4, "dropout": 0.1}
    assert rules[:3] == [
        {"match": "language", "train": "full", "lr": full.rate}, lora_rule, lora_rule | {"store": "nf4"}
    ]  # fmt: skip
    assert rules[3] == {"match": "language", "train": "adapter", "lr": 5e-5}
    assert described_rule(lora.config.plan[0]).startswith("language: lora lr=")
    assert kept_rules(lora) == ["vision frozen", "projector full lr 0.0003", "embed frozen", "lm_head frozen"]


def test_a_frozen_base_stays_in_bfloat16(llava):
    plan = [rule | ({"store": "bf16"} if rule["match"] == "language" else {}) for rule in PLANS["parts"]]
    arms = build_arms(config_of(llava, plan), ["full", "lora", "qlora", "ia3"], {})
    assert [arm.config.plan[0].store for arm in arms] == ["auto", "bf16", "nf4", "bf16"]


def test_all_trials_are_of_one_length(llava):
    config = config_of(
        llava, PLANS["parts"],
        train={"batch_size": 4, "micro_batch_size": 2, "log_every": 7, "length": "9 steps"},
        checkpoint={"every": 3, "keep": 5, "patience": 2, "best": "val/vqa/exact_match"},
        evaluate={"every": 2, "limit": 3, "generate": True, "max_new_tokens": 9},
    )  # fmt: skip
    for arm in build_arms(config, ["full", "ia3"], {}):
        assert (arm.config.evaluate.every, arm.config.evaluate.limit) == (None, None)
        assert arm.config.checkpoint.patience is None and arm.config.checkpoint.every == 3
        assert (arm.config.checkpoint.keep, arm.config.train.log_every) == (1, 7)
        assert (arm.config.train.length, arm.config.evaluate.max_new_tokens) == ("9 steps", 9)
        trial = of_seed(arm.config, 5, "runs/x")
        assert (trial.train.seed, trial.run, trial.plan) == (5, "runs/x", arm.config.plan)


def test_a_schedule_of_stretches_keeps_its_shape_at_another_rate(llava):
    stretches = [{"start": 3e-6, "to": 3e-4, "over": "10%"}, {"to": 3e-5, "shape": "cosine"}]
    plan = [rule for rule in PLANS["parts"] if rule["match"] != "projector"]
    plan = [
        {"match": "projector", "train": "full"},
        *[r if r["match"] != "language" else r | {"lr": 3e-4} for r in plan],
    ]
    config = config_of(llava, plan, optim={"lr": 3e-4, "schedule": stretches})
    for arm in build_arms(config, ["full", "lora"], {}):
        first, second = arm.config.plan[0].schedule
        assert (first.start, first.to, second.to) == (
            pytest.approx(arm.rate / 100),
            arm.rate,
            pytest.approx(arm.rate / 10),
        )


def test_plans_of_a_file(llava, tmp_path):
    file = tmp_path / "plans.yaml"
    dora = [rule | ({"options": {"use_dora": True}} if rule["match"] == "language" else {}) for rule in PLANS["parts"]]
    file.write_text(yaml.safe_dump({"dora": dora}))
    full, arm = build_arms(config_of(llava, PLANS["parts"]), ["full", str(file)], {})
    assert (arm.name, arm.rate) == ("dora", None)
    assert [rule.model_dump(exclude_unset=True) for rule in arm.config.plan] == dora


@pytest.mark.parametrize(
    ("methods", "rates", "said"),
    [
        (["full", "lorra"], {}, "'lorra' is neither a method .* Did you mean lora?"),
        (["full"], {}, "name two or more"),
        (["full", "lora", "full"], {}, "full is there twice"),
        (["full", "lora"], {"ia3": 1e-3}, "--lr ia3=…: it is the rate of a method of this comparison"),
        (["full", "missing.yaml"], {}, "--methods missing.yaml cannot be read"),
    ],
)
def test_what_is_no_comparison_is_said_in_one_sentence(llava, methods, rates, said):
    with pytest.raises(VlmtuneError, match=said):
        build_arms(config_of(llava, PLANS["parts"]), methods, rates)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "write names with plans"),
        ("a: {match: language}", "write names with plans"),
        ("../up: [{match: '*', train: full}]", "becomes a folder"),
        ("lora: [{match: '*', train: full}]", "give the plan another name"),
        ("mine: [{match: '*', train: fulll}]", "arm mine: plan.0.train"),
        ("mine: [{match: language, train: full}]", "arm mine: plan: no rule covers"),
        ("mine: [", "cannot be read"),
    ],
)
def test_a_file_that_holds_no_plans(llava, tmp_path, text, said):
    file = tmp_path / "plans.yaml"
    file.write_text(text)
    with pytest.raises(VlmtuneError, match=said):
        build_arms(config_of(llava, PLANS["parts"]), ["full", str(file)], {})


def test_a_wrong_plan_of_the_config_is_said_before_any_arm(llava):
    with pytest.raises(VlmtuneError, match="no rule covers"):
        build_arms(config_of(llava, PLANS["parts"][:3]), ["full", "lora"], {})
