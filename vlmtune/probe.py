"""Three samples that travel with a checkpoint: whoever loads it measures the loss it had when it was written (SPEC D8).

Weights that load without a complaint and do nothing (renamed keys, another base, another library version) show here.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from vlmtune.data.batch import batches_of, tensors_of
from vlmtune.losses.language import token_cross_entropy
from vlmtune.models.vlm import VLM
from vlmtune.optim.precision import SAME_LOSS, Precision, autocast
from vlmtune.types import Batch, VlmtuneError

FILE = "probe.safetensors"
SAMPLES = 3


@dataclass(frozen=True)
class Probe:
    """batch: the samples, as the model gets them."""

    batch: Batch

    def losses(self, model: nn.Module, precision: Precision) -> list[float]:
        """Mean plain cross-entropy of each sample, with everything in eval mode; the torch RNG is left as it was.

        The caller puts the model back into training mode.
        """
        rng = torch.get_rng_state()
        model.eval()
        batch = self.batch.to(model.device)
        vlm = VLM(model)
        with torch.no_grad(), autocast(precision, model.device):
            states = vlm(batch, every_state=False)
            tokens = token_cross_entropy(states.hidden, vlm.head, states.targets)
        sums = torch.zeros(len(batch.sample_ids), device=tokens.device).index_add(0, states.row, tokens.float())
        counts = torch.bincount(states.row, minlength=len(sums)).clamp(min=1)
        torch.set_rng_state(rng)
        return (sums / counts).tolist()

    def save(self, folder: Path) -> None:
        """Write the samples into a checkpoint."""
        tensors, described = tensors_of([self.batch])
        save_file(tensors, folder / FILE, {"described": json.dumps(described)})

    @classmethod
    def load(cls, folder: Path) -> Probe:
        """Raises VlmtuneError for a file that is missing or damaged."""
        try:
            with safe_open(folder / FILE, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no iterator
                (batch,) = batches_of(tensors, json.loads(file.metadata()["described"]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise VlmtuneError(f"{folder / FILE} is missing or damaged ({error}); name another checkpoint.") from error
        return cls(batch)


def require_same_losses(folder: Path, described: dict, model: nn.Module, precision: Precision) -> None:
    """Measure the stored samples with the weights that were loaded, and refuse to go on where the losses differ.

    described: state.json of the checkpoint; one without stored samples passes. Raises VlmtuneError.
    """
    before = described.get("probe")
    if before is None:
        return
    now = Probe.load(folder).losses(model, precision)
    limit = max(SAME_LOSS[precision], SAME_LOSS[before["precision"]])
    pairs = list(zip(now, before["losses"], strict=True))
    if all(abs(a - b) <= limit * max(1.0, abs(b)) or (math.isnan(a) and math.isnan(b)) for a, b in pairs):
        return
    shown = [", ".join(f"{loss:.4f}" for loss in losses) for losses in (before["losses"], now)]
    raise VlmtuneError(
        f"{folder}: its three stored samples had the losses {shown[0]} when it was written and have {shown[1]} now, so "
        "the weights that answer are not those that were trained; use the base model, the config and the versions "
        f"({', '.join(f'{name} {version}' for name, version in described.get('versions', {}).items())}) of that run."
    )
