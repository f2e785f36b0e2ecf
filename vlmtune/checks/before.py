"""How everything that learns begins, verified at step 0 (SPEC D6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from vlmtune.adapt.library import adapters_off, tuner_layers
from vlmtune.adapt.new_rows import NEW_ROWS
from vlmtune.adapt.plan import Plan
from vlmtune.models.anatomy import canonical_parameters, part_of
from vlmtune.models.batchnorm import batch_norms, keeps_statistics
from vlmtune.models.initialise import XAVIER_LIMIT
from vlmtune.models.merging import model_inputs
from vlmtune.types import Batch, Finding

_ZERO_AT_START = ("lora_B", "bottleneck_up", "crossmodal_up", "prefixkv_gate")
"""Tensors that start at zero so that the adapted model starts as the base model."""

_OWN_START = ("pissa", "olora", "gaussian", "orthogonal", "false")
"""Values of init_lora_weights with another start than A random, B zero."""

KAIMING_SLACK = 0.25  # of a standard deviation, relative: a matrix of 4 x 64 draws within 10% of it
IDENTITY = {"fp32": 1e-4, "bf16": 3e-2}
"""Relative to the largest logit: rounding where a method recomposes weights, to 24 or 8 bits, through a few layers."""


@torch.no_grad()
def batchnorm_findings(
    model: torch.nn.Module, plan: Plan, micro_batches: Sequence[Batch], is_shared: bool
) -> list[Finding]:
    """Whether trained BatchNorm sees the whole step (SPEC G5); nothing where none trains.

    micro_batches: of one step; is_shared: the tower runs once over all of them.
    """
    training = {n: m for n, m in batch_norms(model, plan.parameters.values()).items() if not keeps_statistics(m)}
    if not training:
        return []
    what = "BatchNorm sees the whole step"
    first = next(iter(training))
    if is_shared or len(micro_batches) == 1:
        how = "the tower runs once over all of it" if is_shared else "it is one micro-batch"
        return [Finding("pass", what, f"{len(training)} layers train, first {first}; {how}")]
    sizes = "+".join(str(len(batch.sample_ids)) for batch in micro_batches)
    return [
        Finding(
            "warn", what, f"no: {len(training)} layers train, first {first}, on the statistics of each of "
            f"{len(micro_batches)} micro-batches ({sizes} samples)",
            "say batchnorm: frozen (the base's statistics) or sync (the tower runs once over the step) on that rule",
        )
    ]  # fmt: skip


def initial_findings(model: nn.Module, plan: Plan, vocabulary: int, batch: Batch | None = None) -> list[Finding]:
    """A finding for every rule of initialisation that this plan calls for.

    vocabulary: tokens of the tokenizer, added ones included; batch: on it the adapted model's logits are compared with
    the base model's.
    """
    findings = [*_zeros(plan), *_kaiming(plan), *_drawn_anew(model, plan), *_norms(model), *_new_rows(model, plan)]
    findings.append(_not_shrunk(model, vocabulary))
    if findings[-1].level == "fail":  # an id without a row ends every forward pass
        return findings
    if batch is not None:
        findings += identity_findings(model, plan, batch)
    return findings


def identity_findings(model: nn.Module, plan: Plan, batch: Batch) -> list[Finding]:
    """Whether the adapted model starts as the base model on a batch; nothing where a method does not mean to."""
    changes_base = any(_has_own_start(plan, name) for name in _adapter_tensors(plan, "lora_A"))
    return [_identity(model, batch)] if plan.adapters and not changes_base else []


def _adapter_tensors(plan: Plan, *marks: str) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for name, parameter in plan.parameters.items()
        if name in plan.adapter_parameters and any(f".{mark}" in name for mark in marks)
    }


def _has_own_start(plan: Plan, name: str) -> bool:
    options = plan.policies[plan.rule_of[name]].options
    return str(options.get("init_lora_weights", True)).lower() in _OWN_START


def _zeros(plan: Plan) -> Iterator[Finding]:
    found = {n: p for n, p in _adapter_tensors(plan, *_ZERO_AT_START).items() if not _has_own_start(plan, n)}
    if not found:
        return
    wrong = [name for name, parameter in found.items() if bool(parameter.any())]
    evidence = f"{len(found)} tensors, largest value {max(float(p.detach().abs().max()) for p in found.values()):g}"
    what = "outputs of adapters start at zero"
    if wrong:
        yield Finding("fail", what, f"{evidence}, first {wrong[0]}", "check the options of its rule")
    else:
        yield Finding("pass", what, evidence)


def _kaiming(plan: Plan) -> Iterator[Finding]:
    """peft draws A uniformly with a = sqrt(5): standard deviation 1 / sqrt(3 in)."""
    found = {n: p for n, p in _adapter_tensors(plan, "lora_A").items() if not _has_own_start(plan, n)}
    if not found:
        return
    ratios = {name: float(p.detach().std()) * (3 * p.shape[-1]) ** 0.5 for name, p in found.items() if p.numel() >= 256}
    if not ratios:
        return
    worst = max(ratios, key=lambda name: abs(ratios[name] - 1))
    evidence = (
        f"{len(ratios)} matrices, standard deviation {min(ratios.values()):.2f} to {max(ratios.values()):.2f} of it"
    )
    what = "LoRA's A is Kaiming-uniform"
    if abs(ratios[worst] - 1) <= KAIMING_SLACK:
        yield Finding("pass", what, evidence)
    else:
        yield Finding("fail", what, f"{evidence}, worst {worst}", "check the options of its rule")


def _drawn_anew(model: nn.Module, plan: Plan) -> Iterator[Finding]:
    """Xavier with a standard deviation below 0.02 where a rule says init: xavier."""
    found = {
        name: parameter
        for name, parameter in plan.parameters.items()
        if plan.policies[plan.rule_of[name]].init == "xavier" and parameter.dim() > 1
    }
    if not found:
        return
    spreads = {name: float(parameter.std()) for name, parameter in found.items()}
    worst = max(spreads, key=spreads.get)
    parts = ", ".join(sorted({part_of(name) for name in found}))
    evidence = (
        f"{len(found)} matrices of {parts}, standard deviation {min(spreads.values()):.4f} to {spreads[worst]:.4f}"
    )
    what = f"Xavier below {XAVIER_LIMIT} where drawn anew"
    if spreads[worst] < XAVIER_LIMIT:
        yield Finding("pass", what, evidence)
    else:
        yield Finding("fail", what, f"{evidence}, first {worst}", "start from the base model again")


def _norms(model: nn.Module) -> Iterator[Finding]:
    """What norms of the base model look like: a norm whose weights are all zero lets nothing through."""
    found = {
        name: parameter
        for name, parameter in canonical_parameters(model).items()
        if "norm" in name and name.endswith("weight") and parameter.dim() == 1
    }
    if not found:
        return
    # Gemma adds 1 to the weight when it is used, so zero means one there
    adds_one = "gemma" in str(getattr(model.config, "model_type", ""))
    dead = [name for name, p in found.items() if not adds_one and not bool(p.any())]
    low, high = (
        min(float(p.detach().float().mean()) for p in found.values()),
        max(float(p.detach().float().mean()) for p in found.values()),
    )
    evidence = f"{len(found)} norms, mean weight {low:.2f} to {high:.2f}"
    what = "norms let signals through"
    if dead:
        yield Finding(
            "warn", what, f"{evidence}, all zero: {dead[0]}", "their output is 0; is the base model complete?"
        )
    else:
        yield Finding("pass", what, evidence)


def _new_rows(model: nn.Module, plan: Plan) -> Iterator[Finding]:
    """Rows of new tokens are the mean of the old ones, hence all alike at step 0."""
    if not plan.new_tokens:
        return
    table = model.get_input_embeddings()
    split = getattr(table, NEW_ROWS, None)
    old = table.weight if split is None else table.base_layer.weight
    rows = old[plan.new_tokens.rows] if split is None else split.weight
    spread = float((rows - rows[0]).abs().max())
    mean = old[: plan.new_tokens.first].float().mean(0)
    gap = float((rows[0].float() - mean).abs().max() / mean.abs().max().clamp(min=1e-12))
    evidence = f"{len(rows)} rows, differing by {spread:g}, {gap:.1e} from the mean of the rows before them"
    what = "rows of new tokens start as the mean of the old"
    # rows without a token are not averaged, hence a small distance; a random row is at a distance of 1 or more
    if spread == 0 and gap < 0.5:
        yield Finding("pass", what, evidence)
    else:
        yield Finding("fail", what, evidence, "start from the base model again")


def _not_shrunk(model: nn.Module, vocabulary: int) -> Finding:
    table = model.get_input_embeddings()
    rows = len(getattr(table, "base_layer", table).weight)
    what, evidence = "the embedding has a row for every token", f"{rows} rows, {vocabulary} tokens"
    if rows >= vocabulary:
        return Finding("pass", what, evidence)
    return Finding("fail", what, evidence, "use the tokenizer that belongs to the model")


@torch.no_grad()
def _identity(model: nn.Module, batch: Batch) -> Finding:
    carries = batch.inputs["attention_mask"].bool()
    training = model.training
    model.eval()
    adapted = model(**model_inputs(model, batch), use_cache=False).logits[carries].float()
    with adapters_off(model):
        base = model(**model_inputs(model, batch), use_cache=False).logits[carries].float()
    model.train(training)
    gap = float((adapted - base).detach().abs().max() / base.detach().abs().max())
    what = f"adapters start as the base model ({len(tuner_layers(model))} modules)"
    if gap <= IDENTITY["bf16" if torch.is_autocast_enabled(adapted.device.type) else "fp32"]:
        return Finding("pass", what, f"logits differ by {gap:.1e} of the largest")
    return Finding(
        "warn", what, f"logits differ by {gap:.1e} of the largest", "this method does not start there; lower its lr"
    )
