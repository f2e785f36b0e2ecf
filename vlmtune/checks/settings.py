"""Whether the values of a config lie where runs that worked have theirs (SPEC H1). Plain values in, findings out.

Only `warn`: what cannot work at all is refused where it is read. Ranges are wide on purpose, from a hundredth of what
is usual to ten times it: who leaves them made a slip in an exponent more often than a choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlmtune.adapt.plan import Policy
from vlmtune.optim.precision import Precision
from vlmtune.types import Finding

FULL_LR, AT = 2e-5, 7e9  # full fine-tuning of 7 B parameters; smaller parts bear more, as 1 / sqrt(size)
ADAPTED_LR = 10.0  # adapters bear ten times what full fine-tuning does (Schulman et al., LoRA Without Regret, 2025)
TOO_HIGH, TOO_LOW = 10.0, 0.01  # times what is usual: in benchmarks/stability the tenfold rate costs a loss of 1
LONG_WARMUP = 0.3  # of the run
CLIP = (1e-3, 10.0)
EPOCHS = 10.0
CUT = 0.1  # of the held-out replies may be longer than what is generated
ALPHA_PER_RANK = (0.25, 8.0)
DECAY = 0.3


@dataclass(frozen=True)
class Course:
    """What a run is told, in plain values.

    warmup: rule -> steps, of rules that train in full; clips: all limits of gradient norms; epochs: source -> how often
    the run reads it; held_out: groups that are evaluated; checkpoint_every, evaluate_every: steps; batch: samples of
    an optimizer step; all_rows: of all sources, None where one has no end.
    """

    steps: int
    warmup: Mapping[str, int]
    clips: Sequence[float | None]
    epochs: Mapping[str, float]
    held_out: Sequence[str]
    checkpoint_every: int
    evaluate_every: int | None
    batch: int
    all_rows: int | None
    precision: Precision
    is_on_cpu: bool
    has_fast_bf16: bool


def settings_findings(
    rows: Sequence[Mapping[str, Any]], policies: Mapping[str, Policy], parameters: Mapping[str, nn.Parameter],
    course: Course,
) -> list[Finding]:  # fmt: skip
    """A finding for every value that is judged. rows: of `Plan.rows`; parameters: canonical name -> what trains."""
    return [
        *_rates(rows), _warmup(course), _clip(course.clips), *_decay(rows), *_lora(policies), *_ranks(parameters),
        _precision(course), *_epochs(course.epochs), _held_out(course.held_out), _checkpoints(course),
        *_evaluations(course), *_batches(course),
    ]  # fmt: skip


def usual_rate(size: int, is_adapted: bool) -> float:
    """The learning rate that a part of `size` parameters usually gets."""
    return FULL_LR * math.sqrt(AT / max(size, 1)) * (ADAPTED_LR if is_adapted else 1.0)


def _rates(rows: Sequence[Mapping[str, Any]]) -> Iterable[Finding]:
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row["part"]] = sizes.get(row["part"], 0) + row["parameters"]
    ratios, shown = {}, {}
    for row in rows:
        if row["trainable"] and row["lr"]:
            is_adapted = not row["method"].startswith(("full", "new_rows"))
            usual = usual_rate(sizes[row["part"]], is_adapted)
            key = (row["rule"], row["part"])
            ratios[key] = row["lr"] / usual
            shown[key] = f"{row['rule']} {row['lr']:g} (usual for {row['part']}: about {usual:.1g})"
    what = "learning rates are usual"
    high = [shown[key] for key, ratio in ratios.items() if ratio > TOO_HIGH]
    low = [shown[key] for key, ratio in ratios.items() if ratio < TOO_LOW]
    if high:
        yield Finding("warn", what, f"far above: {'; '.join(high)}", "check the exponent, or lower lr")
    if low:
        yield Finding("warn", what, f"far below: {'; '.join(low)}", "check the exponent, or raise lr: little will move")
    if not high and not low:
        yield Finding("pass", what, "; ".join(shown.values()))


def _warmup(course: Course) -> Finding:
    what, longest = "warmup is usual", max(course.warmup.values(), default=0)
    share = longest / course.steps
    evidence = f"{longest} of {course.steps} steps"
    if share > LONG_WARMUP:
        return Finding("warn", what, f"{evidence}, {share:.0%}", "shorten optim.warmup: 1 to 10 % is usual")
    without = [rule for rule, steps in course.warmup.items() if steps == 0]
    if without and course.steps >= 20:
        return Finding(
            "warn", what, f"none, and {', '.join(without)} trains in full from the first step",
            "set optim.warmup to 3 %: AdamW's first steps have the full rate whatever the gradient",
        )  # fmt: skip
    return Finding("pass", what, evidence)


def _clip(clips: Sequence[float | None]) -> Finding:
    what = "gradients are clipped"
    if None in clips:
        return Finding("warn", what, "no limit (optim.clip: null)", "set optim.clip to 1.0: one bad batch undoes many")
    odd = [clip for clip in clips if not CLIP[0] <= clip <= CLIP[1]]
    if odd:
        remedy = "about 1.0 is usual: above 10 nothing is ever clipped, below 0.001 everything is"
        return Finding("warn", what, f"at {', '.join(f'{clip:g}' for clip in odd)}", remedy)
    return Finding("pass", what, f"at {', '.join(f'{clip:g}' for clip in clips)}")


def _decay(rows: Sequence[Mapping[str, Any]]) -> Iterable[Finding]:
    found = {row["rule"]: row["weight_decay"] for row in rows if (row["weight_decay"] or 0) > DECAY}
    if found:
        shown = ", ".join(f"{rule} {decay:g}" for rule, decay in found.items())
        yield Finding("warn", "weight decay is usual", shown, "0 to 0.1 is usual; this pulls the weights to 0")


def _lora(policies: Mapping[str, Policy]) -> Iterable[Finding]:
    for rule, policy in policies.items():
        if policy.train != "lora" or policy.alpha is None:
            continue
        ranks = policy.rank.values() if isinstance(policy.rank, Mapping) else [policy.rank]
        odd = [rank for rank in ranks if not ALPHA_PER_RANK[0] <= policy.alpha / rank <= ALPHA_PER_RANK[1]]
        if odd:
            yield Finding(
                "warn", "LoRA's alpha fits its rank", f"{rule}: alpha {policy.alpha:g}, rank {odd[0]}",
                "leave alpha out (2 x rank), or keep it between rank and 4 x rank",
            )  # fmt: skip


def _ranks(parameters: Mapping[str, nn.Parameter]) -> Iterable[Finding]:
    """A (rank, in) and B (out, rank): with rank >= min(in, out) they have more numbers than the matrix itself."""
    shapes = {name: tuple(p.shape) for name, p in parameters.items() if ".lora_A" in name or ".lora_B" in name}
    wide = []
    for name, shape in shapes.items():
        other = shapes.get(name.replace(".lora_A", ".lora_B")) if ".lora_A" in name else None
        if other and len(shape) == 2 and shape[0] >= min(shape[1], other[0]):
            wide.append(f"{name.partition('.lora_A')[0]} ({other[0]} x {shape[1]}, rank {shape[0]})")
    if wide:
        yield Finding(
            "warn", "LoRA is smaller than what it adapts", f"no, {len(wide)} modules, first {wide[0]}",
            "lower the rank of its rule, or train it in full",
        )  # fmt: skip


def _precision(course: Course) -> Finding:
    what = "the number format suits the machine"
    if course.precision == "fp16" and course.is_on_cpu:
        return Finding(
            "warn", what, "float16 on a CPU", "set train.precision to auto: float16 is slow here and overflows"
        )
    if course.precision == "bf16" and not course.has_fast_bf16:
        return Finding(
            "warn", what, "bfloat16 is emulated here", "set train.precision to fp32: it is faster on this machine"
        )
    return Finding("pass", what, course.precision)


def _epochs(epochs: Mapping[str, float]) -> Iterable[Finding]:
    never = [name for name, count in epochs.items() if count == 0]
    if never:
        yield Finding(
            "warn", "every source is read", f"not one sample of {', '.join(never)} in the whole run",
            "raise its weight, or train longer",
        )  # fmt: skip
    many = {name: count for name, count in epochs.items() if count > EPOCHS}
    if many:
        shown = ", ".join(f"{name} {count:.0f} times" for name, count in many.items())
        yield Finding(
            "warn", "no source is read too often", f"no: {shown}",
            "lower its weight or train.length, or use more data: what is read so often is learned by heart",
        )  # fmt: skip
    elif epochs:
        yield Finding("pass", "no source is read too often", f"at most {max(epochs.values()):.1f} times")


def _held_out(groups: Sequence[str]) -> Finding:
    what = "something is held out"
    if not groups:
        return Finding(
            "warn", what, "no: data.eval is empty", "add a group to data.eval, or nobody will know what was learned"
        )
    return Finding("pass", what, ", ".join(groups))


def _evaluations(course: Course) -> Iterable[Finding]:
    if course.evaluate_every is not None:
        what, every = "held-out data is looked at on the way", course.evaluate_every
        if every >= course.steps:
            remedy = "lower evaluate.every: best checkpoint and patience need evaluations during the run"
            yield Finding("warn", what, f"no: every {every:,} steps, and the run has {course.steps:,}", remedy)
        else:
            yield Finding("pass", what, f"every {every:,} of {course.steps:,} steps")


def _batches(course: Course) -> Iterable[Finding]:
    if course.all_rows is None:
        return
    what, evidence = "a batch holds no row twice", f"{course.batch} samples of {course.all_rows:,} rows"
    if course.batch > course.all_rows:
        yield Finding("warn", what, f"it does: {evidence}", "lower train.batch_size, or use more data")
    else:
        yield Finding("pass", what, evidence)


def generation_finding(replies: Sequence[int], longest: int) -> Finding:
    """Whether held-out replies can be generated to their ends. replies: tokens of some, end of turn included; longest:
    evaluate.max_new_tokens."""
    what = "replies can be generated to their ends"
    cut = sum(tokens > longest for tokens in replies)
    evidence = (
        f"evaluate.max_new_tokens is {longest}, the longest of {len(replies)} held-out replies has {max(replies)}"
    )
    if cut > CUT * len(replies):
        remedy = f"raise evaluate.max_new_tokens to {max(replies)}: metrics of replies that are cut mean nothing"
        return Finding("warn", what, f"{cut} of {len(replies)} cannot: {evidence}", remedy)
    return Finding("pass", what, evidence)


def _checkpoints(course: Course) -> Finding:
    what, every = "checkpoints are written on the way", course.checkpoint_every
    if every >= course.steps > 1000:
        remedy = "lower checkpoint.every, so that a crash costs little"
        return Finding("warn", what, f"no: every {every:,} steps, and the run has {course.steps:,}", remedy)
    return Finding("pass", what, f"every {every:,} of {course.steps:,} steps")
