"""What the sections of a config share: values that complain while the config is read, and the strict base class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from vlmtune.errors import VlmtuneError
from vlmtune.schedule import Length, piecewise


def checked(parse: Callable[[Any], Any]) -> AfterValidator:
    """Let `parse` complain while the config is read, with the key in front, instead of in the middle of a run."""

    def check(value: Any) -> Any:
        try:
            parse(value)
        except VlmtuneError as error:
            raise ValueError(str(error).rstrip(".")) from error
        return value

    return AfterValidator(check)


def _parts_of_metrics(name: str) -> None:
    """Metrics are called group/task/metric."""
    if not name or "/" in name:
        raise VlmtuneError("a name is not empty and has no slash, because metrics are called group/task/metric")


ScheduleValue = Annotated[float | list[tuple[float, float]], checked(piecewise)]
LengthValue = Annotated[str | float, checked(Length.parse)]
Name = Annotated[str, checked(_parts_of_metrics)]
Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
SomeLength = Annotated[str | float, checked(Length.parse_positive)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)
