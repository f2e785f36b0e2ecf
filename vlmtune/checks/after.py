"""What the records of a run say about its data, its course and its weights (SPEC G8, H4). Values in, findings out."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmtune.checks.pace import WAITED, WAITED_SECONDS
from vlmtune.types import Finding

Records = Sequence[Mapping[str, Any]]

LEFT_OUT = 0.05  # of the rows
LITTLE_TO_LEARN = 0.01  # of the tokens carry loss
FEW = 8  # records before a trend means something
FELL, ROSE = 0.02, 0.10  # of the loss
OVERFIT = 0.2  # above its lowest, while the training loss fell on
WORSE, WORSE_BY = 0.1, 0.2  # of the loss before, and nats besides: every token a fifth less probable
SKIPPED = 0.05  # of the steps
HUGE_WEIGHT = 1e3  # with inputs of 1, 66 such weights add up to more than float16 holds
HUGE_GRADIENT = 1e3  # times the median over all tensors
EIGHTHS = "▁▂▃▄▅▆▇█"


# ---- data ----------------------------------------------------------------------------------------------------------


def data_findings(composition: Records, dropped: int, history: Records) -> list[Finding]:
    """composition: rows of composition.json, those left out not among them; dropped: how many those are."""
    return [*_left_out(composition, dropped), *_learnable(composition), *_read(composition, history)]


def _left_out(composition: Records, dropped: int) -> Iterator[Finding]:
    rows = sum(row["rows"] or 0 for row in composition)
    if rows:
        rows += dropped
        many = dropped > LEFT_OUT * rows
        remedy = "look into dropped.jsonl; raise data.max_length, or mend the rows" if many else ""
        yield Finding("warn" if many else "pass", "most rows are used", f"{dropped:,} of {rows:,} left out", remedy)


def _learnable(composition: Records) -> Iterator[Finding]:
    what = "there is something to learn in every source"
    shares = {
        row["source"]: row["supervised_tokens"] / row["tokens"]
        for row in composition
        if row["supervised_tokens"] is not None
    }
    little = {name: share for name, share in shares.items() if share < LITTLE_TO_LEARN}
    if little:
        shown = ", ".join(f"{name} {share:.1%}" for name, share in little.items())
        yield Finding("warn", what, f"tokens that carry loss: {shown}", "look at a sample with `vlmtune inspect`")
    elif shares:
        yield Finding("pass", what, f"at least {min(shares.values()):.1%} of the tokens carry loss")


def _read(composition: Records, history: Records) -> Iterator[Finding]:
    read = next((record["sources"] for record in reversed(history) if record.get("sources")), None)
    if read is None:
        return
    never = [row["source"] for row in composition if not read.get(row["source"])]
    what = "every source was read"
    if never:
        yield Finding("warn", what, f"not one sample of {', '.join(never)} yet", "train longer, or raise its weight")
    else:
        yield Finding("pass", what, ", ".join(f"{name} {count:,}" for name, count in read.items()))


# ---- config --------------------------------------------------------------------------------------------------------


def course_findings(start: Records, history: Records, steps: int) -> list[Finding]:
    """start: of start.json; steps: made so far."""
    unusual = [record for record in start if record["level"] != "pass"]
    odd = [Finding(f["level"], f"at the start: {f['what']}", f["evidence"], f["remedy"]) for f in unusual]
    train = [record for record in history if record["kind"] == "train"]
    return [*odd, *_said(history), *_trend(train), *_overfit(history, train), *_updates(train, steps), *_waiting(train)]


def _said(history: Records) -> Iterator[Finding]:
    """What was found while it ran, each kind once."""
    found = [record for record in history if record["kind"] == "finding"]
    counts = Counter(record["what"] for record in found)
    for what, count in counts.items():
        first = next(record for record in found if record["what"] == what)
        more = f" and {count - 1} times more" if count > 1 else ""
        yield Finding(
            first["level"], f"in the run: {what}", f"step {first['step']}{more}: {first['evidence']}", first["remedy"]
        )
    if not found:
        yield Finding("pass", "nothing was found while it ran", "gradients, losses and numbers were watched")


def _trend(train: Records) -> Iterator[Finding]:
    """Judged task by task: which tasks a batch has moves its loss more than learning does."""
    what = "the training loss fell"
    losses = [record["loss"] for record in train if record["loss"] is not None]
    if len(losses) < FEW:
        return
    first, last, doubt = _ends([_losses_by_task(record) for record in train])
    evidence = f"from {first:.3g} to {last:.3g}  {sparkline(losses)}"
    if last > (1 + ROSE) * first and last - first > doubt:
        yield Finding("fail", what, f"no, it rose {evidence}", "lower the learning rates, or lengthen the warmup")
    elif last <= (1 - FELL) * first:
        yield Finding("pass", what, evidence)
    elif doubt > ROSE * first:
        yield Finding("pass", what, f"cannot be told yet: {evidence}, give or take {doubt:.2g}")
    else:
        yield Finding(
            "warn", what, f"hardly: {evidence}",
            "raise the learning rates, train longer, or look with `vlmtune inspect` whether the replies can be known",
        )  # fmt: skip


def _losses_by_task(record: Mapping[str, Any]) -> dict[str, float]:
    tasks = record.get("loss_by_task") or {"": record["loss"]}
    return {task: loss for task, loss in tasks.items() if loss is not None}


def _ends(records: Sequence[Mapping[str, float]]) -> tuple[float, float, float]:
    """Mean loss of the first and of the last fifth of the records, and two standard errors of their difference.

    Means over the tasks that both have, each weighing the same.
    """
    part = max(2, len(records) // 5)
    ends = [
        {task: [r[task] for r in some if task in r] for task in {task for record in some for task in record}}
        for some in (records[:part], records[-part:])
    ]
    common = sorted(ends[0].keys() & ends[1].keys())
    if not common:  # tasks come one after the other
        ends = [{"": [loss for losses in end.values() for loss in losses]} for end in ends]
        common = [""]
    first, last = (statistics.fmean(statistics.fmean(end[task]) for task in common) for end in ends)
    variances = [
        statistics.variance(end[task]) / len(end[task]) for end in ends for task in common if len(end[task]) > 1
    ]
    return first, last, 2 * math.sqrt(sum(variances)) / len(common)


def _overfit(history: Records, train: Records) -> Iterator[Finding]:
    """The held-out loss turned while the training loss fell on."""
    what = "the held-out loss follows"
    held_out = [(record["step"], record["loss"]["loss"]) for record in history if record["kind"] == "eval"]
    held_out = [(step, loss) for step, loss in held_out if loss is not None]
    if len(held_out) < 3:
        return
    step, lowest = min(held_out, key=lambda pair: pair[1])
    last_step, last = held_out[-1]
    evidence = f"lowest {lowest:.3g} at step {step}, {last:.3g} at step {last_step}"
    at = [record["loss"] for record in train if record["step"] <= step and record["loss"] is not None]
    after = [record["loss"] for record in train if record["step"] > step and record["loss"] is not None]
    if last > (1 + OVERFIT) * lowest and at and after and after[-1] < at[-1]:
        remedy = "use checkpoints/best, train shorter (checkpoint.patience), or use more data"
        yield Finding("warn", what, f"no, it turned: {evidence}", remedy)
    else:
        yield Finding("pass", what, evidence)


def _updates(train: Records, steps: int) -> Iterator[Finding]:
    if not train:
        return
    last = train[-1]
    lost = last["skipped"] + last["overflows"]
    evidence = f"{lost} of {steps} steps made none; learning rates x {last['lr_scale']:g} after going back"
    if lost > SKIPPED * steps:
        remedy = "see what was found in the run; lower the rates, or set train.precision to bf16"
        yield Finding("fail", "steps make updates", evidence, remedy)
    else:
        yield Finding("pass", "steps make updates", evidence)


def _waiting(train: Records) -> Iterator[Finding]:
    waits = [record["data_wait"] for record in train[1:]]
    if len(waits) < FEW:
        return
    share, seconds = statistics.median(waits), train[-1]["seconds"]
    what, evidence = "data is there in time", f"{share:.0%} of {seconds:,.0f} s is spent waiting for it"
    is_slow = share >= WAITED and share * seconds >= WAITED_SECONDS
    remedy = "raise data.workers, or lower data.max_pixels" if is_slow else ""
    yield Finding("warn" if is_slow else "pass", what, evidence, remedy)


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A line of eighths, each the mean of neighbours."""
    size = math.ceil(len(values) / width)
    means = [statistics.fmean(values[n : n + size]) for n in range(0, len(values), size)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(EIGHTHS[min(7, int(8 * (value - low) / span))] for value in means)


# ---- outcome -------------------------------------------------------------------------------------------------------


def outcome_findings(metrics: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Finding]:
    """metrics: of summary.json, "group/task" -> metric -> before and after."""
    losses = {
        place: (values["loss"]["before"], values["loss"]["after"])
        for place, values in metrics.items()
        if None not in (values.get("loss", {}).get("before"), values.get("loss", {}).get("after"))
    }
    if not losses:
        return []
    what = "no held-out task got worse"
    worse = {place: pair for place, pair in losses.items() if pair[1] > (1 + WORSE) * pair[0] + WORSE_BY}
    if worse:
        shown = ", ".join(f"{place} {before:.3g} -> {after:.3g}" for place, (before, after) in worse.items())
        remedy = "mix old data in (replay), lower the rates, use LoRA where it trains in full, or train shorter"
        return [Finding("warn", what, f"the loss rose: {shown}", remedy)]
    return [Finding("pass", what, f"{len(losses)} losses, before and after")]


# ---- weights -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Of one tensor, in float32. largest: absolute; numbers: how many."""

    std: float
    largest: float
    numbers: int
    is_finite: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Spread:
        values = tensor.float()
        std, largest = float(values.std(correction=0)), float(values.abs().max())
        return cls(std, largest, values.numel(), bool(torch.isfinite(values).all()))


def weight_findings(spreads: Mapping[str, Spread], steps: int) -> list[Finding]:
    """spreads: of everything a checkpoint holds that was trained; steps: made until it was written."""
    if not spreads:
        return [Finding("fail", "something was trained", "the checkpoint holds no tensor", "give a rule another train")]
    found = []
    broken = [name for name, spread in spreads.items() if not spread.is_finite]
    what = "weights are finite"
    if broken:
        evidence = f"{len(broken)} of {len(spreads)} tensors are not, first {broken[0]}"
        found.append(Finding("fail", what, evidence, "continue from an earlier checkpoint"))
    else:
        low, high = (pick(spread.std for spread in spreads.values()) for pick in (min, max))
        size = sum(spread.numbers for spread in spreads.values())
        evidence = f"{len(spreads)} tensors, {size:,} numbers, standard deviations from {low:.2g} to {high:.2g}"
        found.append(Finding("pass", what, evidence))
    name = max((n for n in spreads if n not in broken), key=lambda n: spreads[n].largest, default=None)
    if name is not None:
        largest = spreads[name].largest
        remedy = "" if largest < HUGE_WEIGHT else "lower the learning rate of its rule, from before it grew on"
        level = "pass" if largest < HUGE_WEIGHT else "warn"
        found.append(
            Finding(level, "no weight has grown out of range", f"the largest is {largest:.3g}, in {name}", remedy)
        )
    still = [name for name, spread in spreads.items() if "lora_B" in name and spread.largest == 0]
    adapted = [name for name in spreads if "lora_B" in name]
    if adapted and steps:
        what = "adapters have left 0"
        if still:
            evidence = f"{len(still)} of {len(adapted)} have not after {steps} steps, first {still[0]}"
            remedy = "raise the learning rate, or check that the data reaches that part"
            found.append(Finding("fail" if len(still) == len(adapted) else "warn", what, evidence, remedy))
        else:
            found.append(Finding("pass", what, f"{len(adapted)} matrices"))
    return found


def gradient_findings(moments: Mapping[str, float]) -> list[Finding]:
    """moments: name of a tensor -> root mean square of its recent gradients, from AdamW's second moment."""
    sizes = [value for value in moments.values() if value > 0 and math.isfinite(value)]
    if not sizes:
        return []
    median = statistics.median(sizes)
    what = "no gradient stands out"
    worst = max(moments, key=lambda name: moments[name] if math.isfinite(moments[name]) else math.inf)
    evidence = f"largest {moments[worst]:.2e} in {worst}, median {median:.2e}"
    none = [name for name, value in moments.items() if value == 0]
    found = []
    if not moments[worst] <= HUGE_GRADIENT * median:
        found.append(Finding("warn", what, evidence, "clip its rule alone (clip: …), or lower its learning rate"))
    else:
        found.append(Finding("pass", what, evidence))
    if none:
        evidence = f"{len(none)} of {len(moments)} tensors never had one, first {none[0]}"
        found.append(Finding("warn", "every tensor had a gradient", evidence, "check that the data reaches that part"))
    return found
