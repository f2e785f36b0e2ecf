"""Which base weights a plan keeps in which number format, decided before the model is loaded (SPEC C3, C8)."""

from __future__ import annotations

import torch
from torch import nn

from vlmtune.adapt.methods import is_linear
from vlmtune.adapt.plan import Policy, assign_rules
from vlmtune.models.anatomy import anatomy_of, canonical_name, part_of
from vlmtune.models.quantise import QUANTISED, Quantisation
from vlmtune.types import VlmtuneError


def wanted_quantisation(
    shape: nn.Module, rules: list[tuple[str, Policy]], double: bool, compute: torch.dtype
) -> Quantisation | None:
    """The linear modules that the rules keep quantised; None where they keep none.

    shape: the model on the meta device, without weights; double: of NF4's constants; compute: format of products.
    Raises VlmtuneError for a rule that would quantise another part than the language model, nothing at all, or weights
    that train, and for two formats in one model.
    """
    wanted = [(pattern, policy) for pattern, policy in rules if policy.store in QUANTISED]
    if not wanted:
        return None
    formats = sorted({policy.store for _, policy in wanted})
    if len(formats) > 1:
        raise VlmtuneError(f"plan: store {' and '.join(formats)} in one model cannot be loaded; use one of them.")
    anatomy = anatomy_of(shape)
    # read-outs are attached later and are never quantised: their rules cover nothing here
    rules = [rule for rule in rules if not rule[0].startswith("heads")]
    assignment = assign_rules(shape, rules)
    modules: list[str] = []
    for path, module in shape.named_modules():
        name = canonical_name(anatomy, f"{path}.weight") if is_linear(module) else None
        if name not in assignment or assignment[name][1].store not in QUANTISED:
            continue
        if part_of(name) != "language":
            raise VlmtuneError(
                f"plan: rule {assignment[name][0]!r} says store: {formats[0]}, but covers {name}; only the language "
                "model is quantised. Give the other parts a rule of their own in front, with store: bf16 or none."
            )
        modules.append(path)
    for pattern, policy in wanted:
        if policy.train in ("full", "new_rows"):
            raise VlmtuneError(
                f"plan: rule {pattern!r} says store: {policy.store} and train: {policy.train}; quantised weights have "
                "no gradient. Say train: lora (or another adapter), or leave store out."
            )
    if not modules:
        raise VlmtuneError(f"plan: store: {formats[0]} covers no linear module of the language model; remove it.")
    return Quantisation(formats[0], tuple(modules), double, compute)


def loads_in_file_format(rules: list[tuple[str, Policy]]) -> bool:
    """Whether reading weights in the format of their file saves memory: some of them stay smaller than float32."""
    return any(policy.store != "fp32" for _, policy in rules)
