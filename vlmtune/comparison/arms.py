"""The arms of `vlmtune compare`: the user's config with the method of its language model replaced, and nothing else
that could make a difference (SPEC C6)."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from vlmtune.adapt.plan import assign_rules
from vlmtune.build import resolve_model
from vlmtune.build_course import policies
from vlmtune.build_loss import wanted_readouts
from vlmtune.checks.settings import usual_rate
from vlmtune.config import Config, Rule, parse_config
from vlmtune.models.anatomy import canonical_parameters, part_of
from vlmtune.models.load import meta_model
from vlmtune.models.quantise import QUANTISED, require_bitsandbytes
from vlmtune.models.readouts import attach_readouts
from vlmtune.types import VlmtuneError

METHODS: dict[str, dict[str, Any]] = {
    "full": {"train": "full"},
    "lora": {"train": "lora"},
    "qlora": {"train": "lora", "store": "nf4"},
    "adapter": {"train": "adapter"},
    "prefix": {"train": "prefix"},
    "ia3": {"train": "ia3"},
    "cross_modal": {"train": "cross_modal"},
}
"""What the one rule of the language model says. Settings of a method that the config has already (rank, options …)
are added."""
BASELINE = "full"
LANGUAGE = "language"
KEPT = ("alpha", "dropout", "lr_b", "options", "rank", "weight_decay")
"""Settings of a method that an arm takes from the config's own rule for it."""


@dataclass(frozen=True)
class Arm:
    """One method. config: complete, of the first seed; rate: of the language model, None in a plan of the user's."""

    name: str
    config: Config
    rate: float | None


def build_arms(config: Config, methods: Sequence[str], rates: dict[str, float]) -> list[Arm]:
    """The arms in the order of `methods`: names of METHODS, or YAML files of plans by name.

    rates: method -> learning rate of its rule, instead of the usual one for its size. Vision, projector, embedding and
    head keep the rules of the config. Raises VlmtuneError for what is no method, and for a plan that does not fit the
    model, before anything is trained.
    """
    plans: dict[str, list[dict[str, Any]] | None] = {}
    for name in methods:
        found = _read_plans(Path(name)) if name.endswith((".yaml", ".yml")) else {name: None}
        for arm, plan in found.items():
            if plan is None and arm not in METHODS:
                near = difflib.get_close_matches(arm, METHODS, 1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise VlmtuneError(
                    f"--methods: {arm!r} is neither a method ({', '.join(METHODS)}) nor a .yaml file of plans.{hint}"
                )
            if arm in plans:
                raise VlmtuneError(f"--methods: {arm} is there twice; name it once.")
            plans[arm] = plan
    if len(plans) < 2:
        raise VlmtuneError("--methods: one alone has nothing to compare with; name two or more, as in full,lora.")
    for name in rates:
        if plans.get(name, ()) is not None:
            known = ", ".join(arm for arm, plan in plans.items() if plan is None)
            raise VlmtuneError(f"--lr {name}=…: it is the rate of a method of this comparison ({known}).")

    model = meta_model(resolve_model(config.model))
    attach_readouts(model, sorted(wanted_readouts(config)), config.train.seed)
    parameters = canonical_parameters(model)
    size = sum(parameter.numel() for name, parameter in parameters.items() if part_of(name) == LANGUAGE)
    assigned = {name: pattern for name, (pattern, _) in assign_rules(model, policies(config)).items()}
    arms = []
    for name, plan in plans.items():
        rate = None
        if plan is None:
            rate = rates.get(name) or float(f"{usual_rate(size, METHODS[name]['train'] != 'full'):.1e}")
            plan = [_language_rule(config, name, rate), *_other_rules(config, assigned)]
        arm = _with_plan(config, plan, f"arm {name}")
        _require_fit(model, arm, name)
        arms.append(Arm(name, arm, rate))
    return arms


def of_seed(config: Config, seed: int, run: str) -> Config:
    """The config of one trial."""
    return config.model_copy(update={"run": run, "train": config.train.model_copy(update={"seed": seed})})


def kept_rules(arm: Arm) -> list[str]:
    """What an arm has beside its method, "projector full lr 0.0004"."""
    lines = []
    for rule in arm.config.plan:
        if rule.match != LANGUAGE or arm.rate is None:
            lr = f" lr {json.dumps(rule.lr)}" if rule.lr is not None else ""
            lines.append(f"{rule.match} {rule.train}{lr}")
    return lines


def _read_plans(path: Path) -> dict[str, list[dict[str, Any]]]:
    """{name: [rules]} of a YAML file."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise VlmtuneError(f"--methods {path} cannot be read ({' '.join(str(error).split())}).") from error
    is_plans = isinstance(tree, dict) and tree and all(
        isinstance(name, str) and name and isinstance(plan, list) and plan for name, plan in tree.items()
    )  # fmt: skip
    if not is_plans:
        raise VlmtuneError(f"--methods {path}: write names with plans, for example dora: [{{match: language, …}}, …].")
    for name in tree:
        if not all(letter.isalnum() or letter in "-_." for letter in name) or name.startswith("."):
            raise VlmtuneError(f"--methods {path}: {name!r} becomes a folder; use letters, digits, - and _ alone.")
        if name in METHODS:
            raise VlmtuneError(f"--methods {path}: {name!r} is a method of its own; give the plan another name.")
    return tree


def _language_rule(config: Config, name: str, rate: float) -> dict[str, Any]:
    """The method's rule, with the settings that the config's own rule for it has, and its number format.

    A frozen base stays in bfloat16 where the config keeps it so; a trained one is float32 in any case.
    """
    own = [rule for rule in config.plan if part_of(rule.match) == LANGUAGE]
    method = METHODS[name]
    rule: dict[str, Any] = {"match": LANGUAGE, **method, "lr": rate}
    same = [r for r in own if r.train == method["train"]]
    if len(same) == 1:
        given = same[0].model_dump(mode="json", exclude_unset=True)
        rule |= {key: given[key] for key in KEPT if key in given}
    trained = [r for r in own if r.train != "frozen"]
    if method["train"] != "full" and trained and all(r.store == "bf16" for r in trained):
        rule.setdefault("store", "bf16")
    schedule = config.optim.schedule
    if isinstance(schedule, list):  # its rates are those of optim.lr; a rule of another rate has the same shape
        peak = max(value for part in schedule for value in (part.to, part.start or 0.0))
        rule["schedule"] = [
            given | {key: given[key] / peak * rate for key in ("start", "to") if given.get(key) is not None}
            for given in (part.model_dump(mode="json", exclude_unset=True) for part in schedule)
        ]
    return rule


def _other_rules(config: Config, assigned: dict[str, str]) -> list[dict[str, Any]]:
    """The rules that still cover something beside the language model, as they are."""
    alive = {pattern for name, pattern in assigned.items() if part_of(name) != LANGUAGE}
    return [rule.model_dump(mode="json", exclude_unset=True) for rule in config.plan if rule.match in alive]


def _with_plan(config: Config, plan: list[dict[str, Any]], where: str) -> Config:
    """Every arm trains to its end and is evaluated before and after, so that all of them do the same number of steps:
    early stopping and evaluations on the way are left out."""
    tree = config.model_dump(mode="json", exclude_unset=True)
    tree["plan"] = plan
    if not any(isinstance(rule, dict) and rule.get("store") == "nf4" for rule in plan):
        tree.pop("quantise", None)
    tree["evaluate"] = {k: v for k, v in tree.get("evaluate", {}).items() if k not in ("every", "limit")}
    given = tree.get("checkpoint", {})
    tree["checkpoint"] = {k: v for k, v in given.items() if k == "every"} | {"keep": 1}
    return parse_config(tree, where)


def _require_fit(model: torch.nn.Module, config: Config, name: str) -> None:
    if any(rule.store in QUANTISED for rule in config.plan):
        require_bitsandbytes(f"--methods: {name}")
    try:
        assign_rules(model, policies(config))
    except VlmtuneError as error:
        raise VlmtuneError(f"arm {name}: {error}") from error


def described_rule(rule: Rule) -> str:
    """ "language: lora rank=16 lr=0.002", with everything that was said."""
    given = rule.model_dump(mode="json", exclude_unset=True)
    rest = [f"{key}={json.dumps(value)}" for key, value in given.items() if key not in ("match", "train")]
    return " ".join([f"{rule.match}: {rule.train}", *rest])
