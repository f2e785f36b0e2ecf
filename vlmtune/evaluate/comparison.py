"""What several methods cost and bring, against one of them: figures of their trials with 95 % intervals (SPEC C6).

A trial is one method with one seed. What is compared is paired: the same seed means the same order of samples and the
same held-out ones. With several seeds an interval is Student's t over seeds, with one it is a bootstrap over held-out
samples (of speed: of the median over steps), which says nothing about other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from vlmtune.evaluate.intervals import (
    Interval,
    median_interval,
    percentile_interval,
    ratio_interval,
    resampled_sums,
    t_interval,
)
from vlmtune.evaluate.names import task_metrics

SETTLING = 3  # steps of a run that are not timed: libraries load, allocators grow, the optimizer makes its state

BUSY = 0.8  # of a processor: below it, other work decides what the clock says


@dataclass(frozen=True)
class HeldOut:
    """A model's result on one held-out sample; values: metric -> score, empty where nothing was generated."""

    group: str
    id: str
    task: str
    loss: float
    tokens: int
    values: dict[str, float]

    @property
    def place(self) -> str:
        return f"{self.group}/{self.task}"


@dataclass(frozen=True)
class Scores:
    """metrics: as `Evaluation.metrics`; telling: those that the score is the mean of; samples: in the data's order."""

    metrics: dict[str, float]
    telling: list[str]
    samples: list[HeldOut]

    @property
    def score(self) -> float | None:
        """Mean over groups and tasks of their telling metrics; None where nothing but losses was measured."""
        return sum(self.metrics[name] for name in self.telling) / len(self.telling) if self.telling else None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Scores:
        return cls(record["metrics"], record["telling"], [HeldOut(**row) for row in record["samples"]])

    def as_record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Step:
    """A training step, without evaluations and checkpoints. seconds: by the clock; cpu: the processor's, all threads
    together, None where it was not measured."""

    step: int
    seconds: float
    samples: int
    cpu: float | None = None


@dataclass(frozen=True)
class Trial:
    """peak: bytes, None where the system does not tell; items: what is alive at the predicted peak of a step, in bytes;
    machine: device, processor, threads, precision; failed: why there is nothing else, or None."""

    arm: str
    seed: int
    failed: str | None = None
    trainable: int = 0
    parameters: int = 0
    peak: int | None = None
    items: dict[str, int] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    scores: Scores | None = None
    machine: dict[str, Any] = field(default_factory=dict)

    def timed(self) -> dict[int, Step]:
        """By number, without the first ones."""
        first = min(SETTLING, len(self.steps) - 1)
        return {step.step: step for step in self.steps[first:]}

    def busy(self) -> float | None:
        """Share of a processor that the timed steps had; None but for one thread on a CPU, which needs all of one."""
        if (self.machine.get("device"), self.machine.get("threads")) != ("cpu", 1):
            return None
        steps = [step for step in self.timed().values() if step.cpu is not None]
        return sum(step.cpu for step in steps) / sum(step.seconds for step in steps) if steps else None


@dataclass(frozen=True)
class Figure:
    """One metric of one method. difference, ratio: to the baseline; gain: share of the baseline's change from the
    base model. None where there is nothing to compare with."""

    name: str
    value: Interval
    difference: Interval | None
    ratio: Interval | None
    gain: Interval | None


@dataclass(frozen=True)
class Row:
    """All of one method, ratios to the baseline's. items: what a step holds at its predicted peak, and memory, its
    measured peak, in bytes; speed: samples per second by the clock; cpu_ratio: of the speed by
    processor time, None but on a CPU."""

    arm: str
    seeds: list[int]
    failed: dict[int, str]
    trainable: int | None = None
    parameters: int | None = None
    items: dict[str, int] = field(default_factory=dict)
    memory: Interval | None = None
    memory_ratio: Interval | None = None
    speed: Interval | None = None
    speed_ratio: Interval | None = None
    cpu_ratio: Interval | None = None
    score: Figure | None = None
    loss: Figure | None = None
    metrics: list[Figure] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """base: metric -> value of the model before any training, with `score` in it; notes: sentences to read with it."""

    baseline: str
    rows: list[Row]
    base: dict[str, float]
    over: Literal["seeds", "samples"]
    notes: list[str]

    def row(self, arm: str) -> Row:
        return next(row for row in self.rows if row.arm == arm)


def compare_trials(trials: Sequence[Trial], base: Scores | None, arms: Sequence[str], baseline: str) -> Comparison:
    """arms: in the order of the table; base: of the untrained model, None where it was not measured."""
    finished = {arm: {t.seed: t for t in trials if t.arm == arm and t.failed is None} for arm in arms}
    failed = {arm: {t.seed: t.failed for t in trials if t.arm == arm and t.failed is not None} for arm in arms}
    over = "seeds" if max(map(len, finished.values()), default=0) > 1 else "samples"
    rows = [
        _row(arm, finished[arm], finished[baseline], failed[arm], base, arm == baseline) if finished[arm]
        else Row(arm, [], failed[arm])
        for arm in arms
    ]  # fmt: skip
    shown = {} if base is None else base.metrics | ({} if base.score is None else {"score": base.score})
    notes = _notes(rows, finished, baseline, over)
    if base is None:
        notes.append("the base model was not scored, so nothing is a share of a gain")
    return Comparison(baseline, rows, shown, over, notes)


def telling(metrics: Mapping[str, float], chosen: Mapping[str, Sequence[str]]) -> list[str]:
    """The metric of every group and task that a score is the mean of: the first that was chosen for its task, or that
    it has by itself."""
    places: dict[str, list[str]] = {}
    for name in metrics:
        if name != "loss" and not name.startswith("loss/"):
            place, _, metric = name.rpartition("/")
            places.setdefault(place, []).append(metric)
    names = []
    for place, found in places.items():
        task = place.partition("/")[2]
        wanted = chosen.get(task) or task_metrics(task)
        names.append(f"{place}/{next((metric for metric in wanted if metric in found), found[0])}")
    return names


def _row(
    arm: str, mine: Mapping[int, Trial], theirs: Mapping[int, Trial], failed: dict[int, str], base: Scores | None,
    is_baseline: bool,
) -> Row:  # fmt: skip
    """mine, theirs: seed -> trial, of this arm and of the baseline; they are paired where both have a seed."""
    first = next(iter(mine.values()))
    pairs = [] if is_baseline else [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]
    peaks = [trial.peak for trial in mine.values()]
    sizes = [(a.peak, b.peak) for a, b in pairs]
    alone = [trial.scores for trial in mine.values()]
    scores = [(a.scores, b.scores) for a, b in pairs]
    return Row(
        arm, list(mine), failed, first.trainable, first.parameters, first.items,
        memory=None if None in peaks else t_interval(peaks),
        memory_ratio=None
        if not sizes or any(None in pair for pair in sizes)
        else ratio_interval([a / b for a, b in sizes]),
        speed=_speed(list(mine.values())),
        speed_ratio=_speed_ratio(pairs, lambda step: step.seconds),
        cpu_ratio=_speed_ratio(pairs, lambda step: step.cpu) if first.machine.get("device") == "cpu" else None,
        score=_figure("score", alone, scores, base) if first.scores.telling else None,
        loss=_figure("loss", alone, scores, base),
        metrics=[_figure(name, alone, scores, base) for name in first.scores.metrics if name != "loss"],
    )  # fmt: skip


def _speed(trials: Sequence[Trial]) -> Interval:
    """Samples per second: of a trial all of its timed steps together."""
    rates = []
    for trial in trials:
        steps = trial.timed().values()
        rates.append(sum(step.samples for step in steps) / sum(step.seconds for step in steps))
    return t_interval(rates)


def _speed_ratio(pairs: Sequence[tuple[Trial, Trial]], time_of: Callable[[Step], float | None]) -> Interval | None:
    """How many times faster. Of a seed: the median over steps, which had the same samples; a busy moment of the machine
    is then one step of many."""
    medians = []
    for ours, base in pairs:
        one, other = ours.timed(), base.timed()
        times = [(time_of(other[n]), time_of(step)) for n, step in one.items() if n in other]
        ratios = [longer / mine for longer, mine in times if longer is not None and mine]
        if not ratios:
            return None
        medians.append(median_interval(ratios))
    if len(medians) > 1:
        return ratio_interval([median.value for median in medians])
    return medians[0] if medians else None


# ---- values of seeds, and of resamples ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Values:
    """points: float[seeds]; draws: float[resamples] of a single seed, None where its samples have no values."""

    points: np.ndarray
    draws: np.ndarray | None

    @property
    def is_positive(self) -> bool:
        return bool((self.points > 0).all() and (self.draws is None or (self.draws > 0).all()))

    @property
    def interval(self) -> Interval:
        if len(self.points) > 1 or self.draws is None:
            return t_interval(self.points)
        return percentile_interval(float(self.points[0]), self.draws)


def _joined(function: Callable[..., np.ndarray], *values: _Values) -> _Values:
    """The same function of points and of draws."""
    drawn = [value.draws for value in values]
    draws = None if any(draw is None for draw in drawn) else function(*drawn)
    return _Values(function(*(value.points for value in values)), draws)


def _figure(name: str, alone: Sequence[Scores], pairs: Sequence[tuple[Scores, Scores]], base: Scores | None) -> Figure:
    """Of one metric, "loss" or "score"."""
    (own,) = _values(name, [alone])
    if not pairs:
        return Figure(name, own.interval, None, None, None)
    columns = [[a for a, _ in pairs], [b for _, b in pairs]]
    mine, theirs, *start = _values(name, columns + ([[base] * len(pairs)] if base else []))
    difference = _joined(lambda a, b: a - b, mine, theirs)
    ratio = _joined(lambda a, b: a / b, mine, theirs) if theirs.is_positive else None
    gain = None
    if start:
        sign = -1.0 if name.startswith("loss") else 1.0
        gained = _joined(lambda b, s: sign * (b - s), theirs, *start)
        is_sure = gained.interval.low is not None and gained.interval.low > 0
        if is_sure and gained.is_positive:  # a share of nothing is no figure
            gain = _joined(lambda a, s, g: sign * (a - s) / g, mine, *start, gained)
    return Figure(name, own.interval, difference.interval, ratio and ratio.interval, gain and gain.interval)


def _values(name: str, models: Sequence[Sequence[Scores]]) -> list[_Values]:
    """Of each model. models: the scores of its seeds; all have the same number of them."""
    points = [np.array([_value(name, scores) for scores in seeds]) for seeds in models]
    draws = _draws(name, [seeds[0] for seeds in models]) if len(models[0]) == 1 else None
    return [_Values(point, None if draws is None else draws[n]) for n, point in enumerate(points)]


def _value(name: str, scores: Scores) -> float:
    return scores.score if name == "score" else scores.metrics[name]


def _draws(name: str, models: Sequence[Scores]) -> list[np.ndarray] | None:
    """float[resamples] of every model, whose samples are drawn together and within their group and task.

    None where a metric has no values of single samples (`CORPUS_METRICS`, read-outs, multiple choice).
    """
    generator = np.random.default_rng(0)  # the same resamples for every method
    if name == "score":
        parts = [_draws_of_metric(metric, models, generator) for metric in models[0].telling]
        return None if any(part is None for part in parts) else list(np.mean(parts, axis=0))
    if not name.startswith("loss"):
        return _draws_of_metric(name, models, generator)
    places = dict.fromkeys(sample.place for sample in models[0].samples)
    wanted = [place for place in places if name in ("loss", f"loss/{place}")]
    losses, tokens = 0.0, 0.0
    for place in wanted:
        rows = [[sample for sample in model.samples if sample.place == place] for model in models]
        table = [[sample.loss for sample in row] for row in rows] + [[sample.tokens for sample in rows[0]]]
        sums = resampled_sums(np.array(table), generator)
        losses, tokens = losses + sums[:, :-1], tokens + sums[:, -1:]
    return list((losses / tokens).T)


def _draws_of_metric(name: str, models: Sequence[Scores], generator: np.random.Generator) -> list[np.ndarray] | None:
    place, _, metric = name.rpartition("/")
    table = np.array([[s.values[metric] for s in m.samples if s.place == place and metric in s.values] for m in models])
    return list(resampled_sums(table, generator).T / table.shape[1]) if table.size else None


def _notes(
    rows: Sequence[Row], finished: Mapping[str, Mapping[int, Trial]], baseline: str, over: Literal["seeds", "samples"]
) -> list[str]:
    """What one has to know to read the table."""
    notes = []
    if over == "seeds":
        counts = sorted({len(row.seeds) for row in rows if row.seeds})
        shown = " or ".join(map(str, counts))
        notes.append(f"intervals: 95 %, Student's t over {shown} seeds, paired with {baseline} of the same seed")
        alone = [row.arm for row in rows if len(finished[row.arm].keys() & finished[baseline].keys()) == 1]
        if alone:
            notes.append(
                f"{', '.join(alone)}: one seed to compare, so the intervals are over held-out samples and steps"
            )
    else:
        notes.append(
            "intervals: 95 %, one seed: bootstrap over held-out samples, of speed over steps; they say nothing about "
            "other seeds, and memory has none"
        )
    if baseline != "full":
        notes.append(f"there is no full among the methods: ratios are to {baseline}, the first one")
    if not finished[baseline]:
        notes.append(f"{baseline} has no finished trial, so nothing can be compared with it")
    for row in rows:
        if row.failed and row.seeds:
            notes.append(f"{row.arm}: without seed {', '.join(map(str, row.failed))}, which failed")
    machines = {tuple(sorted(t.machine.items())) for trials in finished.values() for t in trials.values()}
    if len(machines) > 1:
        keys = sorted({key for a in machines for b in machines for key, value in set(a) ^ set(b)})
        notes.append(
            f"trials ran on different machines or settings ({', '.join(keys)}): speed and memory are not paired"
        )
    shares = [share for trials in finished.values() for t in trials.values() if (share := t.busy()) is not None]
    if shares and min(shares) < BUSY:
        notes.append(
            f"the machine was busy: trials had {min(shares):.0%} to {max(shares):.0%} of the one processor that they "
            "use, so compare speed by processor time"
        )
    main = [row for row in rows if row.arm != baseline and row.score is not None and row.score.difference is not None]
    if main and all(row.score.gain is None for row in main):
        notes.append(f"{baseline} did not gain more in score than the interval is wide, so there is no share of it")
    return notes
