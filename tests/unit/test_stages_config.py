"""Chains in a config: what a stage says stands over the top level (SPEC E4)."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.config import Chain, Stage, config_schema, dump_chain, load_config, load_run_config
from vlmtune.config.stages import merged
from vlmtune.errors import VlmtuneError

TOP = {
    "model": "embedded",
    "run": "runs/chain",
    "data": {"train": [{"scenes": "new", "task": "vqa"}], "max_length": 512},
    "train": {"batch_size": 8, "micro_batch_size": 4},
    "optim": {"lr": 1e-3, "warmup": 1},
}
FULL, LORA = [{"match": "*", "train": "full"}], [{"match": "*", "train": "lora"}]


@pytest.fixture
def write(tmp_path):
    def chain(*stages: dict, **top) -> str:
        path = tmp_path / "chain.yaml"
        path.write_text(yaml.safe_dump({**TOP, **top, "stages": list(stages)}))
        return str(path)

    return chain


def two(write, first: dict | None = None, second: dict | None = None, **top) -> Chain:
    found = load_run_config(
        write({"name": "one", "plan": FULL, **(first or {})}, {"name": "two", "plan": LORA, **(second or {})}, **top)
    )
    assert isinstance(found, Chain)
    return found


def test_each_stage_is_an_ordinary_run_from_the_one_before(write):
    chain = two(write)
    one, other = chain.stages["one"], chain.stages["two"]
    assert (one.model, one.run) == ("embedded", "runs/chain/1_one")
    assert (other.model, other.run) == ("runs/chain/1_one/exported", "runs/chain/2_two")
    assert [rule.train for rule in (one.plan[0], other.plan[0])] == ["full", "lora"]


def test_mappings_merge_and_lists_replace(write):
    chain = two(
        write,
        {"data": {"train": [{"scenes": "base", "task": "ocr"}]}, "optim": {"lr": 5e-4}},
        {"train": {"micro_batch_size": 8}},
    )
    one, other = chain.stages["one"], chain.stages["two"]
    assert one.data.train[0].task == "ocr" and one.data.max_length == 512
    assert (one.optim.lr, one.optim.warmup) == (5e-4, 1) and other.optim.lr == 1e-3
    assert (other.train.batch_size, other.train.micro_batch_size) == (8, 8)


trees = st.recursive(
    st.integers() | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(top=trees, own=trees)
def test_what_is_said_is_kept(top, own):
    """Every leaf that the stage gives is in the result; merging with itself or nothing changes nothing."""

    def leaves(tree, path=()):
        if isinstance(tree, dict) and tree:
            return {leaf: v for key, part in tree.items() for leaf, v in leaves(part, (*path, key)).items()}
        return {path: tree}

    found = merged(top, own)
    whole = leaves(found)
    for path, value in leaves(own).items():
        assert whole.get(path) == value or (value == {} and any(leaf[: len(path)] == path for leaf in whole))
    assert merged(found, own) == found and merged(top, top) == top


def test_reading_what_was_dumped_gives_the_same_chain(write, tmp_path):
    chain = two(write, {"stability": {"nonfinite": "skip"}})
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_chain(chain))
    assert load_run_config(str(path)) == chain


def test_an_override_of_one_stage_leaves_its_alias_alone(write, tmp_path):
    """YAML's anchors make two stages share a plan; changing one of them must not change the other."""
    path = tmp_path / "alias.yaml"
    plan = "[{match: '*', train: full, lr: 0.1}]"
    stages = f"stages:\n- {{name: one, plan: &plan {plan}}}\n- {{name: two, plan: *plan}}\n"
    path.write_text(yaml.safe_dump(TOP) + stages)
    chain = load_run_config(str(path), ["stages.1.plan.0.lr=0.5"])
    assert [config.plan[0].lr for config in chain.stages.values()] == [0.1, 0.5]


def test_one_stage_is_picked_by_name(write):
    path = write({"name": "one", "plan": FULL}, {"name": "two", "plan": LORA})
    assert load_config(path, ["stage=two", "optim.lr=2e-5"]).optim.lr == 2e-5
    assert load_config(path, ["stages.1.train.seed=7", "stage=two"]).train.seed == 7
    with pytest.raises(VlmtuneError, match=r"a chain of stages \(one, two\); pick one: stage=one"):
        load_config(path)
    with pytest.raises(VlmtuneError, match="no stage 'three'"):
        load_config(path, ["stage=three"])
    with pytest.raises(VlmtuneError, match="debug has no stages"):
        load_config("debug", ["stage=two"])


def test_an_override_that_reaches_no_stage_is_refused(write):
    """A stage stands over the top level, so what it says must be overridden there; what one stage leaves is reached."""
    path = write(
        {"name": "one", "plan": FULL, "train": {"length": 4}, "optim": {"lr": 1e-4}},
        {"name": "two", "plan": LORA, "train": {"length": 5}},
    )
    with pytest.raises(VlmtuneError, match=r"'train.length=2' does nothing, because every stage says train.length"):
        load_run_config(path, ["train.length=2"])
    with pytest.raises(VlmtuneError, match=r"stage one says optim.lr itself; write stages.0.optim.lr=3e-4"):
        load_config(path, ["optim.lr=3e-4", "stage=one"])
    assert load_config(path, ["optim.lr=3e-4", "stage=two"]).optim.lr == 3e-4
    assert load_config(path, ["stages.0.train.length=2", "stage=one"]).train.length == 2
    with pytest.raises(VlmtuneError, match="'plan.0.train=lora' does nothing"):
        load_run_config(path, ["plan=[{match: '*', train: full}]", "plan.0.train=lora"][1:])
    chain = load_run_config(path, ["optim.lr=3e-4", "train.seed=7"])
    assert [c.optim.lr for c in chain.stages.values()] == [1e-4, 3e-4]
    assert [c.train.seed for c in chain.stages.values()] == [7, 7]


def test_the_schema_knows_stages():
    schema = config_schema()
    assert schema["properties"]["stages"]["items"] == {"$ref": "#/$defs/Stage"}
    assert set(schema["$defs"]["Stage"]["properties"]) == set(Stage.model_fields)
    assert {"required": ["stages"]} in schema["anyOf"] and "required" not in schema


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"name": "one", "plan": FULL}], "stages: list should have at least 2 items"),
        ([{"name": "one", "plan": FULL}, {"name": "one", "plan": FULL}], "two stages are called 'one'"),
        ([{"name": "one", "plan": FULL}, {"name": "../two", "plan": FULL}], "stages.1.name: the name of a stage"),
        (
            [{"name": "one", "plan": FULL}, {"name": "two", "plam": FULL}],
            "stages.1.plam (did you mean plan?)",
        ),
        ([{"name": "one", "plan": FULL}, {"name": "two"}], "stage two: plan is required"),
        ([{"name": "one", "plan": FULL, "optim": {"lrr": 1}}, {"name": "two"}], "stage one: unknown key optim.lrr"),
        ([{"plan": FULL}, {"name": "two", "plan": FULL}], "stages.0.name is required"),
        ([{"name": "one", "plan": FULL, "loss": None}, {"name": "two", "plan": FULL}], "stages.0: loss is null"),
        ("none", "stages: "),
    ],
)
def test_complaints_name_the_stage(write, tmp_path, stages, said):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({**TOP, "stages": stages}))
    with pytest.raises(VlmtuneError) as caught:
        load_run_config(str(path))
    assert said in str(caught.value)
