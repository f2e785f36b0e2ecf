"""Who is told what happens in a run. Level 0."""

from __future__ import annotations

from typing import Any

from vlmtune.types import Finding


class Observer:
    """Watches, never changes the update. state: `checkpoint.TrainState`, as it is after what happened."""

    def on_step(self, state: Any, metrics: dict[str, Any]) -> None:
        """After an optimizer step. A step whose batch was left out has `skipped` and no losses in its metrics."""

    def on_eval(self, state: Any, metrics: dict[str, Any]) -> None:
        """After an evaluation. metrics: "loss", "loss/<group>/<task>", "<group>/<task>/<metric>" -> value."""

    def on_finding(self, state: Any, finding: Finding) -> None:
        """Something that a person should know."""

    def on_rewind(self, state: Any) -> None:
        """The run went back to an earlier step: `state` is the one of then."""
