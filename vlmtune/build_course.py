"""From a config to the course of a run: who learns how fast and when, and what the trainer is told (`build.py` does the
rest)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from vlmtune.adapt.plan import Plan, Policy
from vlmtune.config import Config, LrSegment, Rule
from vlmtune.losses.objective import Objective
from vlmtune.models.anatomy import canonical_parameters
from vlmtune.models.batchnorm import SharedTower, batch_norms, freeze_statistics
from vlmtune.models.islands import keep_float32
from vlmtune.optim.optimizer import build_adamw, usable_here
from vlmtune.optim.precision import Precision
from vlmtune.recovery import Recovery
from vlmtune.schedule import (
    Length,
    Piecewise,
    Rate,
    Shape,
    Stretch,
    constant_with_warmup,
    cosine_with_warmup,
    learning_rates,
    linear_with_warmup,
    piecewise,
    staged,
    warmup_stable_decay,
)
from vlmtune.trainer import Settings
from vlmtune.types import VlmtuneError

HEAD = "lm_head.weight"
BALANCE = "balance"  # the rule of what the objective learns
Steps = Callable[[str | float], int]


def epoch_of(sizes: Sequence[int | None]) -> int | None:
    """Samples of one epoch over sources of these sizes; None where one has no end."""
    return None if any(size is None for size in sizes) else sum(sizes)


def total_steps(config: Config, sizes: Sequence[int | None]) -> int:
    return max(1, Length.parse(config.train.length).steps(config.train.batch_size, epoch_of(sizes)))


def build_settings(config: Config, sizes: Sequence[int | None], precision: Precision) -> Settings:
    """sizes: rows of each source. Raises VlmtuneError for lengths that do not fit into the run."""
    total = total_steps(config, sizes)

    def steps(length: str | float) -> int:
        return Length.parse(length).steps(config.train.batch_size, epoch_of(sizes), total)

    def interval(length: str | float | None) -> int | None:
        return None if length is None else max(1, steps(length))

    best = config.checkpoint.best
    return Settings(
        total_steps=total,
        rates=build_rates(config, total, steps),
        clip=config.optim.clip,
        clip_by_rule={rule.match: rule.clip for rule in config.plan if rule.clip is not None},
        precision=precision,
        log_every=config.train.log_every,
        checkpoint_every=interval(config.checkpoint.every),
        keep=config.checkpoint.keep,
        background=config.checkpoint.background,
        eval_every=interval(config.evaluate.every),
        best=best,
        best_is=config.checkpoint.best_is or ("lowest" if best.startswith("loss") else "highest"),
        patience=config.checkpoint.patience,
        delta=config.checkpoint.delta or 0.0,
        statistics_every=interval(config.stability.statistics),
        seed=config.train.seed,
        asked_every=samples_every(config, sizes),
    )


def samples_every(config: Config, sizes: Sequence[int | None]) -> int | None:
    """Steps between two times that the samples of the run page are asked for; None: whenever there is an evaluation."""
    wish = config.evaluate.samples_every
    if wish is None:
        return None
    steps = Length.parse(wish).steps(config.train.batch_size, epoch_of(sizes), total_steps(config, sizes))
    return max(1, steps)


def build_recovery(config: Config) -> Recovery:
    wish = config.stability
    return Recovery(wish.nonfinite, wish.spikes, wish.limit or 10, 0.5 if wish.lr_factor is None else wish.lr_factor)


def build_rates(config: Config, total: int, steps: Steps) -> dict[str, Rate]:
    """rule -> how its learning rate moves. steps: a length -> optimizer steps."""
    own = Rule(match=BALANCE, train="full")
    rates = {rule.match: _rate(config, rule, f"rule {rule.match!r}", total, steps) for rule in config.plan}
    return rates | {BALANCE: _rate(config, own, "optim", total, steps)}


def _rate(config: Config, rule: Rule, where: str, total: int, steps: Steps) -> Rate:
    optim = config.optim
    if rule.train == "frozen":
        return Rate(lambda step: 0.0, piecewise(1.0), 0, total)
    wish = optim.schedule if rule.schedule is None else rule.schedule
    if rule.warmup is None:
        warmup = _warmup(optim.warmup, "optim.warmup", total, steps)
    else:
        warmup = _warmup(rule.warmup, f"{where}: warmup", total, steps)
    floor = optim.floor if rule.floor is None else rule.floor
    lr = optim.lr if rule.lr is None else rule.lr
    over = learning_rates(lr)
    peak = max(over.values)
    shape = (
        _named(wish, total, warmup, 0.1 if floor is None else floor, optim.decay, where, steps)
        if isinstance(wish, str)
        else _stretches(wish, total, optim.lr if rule.schedule is None else peak, where, steps)
    )
    factors = Piecewise(over.starts, tuple(value / peak for value in over.values))
    return Rate(shape, factors, warmup, total)


def _warmup(length: str | float | None, where: str, total: int, steps: Steps) -> int:
    length = "3%" if length is None else length
    warmup = steps(length)
    if Length.parse(length).unit == "%":
        warmup = min(warmup, total - 1)  # a share of one step is no step
    if warmup >= total:
        raise VlmtuneError(
            f"{where} is {warmup} steps, but the run has only {total}; shorten it, or write a share such as 3%."
        )
    return warmup


def _named(
    name: str, total: int, warmup: int, floor: float, decay: str | float | None, where: str, steps: Steps
) -> Shape:
    match name:
        case "cosine":
            return lambda step: cosine_with_warmup(step, total, warmup, floor)
        case "linear":
            return lambda step: linear_with_warmup(step, total, warmup, floor)
        case "constant":
            return lambda step: constant_with_warmup(step, warmup)
    last = max(1, steps("20%" if decay is None else decay))
    if warmup + last > total:
        raise VlmtuneError(
            f"{where}: warmup of {warmup} and decay of {last} steps do not fit into a run of {total}; shorten one."
        )
    return lambda step: warmup_stable_decay(step, total, warmup, last, floor)


def _stretches(wish: Sequence[LrSegment], total: int, peak: float, where: str, steps: Steps) -> Shape:
    """peak: the highest rate of the list; a rule with another one follows in proportion."""
    lengths = [None if segment.over is None else max(1, steps(segment.over)) for segment in wish]
    known = sum(length for length in lengths if length is not None)
    if known > total or (lengths[-1] is None and known >= total):
        raise VlmtuneError(
            f"{where}: the stretches of the schedule take {known} of {total} steps; shorten them, or leave out the "
            "length of the last one."
        )
    stretches, before = [], wish[0].to
    for segment, length in zip(wish, lengths, strict=True):
        start = before if segment.start is None else segment.start
        stretches.append(Stretch(start, segment.to, total - known if length is None else length, segment.shape))
        before = segment.to
    return lambda step: staged(step, stretches, peak)


def policies(config: Config) -> list[tuple[str, Policy]]:
    return [(rule.match, _policy(rule, config)) for rule in config.plan]


def training_policies(config: Config, precision: Precision) -> list[tuple[str, Policy]]:
    """As `policies`, with the base weights of rules that leave it open in the shortest format that changes no bit."""
    return [
        (name, replace(policy, store="auto") if _may_be_short(rule, policy, precision) else policy)
        for rule, (name, policy) in zip(config.plan, policies(config), strict=True)
    ]


def _may_be_short(rule: Rule, policy: Policy, precision: Precision) -> bool:
    """Whether only products read the base weights of a rule, which round them to bfloat16 anyway."""
    reads_nothing_else = policy.train in ("frozen", "adapter", "cross_modal", "prefix")
    plain_lora = policy.train == "lora" and not policy.options  # DoRA, PiSSA and others compute with the base
    open_ = rule.store == "auto" and rule.compute == "auto"
    return precision == "bf16" and open_ and (reads_nothing_else or plain_lora)


def lr_scaling(config: Config) -> float:
    """Factor on every learning rate for the batch size (SPEC F4): linear (Goyal et al. 2017) or by the square root."""
    if config.optim.scaling is None:
        return 1.0
    ratio = config.train.batch_size / config.optim.lr_batch
    return ratio if config.optim.scaling == "linear" else math.sqrt(ratio)


def _policy(rule: Rule, config: Config) -> Policy:
    lr = config.optim.lr if rule.lr is None else rule.lr
    return Policy(
        train=rule.train,
        lr=max(learning_rates(lr).values) * lr_scaling(config),
        weight_decay=config.optim.weight_decay if rule.weight_decay is None else rule.weight_decay,
        rank=16 if rule.rank is None else rule.rank,
        alpha=rule.alpha,
        dropout=rule.dropout or 0.0,
        method=rule.method or "",
        options=rule.options,
        store="fp32" if rule.store == "auto" else rule.store,
        init=rule.init,
        lr_b=rule.lr_b or 1.0,
    )


def policies_at(config: Config, settings: Settings, step: int) -> list[tuple[str, Policy]]:
    """As `training_policies`, with the rules frozen that do not train at this step."""
    return [
        (rule, policy if settings.rates[rule].is_active(step) else replace(policy, train="frozen"))
        for rule, policy in training_policies(config, settings.precision)
    ]


def apply_formats(model: torch.nn.Module, plan: Plan, config: Config) -> list[str]:
    """Float32 islands and fixed statistics of BatchNorm, as the rules say; one line on each.

    Raises VlmtuneError for a rule that covers no whole module, or has no BatchNorm to say something about.
    """
    lines = []
    named = canonical_parameters(model)

    def covered(rule: Rule) -> list[torch.nn.Parameter]:
        return [named[name] for name, owner in plan.rule_of.items() if owner == rule.match]

    islands = [rule for rule in config.plan if rule.compute == "fp32"]
    head = next((rule for rule in islands if plan.rule_of.get(HEAD) == rule.match), None)
    if head is not None:
        raise VlmtuneError(
            f"plan: rule {head.match!r} says compute: fp32, but covers {HEAD}, which the loss multiplies itself (its "
            "sums are in float32 in any case); put a rule for lm_head without it in front."
        )
    if islands:
        names = keep_float32(model, [parameter for rule in islands for parameter in covered(rule)])
        for rule in islands:
            own = {id(parameter) for parameter in covered(rule)}
            inside = {id(p) for name in names for p in model.get_submodule(name).parameters()}
            if not own & inside:
                raise VlmtuneError(
                    f"plan: rule {rule.match!r} says compute: fp32, but covers no whole module; widen its pattern."
                )
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"float32: {shown} compute in float32 (compute: fp32)")
    for rule in config.plan:
        layers = batch_norms(model, covered(rule)) if rule.batchnorm != "batch" else {}
        if rule.batchnorm != "batch" and not layers:
            raise VlmtuneError(
                f"plan: rule {rule.match!r} says batchnorm: {rule.batchnorm}, but covers no BatchNorm; leave it out."
            )
        if rule.batchnorm == "frozen":
            freeze_statistics(layers.values())
            lines.append(f"BatchNorm: {len(layers)} layers of rule {rule.match!r} keep the base's statistics")
    return lines


def build_tower(model: torch.nn.Module, config: Config) -> SharedTower | None:
    """Where a rule says batchnorm: sync. Raises VlmtuneError for models and methods that it does not work with."""
    if not any(rule.batchnorm == "sync" for rule in config.plan):
        return None
    if any(rule.train == "cross_modal" for rule in config.plan):
        raise VlmtuneError(
            "plan: batchnorm: sync runs the tower apart from the language model, but cross_modal adapters look at it "
            "from there; say batchnorm: frozen."
        )
    return SharedTower(model)


def build_optimizer(config: Config, plan: Plan, objective: Objective, device: torch.device) -> torch.optim.Optimizer:
    groups = plan.optimizer_groups() + objective.optimizer_groups(config.loss.balance.lr or 0.025)
    name, _ = usable_here(config.optim.name, device)
    return build_adamw(groups, config.optim.betas, config.optim.eps, name)
