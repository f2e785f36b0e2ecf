"""Which modules a method adapts, and the config that peft gets for them (SPEC C1-C5).

Rules are written over parameters; a method adapts modules: linear layers (LoRA, IA3, whatever peft offers), whole
attention and feed-forward sub-layers (bottleneck and cross-modal adapters), or the attention of decoder blocks
(prefixes).
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft import IA3Config, LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from torch import nn

from vlmtune.adapt.bottleneck import BottleneckConfig, find_sublayers
from vlmtune.adapt.cross_modal import CrossModalConfig
from vlmtune.adapt.prefix import PrefixConfig
from vlmtune.models.anatomy import RANK_KINDS, Anatomy, canonical_name, linear_role, rank_kind
from vlmtune.types import VlmtuneError

if TYPE_CHECKING:
    from vlmtune.adapt.plan import Policy

ADAPTED = ("lora", "ia3", "adapter", "cross_modal", "prefix", "peft")
"""Values of `train` that add parameters of their own beside the model's."""

_OURS = {"adapter": BottleneckConfig, "cross_modal": CrossModalConfig, "prefix": PrefixConfig}

_GIVEN_BY_US = frozenset({
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "r", "lora_alpha", "lora_dropout", "base_model_name_or_path", "peft_type", "task_type",
    "inference_mode", "revision", "auto_mapping", "peft_version", "target_parameters", "trainable_token_indices",
    "feedforward_modules", "ensure_weight_tying", "save_projection",
})  # fmt: skip
"""Fields of peft's configs that follow from the rule and are no `options`. Methods other than LoRA have an r there."""

_RULE_FIELDS = {"r": ("rank, a field of the rule",), "lora_alpha": ("alpha, a field of the rule",),
                "lora_dropout": ("dropout, a field of the rule",)}  # fmt: skip
_STARTS = ("gaussian", "orthogonal", "pissa", "olora")
_NEEDS_DATA = {"eva", "corda", "loftq", "lora_ga"}
_OF_REFUSED_STARTS = frozenset({"corda_config", "eva_config", "loftq_config", "lora_ga_config"})
_SEEDED = ("vera", "pvera")
"""Methods whose layers share fixed projections, drawn anew from a seed of theirs wherever the adapter is loaded."""

_REFUSED = {
    "lora": "write train: lora",
    "ia3": "write train: ia3",
    "bottleneck": "write train: adapter",
    "crossmodal": "write train: cross_modal",
    "prefixkv": "write train: prefix",
    "prefix_tuning": "write train: prefix",
    "shadow": "it runs beside the whole model",
    "adalora": "it needs calls of its own in the training loop; use train: lora with ranks from `vlmtune ranks`",
    "poly": "it needs a task id with every sample",
    "xlora": "it mixes adapters that were trained before",
    "trainable_tokens": "use train: new_rows on embed and lm_head",
}


@dataclass(frozen=True)
class Target:
    """A module that a rule adapts. path: from the root of the model; rule: the pattern of its rule."""

    path: str
    rule: str
    policy: Policy


@dataclass
class Adapter:
    """Modules that share one config of peft and one folder on disk. name: what peft calls it."""

    name: str
    method: str
    config: PeftConfig
    targets: dict[str, Target] = field(default_factory=dict)


def is_linear(module: nn.Module) -> bool:
    """A linear layer that can be adapted, quantised or not. torch's own attention reads its output past forward."""
    return isinstance(module, nn.Linear) and type(module).__name__ != "NonDynamicallyQuantizableLinear"


def find_targets(
    model: nn.Module,
    anatomy: Anatomy,
    assignment: Mapping[str, tuple[str, Policy]],
    unreachable: set[str],
) -> list[Target]:
    """The modules that the rules adapt, in the model's order. assignment: canonical parameter name -> rule, policy.

    Raises VlmtuneError for a rule that adapts no module of the kind its method needs.
    """
    rules = {pattern: policy for pattern, policy in assignment.values() if policy.train in ADAPTED}
    reachable = {name: owner for name, owner in assignment.items() if name not in unreachable}
    found = [*_linear_targets(model, anatomy, reachable), *_sublayers(model, anatomy, reachable)]
    order = {path: number for number, (path, _) in enumerate(model.named_modules())}
    found.sort(key=lambda target: order[target.path])
    for pattern, policy in rules.items():
        if not any(target.rule == pattern for target in found):
            raise VlmtuneError(f"plan: rule {pattern!r} {_covers_none(policy)}")
    return found


def _covers_none(policy: Policy) -> str:
    match policy.train:
        case "adapter" | "cross_modal":
            return (
                f"asks for {policy.train}, but covers no whole attention or feed-forward part of a block; name blocks "
                "or such parts, for example language.layers[0:8] or language.layers.*.mlp."
            )
        case "prefix":
            return (
                "asks for prefix, but covers no whole attention of a decoder block; name blocks of the language model, "
                "for example language.layers[0:8]."
            )
        case "ia3":
            return "asks for ia3, but covers no key, value or feed-forward output projection of a block; name blocks."
        case _:
            asked = "LoRA" if policy.train == "lora" else policy.method
            return f"asks for {asked}, but covers no linear module; use train: full."


def _linear_targets(
    model: nn.Module, anatomy: Anatomy, assignment: Mapping[str, tuple[str, Policy]]
) -> Iterator[Target]:
    for path, module in model.named_modules():
        if not is_linear(module):
            continue
        name = canonical_name(anatomy, f"{path}.weight")
        if name not in assignment:
            continue  # out of the loss's reach, or a tied head, which is the embedding's parameter
        rule, policy = assignment[name]
        if policy.train == "ia3" and linear_role(path) not in ("k", "v", "qkv", "down"):
            continue
        if policy.train in ("lora", "peft", "ia3"):
            yield Target(path, rule, policy)


def _sublayers(model: nn.Module, anatomy: Anatomy, assignment: Mapping[str, tuple[str, Policy]]) -> Iterator[Target]:
    """Sub-layers of blocks whose parameters all have one rule, where its method goes around or into sub-layers."""
    for blocks in (anatomy.vision_layers, anatomy.language_layers):
        in_decoder = blocks == anatomy.language_layers
        for number, block in enumerate(model.get_submodule(blocks)):
            paths = [f"{blocks}.{number}.{name}" for name in find_sublayers(block)]
            owners = {path: owner for path in paths if (owner := _owner(model, anatomy, assignment, path))}
            for path, (rule, policy) in owners.items():
                is_attention = "attn" in path.rsplit(".", 1)[-1] or path.endswith("attention")
                if policy.train == "prefix":
                    wanted = in_decoder and is_attention
                elif policy.train == "cross_modal":  # once a block: behind its feed-forward part where that is covered
                    others = [rule for other, (rule, _) in owners.items() if other != path]
                    wanted = in_decoder and not (is_attention and rule in others)
                else:
                    wanted = policy.train == "adapter"
                if wanted:
                    yield Target(path, rule, policy)


def _owner(
    model: nn.Module, anatomy: Anatomy, assignment: Mapping[str, tuple[str, Policy]], path: str
) -> tuple[str, Policy] | None:
    """The one rule that covers every parameter of a module, with its policy; None where there are several."""
    names = [canonical_name(anatomy, f"{path}.{leaf}") for leaf, _ in model.get_submodule(path).named_parameters()]
    rules = {assignment[name][0]: assignment[name] for name in names if name in assignment}
    return next(iter(rules.values())) if len(rules) == 1 else None


# ---- configs ----------------------------------------------------------------------------------------------------


def build_adapters(targets: list[Target], base_name: str) -> list[Adapter]:
    """One adapter for every set of targets that one config of peft can describe, in order of first appearance.

    The first is called "default" and the others by method and number, as peft lays them out on disk.
    """
    groups: dict[tuple, list[Target]] = {}
    for target in targets:
        policy = target.policy
        groups.setdefault((policy.train, policy.method, policy.dropout, _frozen(policy.options)), []).append(target)
    adapters = []
    for number, members in enumerate(groups.values()):
        policy = members[0].policy
        method = policy.method if policy.train == "peft" else policy.train
        name = "default" if number == 0 else f"{method}_{number + 1}"
        config = _config(members, base_name)
        adapters.append(Adapter(name, method, config, {target.path: target for target in members}))
    return adapters


def _frozen(value: Any) -> Any:
    """A hashable stand-in for a tree of options, so that equal options are one key."""
    if isinstance(value, Mapping):
        return tuple(sorted((key, _frozen(item)) for key, item in value.items()))
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _config(targets: list[Target], base_name: str) -> PeftConfig:
    policy = targets[0].policy
    paths = [target.path for target in targets]
    common = {"target_modules": _exactly(paths), "base_model_name_or_path": base_name}
    if policy.train == "lora":
        kind: type[PeftConfig] = LoraConfig
        common |= _lora_sizes(targets) | {"lora_dropout": policy.dropout}
    elif policy.train == "ia3":
        kind = IA3Config
        common["feedforward_modules"] = _exactly([path for path in paths if linear_role(path) == "down"])
    elif policy.train == "peft":
        kind = _config_class(policy.method, targets[0].rule)
        common |= {"save_projection": False} if policy.method in _SEEDED else {}
    else:
        kind = _OURS[policy.train]
    options = dict(policy.options)
    where = f"plan: rule {targets[0].rule!r}: "
    try:
        _require_known(kind, options, policy)
        return kind(**common, **options)
    except VlmtuneError as error:
        raise VlmtuneError(f"{where}{str(error).rstrip('.')}.") from error
    except (TypeError, ValueError, ImportError) as error:
        raise VlmtuneError(
            f"{where}peft refuses the options {options} ({' '.join(str(error).split()).rstrip('.')}); change them."
        ) from error


def _exactly(paths: list[str]) -> str:
    """A pattern of peft for these modules and no other: suffixes would hit towers with the same names (PAINS 8)."""
    return "|".join(re.escape(path) for path in paths) or "(?!)"


def _lora_sizes(targets: list[Target]) -> dict[str, Any]:
    """rank and alpha of every module: those of the first, and patterns for the others."""
    sizes = {target.path: (rank_of(target), alpha_of(target)) for target in targets}
    rank, alpha = next(iter(sizes.values()))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(path)}$": r for path, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(path)}$": a for path, (_, a) in sizes.items() if a != alpha},
    }


def require_kinds_used(targets: list[Target]) -> None:
    """Raises VlmtuneError for a rank by kind of which the rule covers no module: a wish that would do nothing."""
    for rule, policy in {target.rule: target.policy for target in targets if target.policy.train == "lora"}.items():
        if isinstance(policy.rank, int):
            continue
        covered = {rank_kind(target.path) for target in targets if target.rule == rule}
        idle = [kind for kind in policy.rank if kind not in covered]
        if idle:
            raise VlmtuneError(
                f"plan: rule {rule!r} gives {idle[0]} a rank, but covers no such module (only "
                f"{', '.join(kind for kind in RANK_KINDS if kind in covered)}); leave {idle[0]} out, or widen the rule."
            )


def rank_of(target: Target) -> int:
    """Raises VlmtuneError where a rule gives ranks by kind and none for this module's."""
    ranks = target.policy.rank
    if isinstance(ranks, int):
        return ranks
    kind = rank_kind(target.path)
    if kind not in ranks:
        raise VlmtuneError(
            f"plan: rule {target.rule!r} gives ranks for {', '.join(ranks)}, but covers {target.path} too, which is of "
            f"kind {kind!r}; add {kind}, or narrow the rule. Kinds: {', '.join(RANK_KINDS)}."
        )
    return ranks[kind]


def alpha_of(target: Target) -> float:
    return 2.0 * rank_of(target) if target.policy.alpha is None else target.policy.alpha


def _config_class(method: str, rule: str) -> type[PeftConfig]:
    """The config class of a method of peft that can be put into a model beside others. VlmtuneError for any other."""
    known = {kind.value.lower() for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    usable = sorted(known - _REFUSED.keys() - _unsuitable(known - _REFUSED.keys() - set(_SEEDED)))
    if method in usable:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.upper())]
    if method in _REFUSED:
        raise VlmtuneError(f"plan: rule {rule!r}: method {method} of peft cannot be used so: {_REFUSED[method]}.")
    if method in known:
        why = "learns prompts, or keeps state outside of the layers that it adapts"
    else:
        near = difflib.get_close_matches(method, usable, 1)
        why = "is no method of peft's" + (f" (did you mean {near[0]}?)" if near else "")
    raise VlmtuneError(f"plan: rule {rule!r}: method {method!r} {why}; choose one of {', '.join(usable)}.")


def _unsuitable(methods: set[str]) -> set[str]:
    """Methods that learn prompts, or share state between layers: peft injects neither."""
    return {
        method
        for method in methods
        if getattr(PEFT_TYPE_TO_TUNER_MAPPING[kind := PeftType(method.upper())], "uses_shared_state", True)
        or "target_modules" not in inspect.signature(PEFT_TYPE_TO_CONFIG_MAPPING[kind]).parameters
    }


def _require_known(kind: type[PeftConfig], options: Mapping[str, Any], policy: Policy) -> None:
    """Refuse an option that the method's config has no field for (PAINS 14), that follows from the rule, or that is of
    another type than its default."""
    ours = _GIVEN_BY_US - ({"r"} if policy.train == "peft" else set())
    parameters = inspect.signature(kind).parameters
    fields = sorted(set(parameters) - ours - _OF_REFUSED_STARTS)
    name_of_method = policy.method or policy.train
    for name, value in options.items():
        if name not in fields:
            near = _RULE_FIELDS.get(name) or difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(fields)}"
            raise VlmtuneError(f"{name_of_method} has no option {name!r} ({hint})")
        default = parameters[name].default
        for wanted, words in ((bool, "true or false"), (int, "a whole number"), (float, "a number")):
            if type(default) is not wanted or (name == "init_lora_weights" and isinstance(value, str)):
                continue
            fits = (int, float) if wanted is float else (wanted,)
            if not isinstance(value, fits) or (wanted is not bool and isinstance(value, bool)):
                raise VlmtuneError(f"option {name} of {name_of_method} is {value!r}; write {words}")
    start = options.get("init_lora_weights", True)
    if policy.train == "lora" and isinstance(start, str):
        _require_start(start.lower(), policy)


def _require_start(start: str, policy: Policy) -> None:
    """How LoRA begins, by name."""
    if start in _NEEDS_DATA:
        raise VlmtuneError(
            f"init_lora_weights: {start} is computed from data before training, which vlmtune does not do; use "
            f"{', '.join(_STARTS)} or true"
        )
    if start not in _STARTS and not start.startswith("pissa_niter_"):
        raise VlmtuneError(f"init_lora_weights: {start} is unknown; use {', '.join(_STARTS)}, true or false")
    if start in ("pissa", "olora") and policy.store in ("nf4", "int8"):
        raise VlmtuneError(
            f"init_lora_weights: {start} takes a base weight apart, which store: {policy.store} has packed; use "
            "store: bf16, or another start"
        )
