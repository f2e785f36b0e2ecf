"""Config files: reading, overriding, complaining, writing."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from vlmtune.config.course import Checkpoint, Evaluate, Optim, Stability, Train
from vlmtune.config.data import Complexity, Data, Negatives, Sampling, Source
from vlmtune.config.learning_rate import LrSegment
from vlmtune.config.loss import Balance, BoxTerm, ConsistencyTerm, ExposureTerm, Loss, ReferringTerm
from vlmtune.config.plan import Quantise, Rule
from vlmtune.config.stages import EXPORTED, Chain, Stage, stage_folder
from vlmtune.config.whole import Config
from vlmtune.errors import VlmtuneError

OTHER_NAMES = {  # what other frameworks call it -> the key here
    **dict.fromkeys(("steps", "max_steps", "epochs", "num_epochs", "num_train_epochs"), "train.length"),
    "learning_rate": "optim.lr",
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), "train.batch_size"),
    **dict.fromkeys(("bf16", "fp16", "dtype", "torch_dtype"), "train.precision"),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), "optim.warmup"),
    **dict.fromkeys(("max_grad_norm", "max_norm"), "optim.clip"),
    **dict.fromkeys(("save_steps", "save_strategy"), "checkpoint.every"),
    **dict.fromkeys(("eval_steps", "eval_strategy"), "evaluate.every"),
    "output_dir": "run",
    **dict.fromkeys(("model_name_or_path", "base_model"), "model"),
    **dict.fromkeys(("lora_r", "r", "lora_rank"), "plan: {train: lora, rank: …}"),
    **dict.fromkeys(("cutoff_len", "max_seq_length", "max_seq_len"), "data.max_length"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), "optim.schedule"),
    "logging_steps": "train.log_every",
    "save_total_limit": "checkpoint.keep",
}


class _NoDuplicates(yaml.SafeLoader):
    """YAML's plain loader keeps the last of two equal keys and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {key.start_mark.line + 1} has a list or mapping where a key is expected")
            if key.value in seen:
                raise yaml.YAMLError(f"the key {key.value} stands on line {seen[key.value]} and again on line {line}")
            seen[key.value] = line
        return super().construct_mapping(node, deep)


def differing_keys(tree: Any, other: Any, place: str = "") -> list[str]:
    """ "train.seed (0 -> 1)" for every leaf in which two dumped configs differ."""
    if isinstance(tree, dict) and isinstance(other, dict):
        pairs = [(str(key), tree.get(key), other.get(key)) for key in {**tree, **other}]
    elif isinstance(tree, list) and isinstance(other, list) and len(tree) == len(other):
        pairs = [(str(n), *pair) for n, pair in enumerate(zip(tree, other, strict=True))]
    else:
        return [] if tree == other else [f"{place} ({_short(tree)} -> {_short(other)})"]
    return [found for key, *pair in pairs for found in differing_keys(*pair, f"{place}.{key}".lstrip("."))]


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def recipe_names() -> list[str]:
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("vlmtune.recipes").iterdir() if p.name.endswith(".yaml")
    )


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file or a shipped recipe by name and apply `key=value` overrides; of a chain, `stage=NAME` picks one.

    Raises VlmtuneError listing every complaint at once.
    """
    picked = [override.partition("=")[2] for override in overrides if override.startswith("stage=")]
    found = _load(name, [o for o in overrides if not o.startswith("stage=")], picked[-1] if picked else None)
    if isinstance(found, Config):
        if picked:
            raise VlmtuneError(f"{name} has no stages; leave out stage={picked[-1]}.")
        return found
    names = ", ".join(found.stages)
    if not picked:
        raise VlmtuneError(f"{name} is a chain of stages ({names}); pick one: stage={next(iter(found.stages))}.")
    if picked[-1] not in found.stages:
        raise VlmtuneError(f"{name} has no stage {picked[-1]!r}; its stages are {names}.")
    return found.stages[picked[-1]]


def load_run_config(name: str, overrides: Sequence[str] = ()) -> Config | Chain:
    """As `load_config`, for what can run all stages of a chain."""
    return _load(name, overrides, None)


def _load(name: str, overrides: Sequence[str], picked: str | None) -> Config | Chain:
    """picked: the only stage that is wanted; an override that does not reach it is refused."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise VlmtuneError(f"config {name} does not exist; recipes that ship: {', '.join(recipe_names())}.")
        try:
            text, where = path.read_text(encoding="utf-8"), name
        except (OSError, UnicodeDecodeError) as error:
            raise VlmtuneError(f"config {name} cannot be read ({error}); it is a YAML file in UTF-8.") from error
    elif name in recipe_names():
        text, where = (resources.files("vlmtune.recipes") / f"{name}.yaml").read_text(), f"recipe {name}"
    else:
        near = difflib.get_close_matches(name, recipe_names(), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise VlmtuneError(f"{name!r} is neither a .yaml file nor a recipe ({', '.join(recipe_names())}).{hint}")
    try:
        tree = _unshared(yaml.load(text, Loader=_NoDuplicates))  # noqa: S506  a SafeLoader
    except (yaml.YAMLError, TypeError) as error:  # TypeError: a mapping as a key, as in {{ name }}
        raise VlmtuneError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise VlmtuneError(f"{where}: a config is a mapping with the keys {', '.join(Config.model_fields)}.")
    for override in overrides:
        _apply_override(tree, override)
    if "stages" not in tree:
        return parse_config(tree, where)
    chain = parse_chain(tree, where)
    _require_reach(overrides, [Stage.model_validate(stage) for stage in tree["stages"]], picked)
    return chain


def _require_reach(overrides: Sequence[str], stages: Sequence[Stage], picked: str | None) -> None:
    """Refuse overrides of the top level that every stage (or the picked one) says otherwise: they would do nothing."""
    numbers = [n for n, stage in enumerate(stages) if picked is None or stage.name == picked]
    for override in overrides:
        key, _, value = override.partition("=")
        path = key.split(".")
        if path[0] != "stages" and numbers and all(stages[n].says(path) for n in numbers):
            who = f"stage {picked} says" if picked else "every stage says"
            raise VlmtuneError(
                f"override {override!r} does nothing, because {who} {key} itself; write "
                f"stages.{numbers[0]}.{key}={value}."
            )


def parse_config(tree: dict, where: str = "config") -> Config:
    """Validate a tree. Raises VlmtuneError naming every wrong key and value."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise VlmtuneError(f"{where}: " + "; ".join(_complaint(e) for e in error.errors()) + ".") from error


def parse_chain(tree: dict, where: str = "config") -> Chain:
    """Validate a tree with stages. Raises VlmtuneError naming the stage and every wrong key and value."""
    top = {key: value for key, value in tree.items() if key != "stages"}
    try:
        stages = TypeAdapter(Annotated[list[Stage], Field(min_length=2)]).validate_python(tree["stages"])
    except ValidationError as error:
        found = [e | {"loc": ("stages", *e["loc"])} for e in error.errors()]
        raise VlmtuneError(f"{where}: " + "; ".join(_complaint(e) for e in found) + ".") from error
    names = [stage.name for stage in stages]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise VlmtuneError(f"{where}: two stages are called {twice[0]!r}; give each a name of its own.")
    run = top.get("run", Config.model_fields["run"].default)
    if isinstance(run, str) and run:
        run = os.path.normpath(run)  # part of the next stage's model: runs/a/ and runs/a are one folder
    configs: dict[str, Config] = {}
    model = top.get("model")
    for number, stage in enumerate(stages, 1):
        folder = stage_folder(run, number, stage.name)
        whole = stage.over(top) | {"run": folder} | ({} if model is None else {"model": model})
        configs[stage.name] = parse_config(whole, f"{where}, stage {stage.name}")
        model = f"{folder}/{EXPORTED}"
    _require_tokens_added_once(configs, where)
    return Chain(run, configs)


def _require_tokens_added_once(configs: dict[str, Config], where: str) -> None:
    """The exported model of a stage has its new tokens, so a later one cannot add them again."""
    added: dict[str, str] = {}
    for name, config in configs.items():
        for token in config.data.new_tokens:
            if token in added:
                raise VlmtuneError(
                    f"{where}, stage {name}: data.new_tokens: stage {added[token]} added {token!r} already, and "
                    f"this one starts from its result; list it under stage {added[token]} alone."
                )
        added |= dict.fromkeys(config.data.new_tokens, name)


def config_schema() -> dict[str, Any]:
    """JSON Schema of a config file: of one run, or of a chain, whose sections may be spread over its stages."""
    schema, stage = Config.model_json_schema(), Stage.model_json_schema()
    required = schema.pop("required")
    schema["$defs"]["Stage"] = stage
    schema["properties"]["stages"] = {
        "type": "array", "minItems": 2, "items": {"$ref": "#/$defs/Stage"},
        "description": "runs that start from each other's results; then the top level may be incomplete",
    }  # fmt: skip
    return schema | {"anyOf": [{"required": required}, {"required": ["stages"]}]}


def _complaint(error: Any) -> str:
    place = ".".join(str(step) for step in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields_at(error["loc"][:-1])
        key = str(error["loc"][-1])
        near = OTHER_NAMES.get(key) or next(iter(difflib.get_close_matches(key, known, 1, 0.6)), None)
        return f"unknown key {place}" + (f" (did you mean {near}?)" if near else f" (known: {', '.join(known)})")
    if error["type"] == "missing":
        return f"{place} is required"
    if error["type"] in ("model_type", "model_attributes_type", "dict_type") and place:
        return f"{place} is a section: write its keys, or {{}} for its defaults (got {error['input']!r})"
    message = error["msg"].removeprefix("Value error, ")
    return f"{place or 'config'}: {message[0].lower() + message[1:]}" + (
        f" (got {error['input']!r})" if isinstance(error["input"], (str, int, float)) else ""
    )


def _fields_at(location: tuple) -> list[str]:
    """Field names of the model at a place in the tree."""
    places: dict[tuple, type[BaseModel]] = {
        (): Config, ("data",): Data, ("plan",): Rule, ("optim",): Optim, ("train",): Train,
        ("quantise",): Quantise, ("stability",): Stability, ("optim", "schedule"): LrSegment,
        ("plan", "schedule"): LrSegment, ("stages",): Stage, ("checkpoint",): Checkpoint, ("evaluate",): Evaluate,
        ("data", "train"): Source, ("data", "eval"): Source,
        ("data", "sampling"): Sampling, ("data", "complexity"): Complexity,
        ("loss",): Loss, ("loss", "balance"): Balance,
        ("data", "train", "negatives"): Negatives,
        ("loss", "box"): BoxTerm, ("loss", "referring"): ReferringTerm, ("loss", "exposure"): ExposureTerm,
        ("loss", "consistency"): ConsistencyTerm,
    }  # fmt: skip
    names = tuple(step for step in location if isinstance(step, str))
    model = places.get(names) or places.get(names[:2]) or Config
    return list(model.model_fields)


def _apply_override(tree: Any, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise VlmtuneError(f"override {override!r}: write key=value, for example optim.lr=1e-4.")
    *parents, leaf = key.split(".")
    node = tree
    for step in parents:
        if isinstance(node, list):
            node = _list_item(node, step, override)
        else:
            node = node.setdefault(step, {})
        if not isinstance(node, (dict, list)):
            raise VlmtuneError(f"override {override!r}: {step} is a value, not a section.")
    if isinstance(node, list):
        _list_item(node, leaf, override)
        node[int(leaf)] = _parse_value(value)
    else:
        node[leaf] = _parse_value(value)


def _unshared(tree: Any) -> Any:
    """A copy in which no part stands twice: an alias of YAML is the same object, and an override would change both."""
    if isinstance(tree, dict):
        return {key: _unshared(value) for key, value in tree.items()}
    return [_unshared(value) for value in tree] if isinstance(tree, list) else tree


def _parse_value(text: str) -> Any:
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        return text  # "*" alone is an alias in YAML and a pattern here
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _list_item(node: list, step: str, override: str) -> Any:
    if not step.isdecimal() or int(step) >= len(node):
        raise VlmtuneError(f"override {override!r}: {step!r} is not an index below {len(node)}.")
    return node[int(step)]


def dump_config(config: Config) -> str:
    """YAML with every value resolved; `load_config` of it gives the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
