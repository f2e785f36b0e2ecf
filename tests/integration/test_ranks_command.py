"""`vlmtune ranks`: what it prints and writes, a training that takes its plan, and the plan's arithmetic (SPEC F2)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from vlmtune.adapt.fisher import linear_modules
from vlmtune.config import Rule, load_config
from vlmtune.models.load import load_model
from vlmtune.ranks import group_of, rules_with_ranks
from vlmtune.rules import assign
from vlmtune.types import VlmtuneError

BUDGET = 8


@pytest.fixture
def linear(tiny_folder) -> dict:
    model = load_model(str(tiny_folder("llava")))
    return {name: module for name, module in linear_modules(model).items() if name.startswith("language")}


@pytest.fixture
def config(write_config) -> Path:
    return write_config("run", 3)


def cost_of(linear: dict, ranks: dict[str, int]) -> int:
    return sum((m.in_features + m.out_features) * ranks[name] for name, m in linear.items())


def ranks_of(path: Path, names: list[str]) -> dict[str, int]:
    """The ranks that the plan in a file gives to modules."""
    rules = [(rule.match, rule) for rule in load_config(str(path)).plan]
    others = ["vision.x", "projector.x", "language.norm.weight", "embed.weight", "lm_head.weight"]
    assignment = assign(rules, [f"{name}.weight" for name in names] + others)
    return {name: assignment[f"{name}.weight"][1].rank for name in names}


def test_a_plan_that_training_takes(config, vlmtune, linear, tmp_path):
    """The one run of it all: measured, written, trained, and the adapter on disk has these ranks."""
    output = tmp_path / "ranks.yaml"
    code, out, err = vlmtune("ranks", config, "--budget", BUDGET, "--samples", 6, "--output", output)
    assert (code, err) == (0, "")
    assert "language.layers.*.self_attn.q_proj" in out and "measured on 6 samples" in out and f"{output}" in out
    uniform = cost_of(linear, dict.fromkeys(linear, BUDGET))
    assert f"{uniform:,} LoRA parameters in {len(linear)} modules" in out

    ranks = ranks_of(output, list(linear))
    assert cost_of(linear, ranks) == uniform and len(set(ranks.values())) > 1
    assert all(rank % 4 == 0 and 4 <= rank <= 64 for rank in ranks.values())
    before, after = yaml.safe_load(config.read_text()), yaml.safe_load(output.read_text())
    assert {k: v for k, v in after.items() if k != "plan"} == {k: v for k, v in before.items() if k != "plan"}
    assert [rule for rule in after["plan"] if not rule["match"].startswith("language")] == [
        rule for rule in before["plan"] if rule["match"] != "language"
    ]
    assert all(rule["dropout"] == 0.1 and "alpha" not in rule for rule in after["plan"] if rule["train"] == "lora")
    assert after["plan"][-3] == {"match": "language", "train": "frozen"}, "norms stay frozen, as under LoRA"

    code, _, err = vlmtune("train", output)
    assert (code, err) == (0, "")
    run = tmp_path / "run"
    rows = json.loads((run / "assignment.json").read_text())
    assert sum(row["trainable"] for row in rows if row["part"] == "language") == uniform
    stored: dict[str, int] = {}
    for file in (run / "checkpoints" / "step_000003").rglob("adapter_model.safetensors"):
        stored |= {name: tensor.shape[0] for name, tensor in load_file(file).items() if ".lora_A" in name}
    assert {
        name: next(r for path, r in stored.items() if f".{name.removeprefix('language.')}." in path) for name in linear
    } == ranks


@pytest.mark.parametrize("per, keys", [("kind", 7), ("layer", 4)])
def test_groups_share_a_rank(config, vlmtune, linear, tmp_path, per, keys):
    output = tmp_path / "ranks.yaml"
    arguments = ("--samples", 2, "--budget", BUDGET, "--per", per, "--count", "ranks", "--power", 1, "--output", output)
    code, _, err = vlmtune("ranks", config, "plan.2.alpha=12", *arguments)
    assert (code, err) == (0, "")
    ranks = ranks_of(output, list(linear))
    assert sum(ranks.values()) == BUDGET * len(linear)
    groups = {name: group_of(name, per) for name in linear}
    assert len({(groups[name], rank) for name, rank in ranks.items()}) == len(set(groups.values()))
    lora = [rule for rule in load_config(str(output)).plan if rule.train == "lora"]
    assert len(lora) <= keys and all(rule.alpha == 3 * rule.rank for rule in lora), "alpha per rank was 12 / 4"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--budget", 10], "--budget 10: ranks are multiples of 4 from 4 to 64.*take 8 or 12"),
        (["--budget", 0], "take 4 or 8"),
        (["--budget", 1000], "take 64"),
        (["--budget", 64], r"--budget 64 exceeds the smaller dimension \d+ of language.layers.0"),
        (["plan.2.train=frozen", "plan.2.rank=null", "plan.2.dropout=null"], "no rule of the plan says train: lora"),
        (["--output", "nowhere/ranks.yaml"], "the folder nowhere does not exist"),
        (["--output", "run.yaml"], "--output run.yaml exists; name another file"),
    ],
)
def test_bad_input(config, vlmtune, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = vlmtune("ranks", config, "--samples", 2, *arguments)
    assert code == 1 and "Traceback" not in err
    assert re.search(message, err), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_a_tied_head_that_has_lora(write_config, tiny_folder, vlmtune, tmp_path):
    """Its weight is the embedding's, its adapter stands at the head alone, and gets a rank of its own."""
    plan = [
        {"match": "lm_head", "train": "lora", "rank": 4},
        {"match": "language", "train": "lora", "rank": 4},
        {"match": "*", "train": "frozen"},
    ]
    config = write_config("tied", 3, model=str(tiny_folder("internvl")), plan=plan)
    output = tmp_path / "ranks.yaml"
    code, out, err = vlmtune("ranks", config, "--samples", 3, "--budget", BUDGET, "--output", output)
    assert (code, err) == (0, "")
    linear = linear_modules(load_model(str(tiny_folder("internvl"))))
    linear = {name: module for name, module in linear.items() if name.startswith(("language", "lm_head"))}
    uniform = cost_of(linear, dict.fromkeys(linear, BUDGET))
    assert "lm_head" in linear and f"{uniform:,} LoRA parameters in {len(linear)} modules" in out
    assert yaml.safe_load(output.read_text())["plan"][0]["match"] == "lm_head"
    code, _, err = vlmtune("train", output)
    assert (code, err) == (0, "")
    rows = json.loads((tmp_path / "tied" / "assignment.json").read_text())
    assert sum(row["trainable"] for row in rows) == uniform


def test_fewer_samples_than_asked_for_are_said(config, vlmtune, tmp_path):
    """A run of three steps of four samples."""
    code, out, err = vlmtune("ranks", config, "--budget", 4, "--output", tmp_path / "ranks.yaml")
    assert (code, err) == (0, "")
    assert "only 12 different samples" in out and "measured on 12 samples" in out


LAYERS, KINDS = 5, ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
MODULES = [f"language.layers.{layer}.{kind}" for layer in range(LAYERS) for kind in KINDS] + ["projector.linear_1"]
NAMES = [
    *(f"{module}.{leaf}" for module in MODULES for leaf in ("weight", "bias")),
    *(f"language.layers.{layer}.norm.weight" for layer in range(LAYERS)),
    "language.norm.weight", "embed.weight", "vision.patch.weight",
]  # fmt: skip
PLANS = [
    [("language", "lora"), ("*", "frozen")],
    [("*", "lora")],
    [("language.layers[1:3]", "full"), ("language", "lora"), ("projector", "lora"), ("*", "frozen")],
    [("language.layers[0:2].self_attn", "lora"), ("language.layers.2", "lora"), ("language", "full"), ("*", "frozen")],
    [("*.weight", "lora"), ("*", "full")],  # a bias that belongs to another rule
    [("language.layers.*.mlp", "lora"), ("language.layers.1", "full"), ("*", "frozen")],
]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(PLANS), st.lists(st.sampled_from([4, 8, 12]), min_size=len(MODULES), max_size=len(MODULES)))
def test_the_new_plan_says_what_was_allocated_and_nothing_else(plan, drawn):
    rules = [Rule(match=match, train=train, **({"lr": 1e-3} if train == "lora" else {})) for match, train in plan]
    before = assign([(rule.match, rule) for rule in rules], NAMES)
    adapted = [module for module in MODULES if before[f"{module}.weight"][1].train == "lora"]
    ranks = {module: rank for module, rank in zip(MODULES, drawn, strict=True) if module in adapted}
    changed = rules_with_ranks(rules, NAMES, ranks)
    after = assign([(rule.match, rule) for rule in changed], NAMES)  # refuses rules without effect, and gaps
    for name in NAMES:
        old, new = before[name][1], after[name][1]
        module = name.rpartition(".")[0]
        if old.train != "lora":
            assert new is old
        elif name == f"{module}.weight" and module in ranks:
            assert (new.train, new.rank, new.lr) == ("lora", ranks[module], 1e-3)
        else:
            assert new.train in ("frozen", "lora"), "what LoRA covered beside linear modules stays frozen"
    assert len(changed) <= len(ranks) + len(rules) + sum(rule.train == "lora" for rule in rules)


def test_equal_neighbours_share_a_rule():
    rules = [Rule(match="language", train="lora", rank=16), Rule(match="*", train="frozen")]
    ranks = dict.fromkeys(MODULES[:-1], 8)
    assert [r.match for r in rules_with_ranks(rules, NAMES, ranks)] == ["language", "*"]
    ranks |= {"language.layers.3.mlp.up_proj": 4, "language.layers.4.self_attn.q_proj": 12}
    assert [(r.match, r.rank) for r in rules_with_ranks(rules, NAMES, ranks)] == [
        ("language.layers[0:3]", 8),
        ("language.layers.3.self_attn", 8),
        ("language.layers.3.mlp", 4),
        ("language.layers.4.self_attn.q_proj", 12),
        ("language.layers.4.self_attn.o_proj", 8),
        ("language.layers.4.mlp", 8),
        ("language", None),
        ("*", None),
    ]


def test_a_name_of_a_later_rule_is_not_swallowed():
    rules = [
        Rule(match="language.layers[0:2]", train="lora"),
        Rule(match="language", train="full"),
        Rule(match="*", train="frozen"),
    ]
    ranks = {module: 8 for module in MODULES[:6]}
    assert [rule.match for rule in rules_with_ranks(rules, NAMES, ranks)] == ["language.layers[0:2]", "language", "*"]


def test_one_alpha_for_ranks_by_kind_is_refused():
    rule = Rule.model_construct(match="language", train="lora", rank={"qk": 4}, alpha=8.0)
    with pytest.raises(VlmtuneError, match="one alpha for several ranks"):
        rules_with_ranks([rule, Rule(match="*", train="frozen")], NAMES, dict.fromkeys(MODULES[:-1], 8))
