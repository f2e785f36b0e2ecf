"""The configuration: every complaint at once, overrides, round trip, recipes that parse, a schema with every field."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from vlmtune import cli
from vlmtune.config import (
    Chain,
    Config,
    differing_keys,
    dump_chain,
    dump_config,
    load_config,
    load_run_config,
    parse_config,
    recipe_names,
)
from vlmtune.errors import VlmtuneError

SMALL = {
    "model": "somewhere",
    "data": {"train": [{"path": "a.jsonl"}, {"path": "b.jsonl", "weight": [[0, 1], [0.5, 0]]}]},
    "plan": [{"match": "vision", "train": "frozen"}, {"match": "*", "train": "lora", "rank": 4}],
}


@pytest.fixture
def written(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return str(path)


def complaint(tree: dict) -> str:
    with pytest.raises(VlmtuneError) as caught:
        parse_config(tree, "config.yaml")
    return str(caught.value)


def test_every_complaint_comes_at_once():
    message = complaint(
        {
            "modle": "x",
            "data": {"train": [{"paht": "a.jsonl"}, {"scenes": "base"}], "max_length": 3},
            "plan": [{"match": "vision", "train": "frozn"}, {"match": "*", "train": "full", "rank": 4}],
            "optim": {"lr": -1, "warmup": "a while"},
            "train": {"batch_size": 10, "micro_batch_size": 4, "lenght": 5},
        }
    )
    assert message.startswith("config.yaml: ")
    for expected in (
        "unknown key modle (did you mean model?)",
        "model is required",
        "unknown key data.train.0.paht (did you mean path?)",
        "data.train.1: scenes need a task",
        "data.max_length: input should be greater than or equal to 8 (got 3)",
        "plan.0.train: input should be 'frozen', 'full', 'lora', 'ia3', 'adapter', 'cross_modal', 'prefix', 'peft' or "
        "'new_rows' (got 'frozn')",
        "plan.1: rank only mean something with train: lora",
        "optim.lr: input should be greater than 0 (got -1)",
        "optim.warmup: length 'a while': write a number of steps",
        "unknown key train.lenght (did you mean length?)",
    ):
        assert expected in message, message
    assert "\n" not in message


def test_a_key_like_no_other_lists_the_known_ones():
    assert "unknown key optim.zzz (known: name, lr, weight_decay, betas" in complaint(SMALL | {"optim": {"zzz": 1}})


@pytest.mark.parametrize(
    ("place", "tree", "near"),
    [
        ("checkpoint.kep", {"checkpoint": {"kep": 1}}, "keep"),
        ("evaluate.galery", {"evaluate": {"galery": 1}}, "gallery"),
        ("data.evla", {"data": SMALL["data"] | {"evla": {}}}, "eval"),
        ("data.eval.old.0.limt", {"data": SMALL["data"] | {"eval": {"old": [{"path": "a", "limt": 3}]}}}, "limit"),
        ("plan.0.rnk", {"plan": [{"match": "*", "train": "lora", "rnk": 3}]}, "rank"),
    ],
)
def test_the_nearest_name_comes_from_the_right_section(place, tree, near):
    assert f"unknown key {place} (did you mean {near}?)" in complaint(SMALL | tree)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"train": {"batch_size": 10, "micro_batch_size": 4}}, "batch_size 10 is not a multiple of micro_batch_size 4"),
        ({"data": {"train": [{}]}}, "give either path or scenes"),
        ({"data": {"train": [{"path": "a", "scenes": "base", "task": "vqa"}]}}, "give either path or scenes"),
        ({"data": {"train": [{"scenes": "base", "task": "vqa", "split": "test"}]}}, "split of scenes is train or val"),
        ({"data": {"train": [{"scenes": "base", "task": "vqa", "image_root": "x"}]}}, "image_root belongs to files"),
        ({"data": {"train": []}}, "data.train"),
        ({"data": SMALL["data"] | {"eval": {"a/b": [{"path": "a"}]}}}, "a name is not empty and has no slash"),
        ({"data": SMALL["data"] | {"eval": {"old": []}}}, "data.eval.old: list should have at least 1 item"),
        ({"data": {"train": [{"path": "a", "task": ""}]}}, "data.train.0.task: a name is not empty"),
        ({"model": ""}, "model: string should have at least 1 character"),
        ({"run": ""}, "run: string should have at least 1 character"),
        ({"data": SMALL["data"] | {"template": "chatml"}}, "data.template: input should be 'auto', 'single', 'system'"),
        ({"data": {"train": [{"path": "a", "weight": [[0.5, 1]]}]}}, "boundaries that start at 0"),
        ({"plan": []}, "plan"),
        ({"plan": [{"match": "*", "train": "frozen", "lr": 1e-3}]}, "mean nothing on frozen parameters"),
        ({"train": {"length": "5 miles"}}, "train.length: length '5 miles'"),
        ({"checkpoint": {"every": "often"}}, "checkpoint.every: length 'often'"),
        ({"evaluate": {"every": "often"}}, "evaluate.every: length 'often'"),
        ({"evaluate": {"metrics": {"vqa": ["rougeL"]}}}, "no metric 'rougeL' (did you mean rouge_l?)"),
        ({"evaluate": {"metrics": {"vqa": []}}}, "evaluate.metrics.vqa: list should have at least 1 item"),
        ({"evaluate": {"metrics": {"v/a": ["anls"]}}}, "a name is not empty and has no slash"),
        ({"evaluate": {"metrics": {"vqa": ["anls", "anls"]}}}, "metrics.vqa names a metric twice"),
        ({"evaluate": {"metrics": {"vqa": ["mask_iou", "anls"]}, "generate": False}}, "anls is measured on generated"),
        ({"optim": {"floor": 2}}, "optim.floor"),
        ({"optim": {"betas": [0.9, 1.0]}}, "optim.betas.1: input should be less than 1"),
        ({"optim": {"lr": float("inf")}}, "optim.lr: input should be a finite number"),
        ({"train": {"seed": -1}}, "train.seed: input should be greater than or equal to 0"),
        ({"train": {"seed": 2**64}}, "train.seed: input should be less than"),
        ({"train": {"threads": 10**9}}, "train.threads: input should be less than or equal to 1024"),
        ({"checkpoint": {"best": "v/vqa/exact_match"}}, "is never measured; set data.eval and evaluate.every"),
        ({"checkpoint": {"best_is": "highest"}}, "best_is highest of loss would keep the worst checkpoint"),
        (
            {"checkpoint": {"best": "v/vqa/exact_match", "best_is": "lowest"}},
            "best_is lowest of v/vqa/exact_match would keep the worst checkpoint",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(tree, expected):
    assert expected in complaint(SMALL | tree)


def test_what_is_retained_is_held_out():
    """Its effect is in tests/integration/test_validate_command.py::test_forgetting_is_told_and_ends_with_1."""
    tree = SMALL | {"evaluate": {"retain": ["old"]}}
    assert "evaluate.retain: old is no group of data.eval (none)" in complaint(tree)
    held_out = SMALL["data"] | {"eval": {"old": [{"path": "c.jsonl"}]}}
    assert parse_config(tree | {"data": held_out}, "config.yaml").evaluate.retain == ["old"]


def test_overrides_reach_leaves_lists_and_new_sections(written):
    config = load_config(
        written,
        ["optim.lr=1e-4", "plan.1.rank=8", "data.train.0.path=c.jsonl", "data.train.1.weight=[[0, 2], [0.25, 1]]",
         "train.batch_size=32", "optim.betas=[0.9, 0.95]", "plan.1.match=*", "run=runs/x=y", "data.max_length=null"],
    )  # fmt: skip
    assert config.optim.lr == 1e-4
    assert config.plan[1].rank == 8
    assert config.plan[1].match == "*"
    assert config.data.train[0].path == "c.jsonl"
    assert config.data.train[1].weight == [(0, 2), (0.25, 1)]
    assert config.train.batch_size == 32
    assert config.optim.betas == (0.9, 0.95)
    assert config.run == "runs/x=y"
    assert config.data.max_length is None


def test_a_whole_list_can_be_overridden(written):
    config = load_config(written, ["plan=[{match: language, train: full}]"])
    assert [(rule.match, rule.train) for rule in config.plan] == [("language", "full")]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr", "write key=value"),
        ("=3", "write key=value"),
        ("plan.7.rank=3", "'7' is not an index below 2"),
        ("plan.last.rank=3", "'last' is not an index below 2"),
        ("plan.7=3", "'7' is not an index below 2"),
        ("model.name=3", "model is a value, not a section"),
        ("optim.lrr=1e-4", "unknown key optim.lrr (did you mean lr?)"),
        ("optim.lr=fast", "optim.lr: input should be a valid number"),
        ("optim.steps=6", "unknown key optim.steps (did you mean train.length?)"),
        ("train.num_train_epochs=3", "(did you mean train.length?)"),
        ("optim.max_grad_norm=1", "(did you mean optim.clip?)"),
        ("plan.²=1", "'²' is not an index below 2"),
        ("train.length=true", "train.length: write a number of steps, or a text such as 2 epochs"),
        ("train.length=50%", "train.length: length '50%': a share of what?"),
        ("train.length=.nan", "train.length: length nan: write a number of steps"),
        ("plan.0.lr=[[0,0],[0.5,-1]]", "plan.0.lr: learning rate [[0, 0], [0.5, -1]]: none may be below 0"),
        ("plan.0.lr=[0,0.5]", "plan.0.lr: write a learning rate, or [[progress, rate], …]"),
        ("plan.0.lr=[[0,0],[50%,1e-3]]", "plan.0.lr: write a learning rate, or [[progress, rate], …]"),
        ("optim.betas=[0.9", "optim.betas"),
    ],
)
def test_wrong_overrides_are_named(written, override, expected):
    with pytest.raises(VlmtuneError) as caught:
        load_config(written, [override])
    assert expected in str(caught.value)


def test_a_template_that_was_not_filled_in_is_no_traceback(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: x\nrun: {{ name }}\n")
    with pytest.raises(VlmtuneError, match="not valid YAML: .*line 2"):
        load_config(str(path))


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4"])
def test_every_way_to_write_a_small_number_is_a_number(tmp_path, text):
    """YAML 1.1 reads 1e-4 as text."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(SMALL) + f"optim: {{lr: {text}}}\n")
    assert load_config(str(path)).optim.lr == 1e-4
    assert load_config(str(path), [f"optim.weight_decay={text}"]).optim.weight_decay == 1e-4


def test_dump_and_load_give_the_same_config(tmp_path, written):
    config = load_config(written, ["optim.lr=3e-7", "run=läufe/ü", "data.train.1.weight=[[0, 1], [0.1, 1e-9]]"])
    path = tmp_path / "again.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    again = load_config(str(path))
    assert again == config
    assert dump_config(again) == dump_config(config)
    assert again != load_config(written)


def test_the_resolved_config_shows_every_field(written):
    tree = yaml.safe_load(dump_config(load_config(written)))
    assert set(tree) == set(Config.model_fields)
    assert tree["optim"]["eps"] == 1e-8


def test_there_are_recipes_and_each_one_parses_and_round_trips(tmp_path):
    names = recipe_names()
    assert "embedded_base" in names
    for name in names:
        config = load_run_config(name)
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_chain(config) if isinstance(config, Chain) else dump_config(config), encoding="utf-8")
        assert load_run_config(str(path)) == config


def test_a_recipe_takes_overrides():
    assert load_config("embedded_base", ["train.seed=7"]).train.seed == 7


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embeded_base", "Did you mean embedded_base?"),
        ("zzzz", "'zzzz' is neither a .yaml file nor a recipe (compare"),
        ("missing.yaml", "config missing.yaml does not exist; recipes that ship: compare, debug"),
    ],
)
def test_a_config_that_is_not_there_is_named(name, expected):
    with pytest.raises(VlmtuneError) as caught:
        load_config(name)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"model: [unclosed", "not valid YAML"),
        (b"model: a\nrun: b\nmodel: c\n", "the key model stands on line 1 and again on line 3"),
        (b"plan: [{match: a, match: b}]\n", "the key match stands on line 1 and again on line 1"),
        (b"- a\n- b\n", "a config is a mapping with the keys model, data"),
        (b"", "a config is a mapping"),
        (b"model: \xff\xfe\n", "cannot be read"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path, content, expected):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(VlmtuneError) as caught:
        load_config(str(path))
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_configs_cannot_be_changed_by_accident(written):
    config = load_config(written)
    with pytest.raises(Exception, match="frozen"):
        config.optim.lr = 1.0


def test_schema_prints_every_field_with_its_description(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vlmtune", "schema"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code in (0, None)
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == {*Config.model_fields, "stages"}
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Optim"]["properties"]["lr"]["default"] == 2e-4
    assert "held-out" in schema["$defs"]["Data"]["properties"]["eval"]["description"]


def test_recipes_are_listed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vlmtune", "recipes"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out.split() == recipe_names()


def test_differing_keys_are_named_with_both_values():
    before = {"train": {"seed": 0, "length": "3 epochs"}, "plan": [{"lr": 1.0}, {"lr": None}]}
    after = {"train": {"seed": 1, "length": "3 epochs"}, "plan": [{"lr": 1.0}, {"lr": 2.0}]}
    assert differing_keys(before, after) == ["train.seed (0 -> 1)", "plan.1.lr (null -> 2.0)"]
    assert differing_keys(before, before) == []
    assert differing_keys({"plan": [1]}, {"plan": [1, 2]}) == ["plan ([1] -> [1, 2])"]
