"""How learning rates move, as a config says it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from vlmtune.config.values import LengthValue, SomeLength, Strict, number_or_pairs, read_by
from vlmtune.schedule import learning_rates


class LrSegment(Strict):
    """A stretch of a staged schedule."""

    to: float = Field(gt=0, description="learning rate at its end")
    over: SomeLength | None = Field(None, description="its length (the last one: what is left of the run)")
    start: float | None = Field(None, gt=0, description="of the first one: learning rate at its start (default: to)")
    shape: Literal["linear", "cosine"] = Field("linear", description="how it goes from start to end")


def _schedule(value: object) -> object:
    """One sentence for a name that is none; pydantic would complain once for each form that it could have had."""
    if isinstance(value, list) or value is None or value in NAMED:
        return value
    raise ValueError(f"write {', '.join(NAMED)}, or a list of stretches: [{{to: 2e-4, over: 5%, start: 1e-6}}, …]")


NAMED = ("cosine", "linear", "constant", "wsd")
LrSchedule = Annotated[
    Literal["cosine", "linear", "constant", "wsd"] | Annotated[list[LrSegment], Field(min_length=1)],
    BeforeValidator(_schedule),
]
LrValue = Annotated[
    Annotated[float, Field(gt=0)] | list[tuple[float, Annotated[float, Field(ge=0)]]],
    read_by(
        number_or_pairs(learning_rates), "write a learning rate, or [[progress, rate], …] with progress from 0 to 1"
    ),
]


def require_effect(
    schedule: LrSchedule, warmup: LengthValue | None, floor: float | None, decay: LengthValue | None
) -> None:
    """Refuse lengths and levels that this schedule has no place for. Raises ValueError."""
    if isinstance(schedule, list):
        given = {"warmup": warmup, "floor": floor, "decay": decay}
        idle = [name for name, value in given.items() if value is not None]
        if idle:
            raise ValueError(f"{', '.join(idle)} means nothing with a schedule of stretches; write it as one of them")
        later = [n for n, segment in enumerate(schedule) if n and segment.start is not None]
        if later:
            raise ValueError(f"schedule.{later[0]}.start: a stretch starts where the one before ends; leave it out")
        open_ended = [n for n, segment in enumerate(schedule[:-1]) if segment.over is None]
        if open_ended:
            raise ValueError(f"schedule.{open_ended[0]}: only the last stretch may leave out over")
        return
    if floor is not None and schedule == "constant":
        raise ValueError("floor means nothing with schedule: constant")
    if decay is not None and schedule != "wsd":
        raise ValueError(f"decay means nothing with schedule: {schedule}; it is the last part of wsd")
