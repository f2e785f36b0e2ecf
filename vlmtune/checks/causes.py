"""Why a step was not finite: causes ranked by what speaks for them, each with a remedy (SPEC F5)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from statistics import median

from vlmtune.checks.examine import IDS, KINDS, OTHER_INPUTS, PIXELS
from vlmtune.checks.nonfinite import Origin
from vlmtune.types import Finding

FLOAT16_LIMIT = 65504
RISE = 10.0  # a norm above this many times its usual value explodes
RECENT = 20  # steps of a history that are looked at
GROWN = 1e3  # with inputs of 1, 66 such weights add up to more than float16 holds
HUGE = 1e15  # squares of larger values do not fit a float32 sum of many

_OF_DATA = {
    PIXELS: "the images",
    IDS: "a token that the model does not have",
    KINDS: "the encoding",
    OTHER_INPUTS: "an input of the model",
}
_SINGULAR = {
    "Sqrt": "a root has no slope at 0",
    "Rsqrt": "1 / root has no slope at 0",
    "Norm": "a norm has no slope at 0",
    "LinalgVectorNorm": "a norm has no slope at 0",
    "Div": "it divides by something near 0",
    "Reciprocal": "it divides by something near 0",
    "Pow": "a power below 1 has no slope at 0",
    "Log": "a logarithm has no slope at 0",
    "Acos": "an arc cosine has no slope at 1",
    "Asin": "an arc sine has no slope at 1",
}
"""Steps of autograd, by how their names begin, whose gradient may be infinite where their value is not."""


def rank_causes(
    origin: Origin | None,
    inputs: Sequence[Finding],
    norm_history: Sequence[Mapping[str, float]] = (),
    loss_history: Sequence[float] = (),
    precision: str = "fp32",
    scale: float = 1.0,
    lr: Mapping[str, float] | None = None,
    finite_without_scale: bool | None = None,
    grown: Mapping[str, float] | None = None,
) -> list[Finding]:
    """Causes, the most probable first; at least one.

    origin: of `first_nonfinite` (None: the rerun was finite); inputs: of `examine_inputs`; norm_history: of the steps
    before, oldest first, rule -> gradient norm, with "total"; loss_history: their losses; precision: fp32, bf16 or
    fp16; scale: of the loss; lr: rule -> learning rate of this step; finite_without_scale: whether the same micro-batch
    is finite with a scale of 1 (None: not tried); grown: tensors with a weight above `GROWN` -> that weight.
    """
    if origin is None:
        evidence = "the same batch with the same weights and random state is finite"
        remedy = "repeat it with the hardware, threads and library versions of the run (environment.json)"
        return [Finding("warn", "not reproduced", evidence, remedy)]
    data, weights = _by_inputs(origin, inputs), _by_weights(origin, norm_history, loss_history)
    causes = [
        *chain(*((weights, data) if origin.kind == "weights" else (data, weights))),
        *_by_scale(origin, precision, scale, finite_without_scale),
        *_by_range(origin, bool(norm_history), grown or {}),
        *_by_rising_norms(origin, norm_history, loss_history, lr or {}),
        *_by_operation(origin),
    ]
    return causes or [_unknown(origin, inputs, norm_history)]


def _by_inputs(origin: Origin, inputs: Sequence[Finding]) -> Iterator[Finding]:
    wrong = [finding for finding in inputs if finding.level == "fail"]
    for finding in wrong:
        yield Finding("fail", f"the data: {_OF_DATA[finding.what]}", finding.evidence, finding.remedy)
    if origin.kind == "inputs" and not wrong:
        yield Finding("fail", "the data: an input of the model", origin.detail, "look at the samples of this step")
    if origin.kind == "exception" and not wrong:
        yield Finding("fail", "the model cannot take this batch", origin.sentence(), "leave these samples out")


def _by_weights(
    origin: Origin, norm_history: Sequence[Mapping[str, float]], loss_history: Sequence[float]
) -> Iterator[Finding]:
    if not origin.broken:
        return
    more = f" and {len(origin.broken) - 3} more" if len(origin.broken) > 3 else ""
    past = [*(step.get("total", math.nan) for step in norm_history), *loss_history]
    if not past:
        since = "no step came before, so they were read like that"
        remedy = "check the base model's files, or load it again"
    elif all(math.isfinite(value) for value in past):
        since = "losses and norms of the steps before are finite, so the last update or something beside it wrote them"
        remedy = "continue from a checkpoint before that"
    else:
        since = "steps before were not finite either"
        remedy = "continue from a checkpoint before those"
    evidence = f"{', '.join(origin.broken[:3])}{more}; {since}"
    yield Finding("fail", "weights were not finite before this step", evidence, remedy)


def _by_scale(origin: Origin, precision: str, scale: float, finite_without_scale: bool | None) -> Iterator[Finding]:
    if precision == "fp16" and finite_without_scale:
        evidence = f"with a scale of {scale:g} gradients overflow in {origin.module}, with 1 the same batch is finite"
        remedy = "nothing if it is rare, as the scale is then lowered; else train.precision=bf16"
        yield Finding("fail", "the loss scale is too large for this batch", evidence, remedy)


def _by_range(origin: Origin, has_trained: bool, grown: Mapping[str, float]) -> Iterator[Finding]:
    """has_trained: whether a step came before: without one no weight has grown."""
    if origin.kind not in ("forward", "gradient") or origin.broken:
        return
    went_in = f"the largest value that went in is {_number(origin.largest)}"
    weight = "" if origin.weight is None else f", its largest weight {_number(origin.weight)}"
    remedy = (
        "lower the lr of this part in a new run, or continue this one with stability.nonfinite=rewind, which goes "
        "back a checkpoint and lowers all rates"
    )
    if has_trained and origin.weight is not None and origin.weight > GROWN:
        yield Finding("fail", f"weights of {origin.module} have grown", f"{went_in}{weight}", remedy)
    elif has_trained and grown:  # it computes with no weight of its own, but with what those made
        name = max(grown, key=grown.__getitem__)
        evidence = (
            f"{len(grown)} tensors have a weight above {GROWN:g}, the largest is {_number(grown[name])} in {name}"
        )
        yield Finding("fail", "weights have grown", evidence, remedy)
    if origin.dtype == "float16":
        wide = "" if origin.wide is None else f"; in float32 its result reaches {_number(origin.wide)}"
        evidence = f"float16 ends at {FLOAT16_LIMIT}, {went_in}{weight}{wide}"
        remedy = "compute that module in float32 (compute: fp32 in its rule), or set train.precision=bf16"
        yield Finding("fail", f"float16 overflow in {origin.module}", evidence, remedy)
    elif origin.largest is not None and origin.largest > HUGE:
        what = "activations" if origin.kind == "forward" else "gradients"
        remedy = "find the module before it whose values grow, and lower its lr; or clip earlier"
        yield Finding("fail", f"{what} have grown before {origin.module}", f"{went_in}{weight}", remedy)


def _by_rising_norms(
    origin: Origin, norm_history: Sequence[Mapping[str, float]], loss_history: Sequence[float], lr: Mapping[str, float]
) -> Iterator[Finding]:
    rises = rising_norms(norm_history)
    if not rises or origin.kind in ("inputs", "exception"):
        return
    rule = max(rises, key=lambda name: (name != "total", rises[name][1] / rises[name][0]))
    usual, last = rises[rule]
    rate = f", at lr {lr[rule]:.3g}" if rule in lr else ""
    loss = f"; last loss {_number(loss_history[-1])}" if loss_history else ""
    evidence = f"gradient norm of {rule}: usually {_number(usual)}, {_number(last)} in the step before{rate}{loss}"
    remedy = "lower optim.lr (or that rule's lr), lengthen optim.warmup, or lower optim.clip"
    yield Finding("fail", "training was diverging", evidence, remedy)


def rising_norms(history: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """rule -> (median of its recent norms, the last one), for those that rose by more than `RISE`."""
    recent = history[-RECENT:]
    rises = {}
    for rule in dict.fromkeys(name for step in recent for name in step):
        *before, last = [step[rule] for step in recent if rule in step]
        usual = median(before) if len(before) >= 2 else math.inf
        if last > RISE * usual > 0:
            rises[rule] = usual, last
    return rises


def _by_operation(origin: Origin) -> Iterator[Finding]:
    if origin.kind == "gradient":
        name = origin.operation.partition("Backward")[0]
        why = next((reason for start, reason in _SINGULAR.items() if name.startswith(start)), None)
        if why is not None:
            evidence = f"finite in the forward, {origin.detail}: {why}"
            remedy = "add a small number there, or keep its input away from that point"
            yield Finding("fail", f"the gradient of {name} in {origin.module}", evidence, remedy)
    elif origin.kind == "loss":
        remedy = "look at the weights of tokens, tasks and terms in the loss section: something divides by 0"
        yield Finding("fail", "the loss itself", origin.detail, remedy)
    elif origin.kind == "sum":
        remedy = "lower the lr, and the weights in the loss section"
        yield Finding("fail", "gradients are too large to add up", origin.detail, remedy)


def _unknown(origin: Origin, inputs: Sequence[Finding], norm_history: Sequence[Mapping[str, float]]) -> Finding:
    ruled_out = [finding.what for finding in inputs if finding.level == "pass"]
    if not origin.broken:
        ruled_out.append("weights are finite")
    if norm_history:
        ruled_out.append(f"no norm of the {len(norm_history)} steps before rose by more than {RISE:g}x")
    evidence = f"{origin.sentence()}; true is: {', '.join(ruled_out)}"
    remedy = "try train.precision=fp32, freeze that module, or report it with the saved batch"
    return Finding("fail", f"unknown, it begins in {origin.module}", evidence, remedy)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
