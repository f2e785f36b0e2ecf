"""What the sections of a config share: values that complain while the config is read, and the strict base class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from vlmtune.errors import VlmtuneError
from vlmtune.evaluate.names import require_metric
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


def read_by(parse: Callable[[Any], Any], otherwise: str) -> BeforeValidator:
    """As `checked`, but of the value as it was written: pydantic would complain once for each form it could have had.

    otherwise: the sentence for what `parse` cannot read at all.
    """

    def check(value: Any) -> Any:
        try:
            if isinstance(value, bool):
                raise TypeError
            parse(value)
        except VlmtuneError as error:
            raise ValueError(str(error).rstrip(".")) from error
        except (TypeError, ValueError) as error:
            raise ValueError(otherwise) from error
        return value

    return BeforeValidator(check)


def number_or_pairs(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """YAML 1.1 reads 1e-4 as a text."""
    return lambda value: parse(float(value) if isinstance(value, str) else value)


def _parts_of_metrics(name: str) -> None:
    """Metrics are called group/task/metric."""
    if not name or "/" in name:
        raise VlmtuneError("a name is not empty and has no slash, because metrics are called group/task/metric")


_PAIRS = "write a number, or [[progress, value], …] with progress from 0 to 1"
_LENGTH = "write a number of steps, or a text such as 2 epochs"
ScheduleValue = Annotated[float | list[tuple[float, float]], read_by(number_or_pairs(piecewise), _PAIRS)]
LengthValue = Annotated[str | float, read_by(Length.parse, _LENGTH)]
Name = Annotated[str, checked(_parts_of_metrics)]
MetricName = Annotated[str, checked(require_metric)]
Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
SomeLength = Annotated[str | float, read_by(Length.parse_positive, _LENGTH)]
RunLength = Annotated[str | float, read_by(Length.parse_whole, _LENGTH)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)
