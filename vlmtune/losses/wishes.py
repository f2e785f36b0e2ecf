"""What may be asked of the loss. Without torch, so that a config is refused before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping

from vlmtune.errors import VlmtuneError
from vlmtune.schedule import Piecewise, piecewise

DEFAULT_WEIGHTS = {"special": 0.0, "instruction": 0.0, "response": 1.0, "box": 1.0, "entity": 1.0}
"""Kind of token that may carry loss -> its weight. Image placeholders and padding are no text, and replies marked
`train: false` are context."""


def complete_weights(weights: Mapping[str, Piecewise]) -> dict[str, Piecewise]:
    """The weight of every kind, given or default.

    Raises VlmtuneError for unknown kinds, negative weights, and where at some progress every weight is zero.
    """
    unknown = [name for name in weights if name not in DEFAULT_WEIGHTS]
    if unknown:
        raise VlmtuneError(f"no tokens of kind {unknown[0]!r} can carry loss; kinds: {', '.join(DEFAULT_WEIGHTS)}")
    for name, weight in weights.items():
        if min(weight.values) < 0:
            raise VlmtuneError(f"the weight of {name} falls to {min(weight.values):g}; weights are never negative")
    whole = {name: weights.get(name, piecewise(default)) for name, default in DEFAULT_WEIGHTS.items()}
    for start in sorted({start for weight in whole.values() for start in weight.starts}):
        if not any(weight(start) for weight in whole.values()):
            raise VlmtuneError(f"from progress {start:g} on every weight is 0, so nothing would be learned")
    return whole


def require_task_weights(weights: Mapping[str, float]) -> None:
    """Raise VlmtuneError for weights of tasks that are negative or all zero."""
    if min(weights.values(), default=0) < 0 or not any(weights.values()):
        raise VlmtuneError(f"weights of tasks {dict(weights)}: none may be negative, and one must be above 0")
