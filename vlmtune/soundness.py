"""Whether the weights of a run are still sound, told by the samples that its checkpoints store (SPEC D8, H2)."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from vlmtune.checks.during import StartWatch
from vlmtune.models.vlm import set_training_mode
from vlmtune.optim.precision import Precision
from vlmtune.probe import Probe
from vlmtune.processes import ALONE, Processes
from vlmtune.shards import own_rows
from vlmtune.types import Finding


class Soundness:
    """Measures the stored samples once for each state of the weights, and compares them with before the first step.

    probe: the samples, None where a run stores none; parameters: what trains; processes: decide alike, by what the
    first of them measures. `watch` is part of a checkpoint.
    """

    def __init__(
        self,
        probe: Probe | None,
        model: nn.Module,
        parameters: Collection[Tensor],
        precision: Precision,
        processes: Processes = ALONE,
    ):
        self.probe, self.model, self.parameters, self.precision = probe, model, parameters, precision
        self.processes = processes
        self.watch = StartWatch()
        self._losses: list[float] | None = None

    def forget(self) -> None:
        """The weights are about to change."""
        self._losses = None

    def begin(self) -> None:
        """Remember how the samples do before the first step."""
        if self.probe is not None and not self.watch.has_begun:
            self.watch.begin(self.losses())

    def losses(self) -> list[float]:
        """Mean loss of each stored sample, with the weights as they are. Only where there are samples."""
        if self._losses is None:
            self._losses = self.processes.gather("probe", self.probe.losses(self.model, self.precision))[0]
            set_training_mode(self.model)
        return self._losses

    def compare(self) -> Finding | None:
        """Whether they do worse than before the first step."""
        return None if self.probe is None else self.watch.observe(self.losses())

    def is_ruined(self) -> bool:
        """Whether the weights answer nothing finite, or are not finite themselves: no batch is to blame then."""
        if self.watch.is_telling and not all(math.isfinite(loss) for loss in self.losses()):
            return True
        norms = torch._foreach_norm([own_rows(parameter) for parameter in self.parameters])
        is_finite = bool(torch.isfinite(torch.stack([norm.float() for norm in norms])).all())
        return not all(self.processes.gather("weights that are finite", is_finite))
