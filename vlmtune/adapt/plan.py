"""What learns, and how: rules over canonical names say what is frozen, trained in full or adapted (SPEC C1, C8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peft import LoraConfig
from torch import Tensor, nn

from vlmtune.adapt.library import LoraTarget, adapter_state, inject_lora
from vlmtune.adapt.new_rows import NEW_ROWS, split_new_rows
from vlmtune.models.anatomy import anatomy_of, canonical_name, canonical_parameters, unreachable_parameters
from vlmtune.models.vocabulary import NewTokens
from vlmtune.rules import assign
from vlmtune.types import VlmtuneError


@dataclass(frozen=True)
class Policy:
    """The value of a rule. Defaults are already filled in."""

    train: Literal["frozen", "full", "lora", "new_rows"]
    lr: float = 0.0
    weight_decay: float = 0.0
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0


@dataclass
class Plan:
    """The outcome of applying rules to a model.

    rule_of: canonical name of every trainable parameter -> rule pattern; parameters: the same names -> parameter;
    rows: the assignment table; lora: the adapter's config, None without one; new_tokens: what the base model lacks.
    """

    parameters: dict[str, nn.Parameter]
    rule_of: dict[str, str]
    policies: dict[str, Policy]
    rows: list[dict]
    lora: LoraConfig | None
    new_tokens: NewTokens

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """rule pattern -> its trainable parameters, for norms and clipping."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault(self.rule_of[name], []).append(parameter)
        return groups

    def optimizer_groups(self) -> list[dict]:
        """Parameter groups: per rule, split into decayed and not decayed (LoRA, norms, biases; SPEC G3)."""
        groups: dict[tuple[str, bool], dict] = {}
        for name, parameter in self.parameters.items():
            rule = self.rule_of[name]
            policy = self.policies[rule]
            decays = parameter.dim() > 1 and ".lora_" not in name
            group = groups.setdefault(
                (rule, decays),
                {"params": [], "names": [], "rule": rule, "lr": policy.lr,
                 "weight_decay": policy.weight_decay if decays else 0.0},
            )  # fmt: skip
            group["params"].append(parameter)
            group["names"].append(name)
        return list(groups.values())


def apply_plan(
    model: nn.Module,
    rules: list[tuple[str, Policy]],
    base_name: str,
    seed: int,
    new_tokens: NewTokens = NewTokens(),  # noqa: B008  frozen
) -> Plan:
    """Freeze, unfreeze and inject adapters in place, then say what happened.

    new_tokens: what `models.vocabulary.add_tokens` gave the model; their rows must learn somehow.
    Raises VlmtuneError for a parameter without a rule, a rule without a parameter, a plan that trains nothing, LoRA
    where there is no linear module, parameters that can never receive a gradient if they are meant to train, new rows
    that would stay frozen, and `new_rows` where there are none.
    """
    anatomy = anatomy_of(model)
    names = canonical_parameters(model)
    policies = dict(rules)
    if len(policies) < len(rules):
        twice = next(pattern for n, (pattern, _) in enumerate(rules) if pattern in [p for p, _ in rules[:n]])
        raise VlmtuneError(f"plan: two rules for {twice!r}; the second would never apply, remove one.")
    assignment = assign(rules, names)
    unreachable = unreachable_parameters(model)
    parts_with_new_rows = _parts_with_new_rows(assignment, new_tokens)

    _require_heads_train(assignment)

    targets: dict[str, LoraTarget] = {}
    for path, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        name = canonical_name(anatomy, f"{path}.weight")
        if name not in assignment or name in unreachable:
            continue  # a tied head is the embedding's parameter
        policy = assignment[name][1]
        if policy.train == "lora":
            limit = min(module.weight.shape)
            if policy.rank > limit:
                raise VlmtuneError(
                    f"plan: rank {policy.rank} exceeds {path}'s smaller dimension {limit}; lower the rank."
                )
            targets[path] = LoraTarget(policy.rank, policy.alpha, policy.dropout)
    rules_with_targets = {assignment[canonical_name(anatomy, f"{p}.weight")][0] for p in targets}
    for pattern, policy in rules:
        if policy.train == "lora" and pattern not in rules_with_targets:
            raise VlmtuneError(f"plan: rule {pattern!r} asks for LoRA, but covers no linear module; use train: full.")

    lora = inject_lora(model, targets, base_name, seed) if targets else None
    if parts_with_new_rows:
        split_new_rows(model, parts_with_new_rows, new_tokens)
    after = canonical_parameters(model)
    rule_of = {name: assignment[_adapted(name)][0] for name in after}
    for name, parameter in after.items():  # after the injection: peft freezes everything but its adapter
        method = policies[rule_of[name]].train
        full = method == "full" and name not in unreachable
        parameter.requires_grad_(full or ".lora_" in name or (method == "new_rows" and _is_new_row(name)))
    for pattern, policy in rules:
        mine = [p for name, p in after.items() if rule_of[name] == pattern]
        if policy.train != "frozen" and not any(p.requires_grad for p in mine):
            raise VlmtuneError(f"plan: rule {pattern!r} says {policy.train}, but none of its parameters can learn.")
    trainable = {name: parameter for name, parameter in after.items() if parameter.requires_grad}
    if not trainable:
        raise VlmtuneError("plan: every rule says frozen, so nothing would train; give one rule train: full or lora.")
    return Plan(
        parameters=trainable,
        rule_of={name: rule_of[name] for name in trainable},
        policies=policies,
        rows=_rows(after, rule_of, policies, unreachable, len(new_tokens)),
        lora=lora,
        new_tokens=new_tokens,
    )


def _require_heads_train(assignment: dict[str, tuple[str, Policy]]) -> None:
    """Read-outs are as random as they were made: they learn fully or they are noise."""
    for name, (pattern, policy) in assignment.items():
        if name.startswith("heads.") and policy.train != "full":
            raise VlmtuneError(
                f"plan: rule {pattern!r} says {policy.train}, but covers {name}, which is new and random; put a rule "
                "{match: heads, train: full} in front."
            )


def _adapted(name: str) -> str:
    """The parameter that an adapter's tensor or new rows belong to, whose rule they follow; else the name itself."""
    module, lora, _ = name.partition(".lora_")
    return f"{module}.weight" if lora else name.replace(f".{NEW_ROWS}.", ".")


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
) -> list[dict]:
    """One row per (part, rule): the assignment table of the console, assignment.json and the run page."""
    rows: dict[tuple[str, str], dict] = {}
    for name, parameter in names.items():
        part, rule = name.split(".")[0], rule_of[name]
        policy = policies[rule]
        sizes = {"lora": f" r{policy.rank} α{policy.alpha:g}", "new_rows": f" {new_tokens}"}
        method = policy.train + sizes.get(policy.train, "")
        row = rows.setdefault(
            (part, rule),
            {"part": part, "rule": rule, "method": method, "tensors": 0, "parameters": 0, "trainable": 0,
             "lr": None, "weight_decay": None, "unreachable": 0, "examples": []},
        )  # fmt: skip
        row["tensors"] += 1
        row["parameters"] += parameter.numel()
        row["unreachable"] += name in unreachable
        if parameter.requires_grad:
            row["trainable"] += parameter.numel()
            row["lr"], row["weight_decay"] = policy.lr, 0.0 if policy.train == "lora" else policy.weight_decay
            if len(row["examples"]) < 2:
                row["examples"].append(name)
    return list(rows.values())


def trained_state(model: nn.Module, plan: Plan) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(fully trained tensors by canonical name, adapter tensors by peft name): all that differs from the base.

    Buffers of modules that train (BatchNorm statistics) belong to the first. Raises VlmtuneError if the two do not
    add up to exactly the trainable parameters (PAINS 4, 7).
    """
    full = {name: p.detach() for name, p in plan.parameters.items() if ".lora_" not in name}
    adapter = adapter_state(model)
    if len(full) + len(adapter) != len(plan.parameters):
        raise VlmtuneError(
            f"checkpoint: {len(full)} full and {len(adapter)} adapter tensors do not add up to the "
            f"{len(plan.parameters)} trainable ones; this is a bug, please report the plan."
        )
    return full | trained_buffers(model), adapter


def trained_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers of modules with a trainable parameter of their own, as `buffer:<name>`."""
    persistent = model.state_dict().keys()
    return {
        f"buffer:{path}.{leaf}": buffer
        for path, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
        for leaf, buffer in module.named_buffers(recurse=False)
        if f"{path}.{leaf}" in persistent
    }


def load_trained(model: nn.Module, plan: Plan, tensors: dict[str, Tensor], where: str) -> None:
    """Copy fully trained tensors back. Missing, unexpected or misshapen ones are errors naming `where`."""
    current = {name: p for name, p in plan.parameters.items() if ".lora_" not in name} | trained_buffers(model)
    if set(current) != set(tensors):
        odd = sorted(set(current) ^ set(tensors))
        raise VlmtuneError(f"{where}: stored tensors do not fit the plan, for example {odd[0]}; was the plan changed?")
    for name, value in tensors.items():
        if current[name].shape != value.shape:
            raise VlmtuneError(
                f"{where}: {name} has shape {tuple(value.shape)}, the plan {tuple(current[name].shape)}."
            )
        current[name].data.copy_(value)
