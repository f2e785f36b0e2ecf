"""What learns, and how: rules over canonical names say what is frozen, trained in full or adapted (SPEC C1, C8)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmtune.adapt.library import inject
from vlmtune.adapt.methods import (
    ADAPTED,
    Adapter,
    Target,
    build_adapters,
    find_targets,
    is_linear,
    rank_of,
    require_kinds_used,
)
from vlmtune.adapt.new_rows import NEW_ROWS, split_new_rows
from vlmtune.models.anatomy import (
    Anatomy,
    anatomy_of,
    canonical_name,
    canonical_parameters,
    part_of,
    unreachable_parameters,
)
from vlmtune.models.initialise import draw_anew
from vlmtune.models.quantise import QUANTISED, has_data, is_quantised, stored_as
from vlmtune.models.vocabulary import NewTokens
from vlmtune.rules import assign, compile_pattern
from vlmtune.shards import is_in_parts
from vlmtune.types import VlmtuneError

TIED_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Policy:
    """The value of a rule. Defaults are already filled in.

    train: "adapter" is a bottleneck adapter, "peft" any other method of peft, named by `method`. rank: of LoRA, one
    number, or kind of linear module (`models.anatomy.RANK_KINDS`) -> number. alpha: None for 2 x rank. options: further
    fields of the method's own config class (peft's LoraConfig, IA3Config, …, our BottleneckConfig, …). store: number
    format in which the base weights are kept; "auto" is bfloat16 for the linear modules of transformer blocks, for
    runs under bfloat16 autocast, and float32 for the rest. init: "xavier" draws the covered matrices anew. lr_b:
    factor on the learning rate of LoRA's B (LoRA+, Hayou et al. 2024).
    """

    train: Literal["frozen", "full", "lora", "ia3", "adapter", "cross_modal", "prefix", "peft", "new_rows"]
    lr: float = 0.0
    weight_decay: float = 0.0
    rank: int | Mapping[str, int] = 16
    alpha: float | None = None
    dropout: float = 0.0
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    store: Literal["auto", "fp32", "bf16", "nf4", "int8"] = "fp32"
    init: Literal["keep", "xavier"] = "keep"
    lr_b: float = 1.0


@dataclass
class Plan:
    """The outcome of applying rules to a model.

    parameters: canonical name of every trainable parameter -> parameter; rule_of: of every parameter, frozen ones too,
    canonical name -> rule pattern;
    rows: the assignment table; adapters: what peft put in; adapter_parameters: names that adapters brought, fixed ones
    too; new_tokens: what the base model lacks; base: digests of the base model's weights (`base_digest`).
    """

    parameters: dict[str, nn.Parameter]
    rule_of: dict[str, str]
    policies: dict[str, Policy]
    rows: list[dict]
    adapters: list[Adapter]
    adapter_parameters: frozenset[str]
    new_tokens: NewTokens
    base: dict[str, str]

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """rule pattern -> its trainable parameters, for norms and clipping."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault(self.rule_of[name], []).append(parameter)
        return groups

    def optimizer_groups(self) -> list[dict]:
        """Parameter groups: per rule, split into decayed and not decayed (adapters, norms, biases; SPEC G3), LoRA's B
        where it has a learning rate of its own, and what is in parts, which no kernel updates together with the rest.
        """
        groups: dict[tuple[str, bool, bool, bool], dict] = {}
        for name, parameter in self.parameters.items():
            rule = self.rule_of[name]
            policy = self.policies[rule]
            decays = parameter.dim() > 1 and name not in self.adapter_parameters
            is_b = policy.lr_b != 1.0 and ".lora_B" in name
            group = groups.setdefault(
                (rule, decays, is_b, is_in_parts(parameter)),
                {"params": [], "names": [], "rule": rule, "lr": policy.lr * (policy.lr_b if is_b else 1.0),
                 "weight_decay": policy.weight_decay if decays else 0.0},
            )  # fmt: skip
            group["params"].append(parameter)
            group["names"].append(name)
        return list(groups.values())

    def targets(self) -> dict[str, Target]:
        """Path of every adapted module -> what adapts it."""
        return {path: target for adapter in self.adapters for path, target in adapter.targets.items()}


def apply_plan(
    model: nn.Module,
    rules: list[tuple[str, Policy]],
    base_name: str,
    seed: int,
    new_tokens: NewTokens = NewTokens(),  # noqa: B008  frozen
) -> Plan:
    """Freeze, unfreeze, convert and inject adapters in place, then say what happened.

    new_tokens: what `models.vocabulary.add_tokens` gave the model; their rows must learn somehow.
    Raises VlmtuneError for a parameter without a rule, a rule without a parameter, a plan that trains nothing, a method
    where there is no module for it, parameters that can never receive a gradient if they are meant to train, new rows
    that would stay frozen, `new_rows` where there are none, and weights that are not stored as their rule says.
    """
    anatomy = anatomy_of(model)
    names = canonical_parameters(model)
    policies = dict(rules)
    if len(policies) < len(rules):
        twice = next(pattern for n, (pattern, _) in enumerate(rules) if pattern in [p for p, _ in rules[:n]])
        raise VlmtuneError(f"plan: two rules for {twice!r}; the second would never apply, remove one.")
    assignment = assign_rules(model, rules)
    unreachable = unreachable_parameters(model)
    parts_with_new_rows = _parts_with_new_rows(assignment, new_tokens)
    if parts_with_new_rows and assignment.keys() - names.keys():
        raise VlmtuneError(
            f"plan: rule {assignment[TIED_HEAD][0]!r} adapts a head that is tied to the embedding, whose new rows "
            "train on their own; remove that rule, or say train: full of embed."
        )
    _require_heads_train(assignment)
    base = base_digest(names, assignment)
    targets = find_targets(model, anatomy, assignment, unreachable)
    _require_ranks_fit(model, targets)
    adapters = build_adapters(targets, base_name)

    _store(model, names, assignment)
    draw_anew({n: p for n, p in names.items() if assignment[n][1].init == "xavier" and has_data(p)}, seed)
    added = inject(model, adapters, seed)
    if parts_with_new_rows:
        split_new_rows(model, parts_with_new_rows, new_tokens)
    after = canonical_parameters(model)
    rule_of = _rules_of(after, anatomy, assignment, targets)
    _set_trainable(after, rule_of, policies, unreachable, {canonical_name(anatomy, name) for name in added})
    trainable = {name: parameter for name, parameter in after.items() if parameter.requires_grad}
    if not trainable:
        raise VlmtuneError("plan: every rule says frozen, so nothing would train; give one rule train: full or lora.")
    return Plan(
        parameters=trainable,
        rule_of=rule_of,
        policies=policies,
        rows=_rows(after, rule_of, policies, unreachable, len(new_tokens), targets),
        adapters=adapters,
        adapter_parameters=frozenset(name for name in after if name not in names and not _is_new_row(name)),
        new_tokens=new_tokens,
        base=base,
    )


def assign_rules(model: nn.Module, rules: Sequence[tuple[str, Policy]]) -> dict[str, tuple[str, Policy]]:
    """Canonical name of every parameter -> (pattern, policy) of its rule, as `rules.assign`.

    Where the head is tied to the embedding and a rule puts an adapter on it, the head has a name too (TIED_HEAD): the
    shared weight is `embed.weight` and follows that rule, the adapter stands at the head alone.
    """
    names = list(canonical_parameters(model))
    adapts_head = any(
        policy.train in ADAPTED and part_of(rule) == "lm_head" and compile_pattern(rule).match(TIED_HEAD)
        for rule, policy in rules
    )
    return assign(rules, names + [TIED_HEAD] * (adapts_head and TIED_HEAD not in names))


def base_digest(names: dict[str, nn.Parameter], assignment: dict[str, tuple[str, Policy]]) -> dict[str, str]:
    """Canonical name -> digest of a few numbers of that tensor as the base model has it.

    What a rule keeps quantised is left out: a base and its quantised copy are the same base. So are read-outs, which
    are not the base's.
    """
    digests: dict[str, str] = {}
    for name, parameter in names.items():
        if part_of(name) == "heads" or assignment[name][1].store in QUANTISED or not has_data(parameter):
            continue
        digests[name] = tensor_digest(parameter)
    return digests


def tensor_digest(tensor: Tensor) -> str:
    """Of its shape and a few numbers from all over it, whatever its format and device."""
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // 16)][:32].float().cpu().numpy().tobytes()
    return hashlib.sha256(f"{tuple(tensor.shape)}".encode() + some).hexdigest()[:12]


def in_a_block(name: str) -> bool:
    """Of a transformer: models ask embeddings, projectors and patch convolutions for the format of their states."""
    return name.startswith(("vision.layers.", "language.layers."))


def _store(model: nn.Module, names: dict[str, nn.Parameter], assignment: dict[str, tuple[str, Policy]]) -> None:
    """Put every base weight into the number format of its rule; what should be quantised must be so already."""
    multiplied = {id(module.weight) for module in model.modules() if is_linear(module)}
    for name, parameter in names.items():
        pattern, policy = assignment[name]
        if is_quantised(parameter):
            if policy.store != stored_as(parameter):
                raise VlmtuneError(
                    f"plan: {name} is stored as {stored_as(parameter)}, but rule {pattern!r} says {policy.store}; load "
                    "the model with the storage of its rules."
                )
        elif policy.store == "bf16" or (policy.store == "auto" and id(parameter) in multiplied and in_a_block(name)):
            parameter.data = parameter.data.bfloat16()
        elif parameter.is_floating_point() and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def _require_ranks_fit(model: nn.Module, targets: list[Target]) -> None:
    require_kinds_used(targets)
    for target in targets:
        if target.policy.train != "lora":
            continue
        module = model.get_submodule(target.path)
        limit = min(module.in_features, module.out_features)
        if rank_of(target) > limit:
            raise VlmtuneError(
                f"plan: rule {target.rule!r}: rank {rank_of(target)} exceeds {target.path}'s smaller dimension "
                f"{limit}; lower the rank."
            )


def _require_heads_train(assignment: dict[str, tuple[str, Policy]]) -> None:
    """Read-outs are as random as they were made: they learn fully or they are noise."""
    for name, (pattern, policy) in assignment.items():
        if name.startswith("heads.") and policy.train != "full":
            raise VlmtuneError(
                f"plan: rule {pattern!r} says {policy.train}, but covers {name}, which is new and random; put a rule "
                "{match: heads, train: full} in front."
            )


def _rules_of(
    names: Mapping[str, nn.Parameter],
    anatomy: Anatomy,
    assignment: Mapping[str, tuple[str, Policy]],
    targets: Sequence[Target],
) -> dict[str, str]:
    """Canonical name -> rule, after the injection: what an adapter brought has the rule of its module, a new row that
    of its table."""
    owners = {canonical_name(anatomy, f"{target.path}.x").removesuffix("x"): target.rule for target in targets}
    inner_first = sorted(owners, key=len, reverse=True)

    def rule(name: str) -> str:
        if name in assignment:
            return assignment[name][0]
        if _is_new_row(name):
            return assignment[name.replace(f".{NEW_ROWS}.", ".")][0]
        return owners[next(prefix for prefix in inner_first if name.startswith(prefix))]

    return {name: rule(name) for name in names}


def _set_trainable(
    names: Mapping[str, nn.Parameter],
    rule_of: Mapping[str, str],
    policies: Mapping[str, Policy],
    unreachable: set[str],
    added: set[str],
) -> None:
    """requires_grad of every parameter, after the injection: peft freezes everything but its adapters.

    added: names of the trainable parameters of adapters. Raises VlmtuneError for a rule under which nothing can learn.
    """
    learns: set[str] = set()
    for name, parameter in names.items():
        method = policies[rule_of[name]].train
        full = method == "full" and name not in unreachable
        parameter.requires_grad_(full or name in added or (method == "new_rows" and _is_new_row(name)))
        if not parameter.requires_grad:
            continue
        learns.add(rule_of[name])
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()  # what learns is kept in float32: bf16 loses small updates
    for pattern, policy in policies.items():
        if policy.train != "frozen" and pattern not in learns:
            raise VlmtuneError(f"plan: rule {pattern!r} says {policy.train}, but none of its parameters can learn.")


def _is_new_row(name: str) -> bool:
    return f".{NEW_ROWS}." in name


def _parts_with_new_rows(assignment: dict[str, tuple[str, Policy]], new_tokens: NewTokens) -> set[str]:
    """Which of "embed" and "lm_head" train their new rows only. VlmtuneError where that makes no sense."""
    tables = {f"{part}.weight": part for part in ("embed", "lm_head")}
    for name, (pattern, policy) in assignment.items():
        if policy.train == "new_rows" and name.split(".")[0] not in tables.values():
            raise VlmtuneError(
                f"plan: rule {pattern!r} says new_rows, but covers {name}; only embed and lm_head have a row per token."
            )
        if policy.train == "new_rows" and not new_tokens:
            raise VlmtuneError(
                f"plan: rule {pattern!r} says new_rows, but this run adds no token to the model; set data.new_tokens "
                "or data.add_coordinate_tokens, or say frozen or full."
            )
        if policy.train == "frozen" and new_tokens and name in tables:
            raise VlmtuneError(
                f"plan: rule {pattern!r} says frozen, but {len(new_tokens)} new tokens have rows in {tables[name]}; "
                "they would stay the mean of the old rows, all alike. Say train: new_rows (or full)."
            )
    return {part for name, part in tables.items() if name in assignment and assignment[name][1].train == "new_rows"}


def _rows(
    names: dict[str, nn.Parameter],
    rule_of: dict[str, str],
    policies: dict[str, Policy],
    unreachable: set[str],
    new_tokens: int,
    targets: list[Target],
) -> list[dict]:
    """One row per (part, rule), in the order of rules: the table of the console, assignment.json and the run page."""
    rows: dict[tuple[str, str], dict] = {}
    for name, parameter in names.items():
        part, rule = part_of(name), rule_of[name]
        policy = policies[rule]
        row = rows.setdefault(
            (part, rule),
            {"part": part, "rule": rule, "method": _described(policy, new_tokens), "store": policy.store,
             "modules": sum(target.rule == rule for target in targets),
             "tensors": 0, "parameters": 0, "trainable": 0,
             "lr": None, "weight_decay": None, "unreachable": 0, "examples": []},
        )  # fmt: skip
        row["tensors"] += 1
        row["parameters"] += size_of(parameter)
        row["unreachable"] += name in unreachable
        if parameter.requires_grad:
            row["trainable"] += parameter.numel()
            row["lr"] = policy.lr
            row["weight_decay"] = 0.0 if policy.train in ADAPTED else policy.weight_decay
            if len(row["examples"]) < 2:
                row["examples"].append(name)
    order = list(policies)
    return sorted(rows.values(), key=lambda row: order.index(row["rule"]))


def size_of(parameter: nn.Parameter) -> int:
    """Numbers in a parameter; a packed 4-bit weight counts what it stands for."""
    return parameter.quant_state.shape.numel() if stored_as(parameter) == "nf4" else parameter.numel()


def _described(policy: Policy, new_tokens: int) -> str:
    """The method of a rule with what tells it from others, for the table."""
    options = " ".join(f"{key}={value}" for key, value in policy.options.items())
    match policy.train:
        case "lora" if isinstance(policy.rank, int):
            text = f"lora r{policy.rank} α{2.0 * policy.rank if policy.alpha is None else policy.alpha:g}"
        case "lora":
            alpha = "2r" if policy.alpha is None else f"{policy.alpha:g}"
            text = "lora " + " ".join(f"{kind}:r{rank}" for kind, rank in policy.rank.items()) + f" α{alpha}"
        case "new_rows":
            text = f"new_rows {new_tokens}"
        case "peft":
            text = policy.method
        case _:
            text = policy.train
    stored = "" if policy.store in ("auto", "fp32") else f" on {policy.store}"
    return f"{text} {options}".rstrip() + stored
