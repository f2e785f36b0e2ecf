"""Read-outs of hidden states: a box head and a mask head, attached to a model as `heads` (SPEC B10, B12).

They are new, learn fully, and belong to training and to those who ask for masks: generated text does not need them, so
a model without them is the same model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmtune.models.anatomy import HEADS
from vlmtune.types import PER_PATCH

CELLS = 4  # of mask logits along each side of a patch; twice as many come from interpolation
WIDTH = 64  # of the dot products


class BoxHead(nn.Module):
    """A state -> a box: two layers, then centre and size in fractions of the canvas, so that no box is inverted."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, 4)

    def forward(self, states: Tensor) -> Tensor:
        """float[N, D] -> float32[N, 4]: x1 y1 x2 y2."""
        centre, size = self.out(F.gelu(self.hidden(states))).float().sigmoid().chunk(2, dim=-1)
        return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


class MaskHead(nn.Module):
    """Mask logits: dot product of the state of a region with the states of the patches, upsampled.

    Every patch has CELLS x CELLS keys, one for each of its cells.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.query = nn.Linear(hidden_size, WIDTH)
        self.key = nn.Linear(hidden_size, WIDTH * CELLS**2)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, states: Tensor, patches: Tensor) -> Tensor:
        """float[N, D], float[N, rows, columns, D] -> float32[N, rows x PER_PATCH, columns x PER_PATCH]: logits."""
        count, rows, columns = patches.shape[:3]
        keys = self.key(patches).view(count, rows, columns, CELLS, CELLS, WIDTH)
        logits = torch.einsum("nrcijw,nw->nricj", keys, self.query(states)).float() / WIDTH**0.5 + self.bias
        logits = logits.reshape(count, 1, rows * CELLS, columns * CELLS)
        size = (rows * PER_PATCH, columns * PER_PATCH)
        return F.interpolate(logits, size, mode="bilinear", align_corners=False).squeeze(1)


KINDS = {"box": BoxHead, "mask": MaskHead}


def attach_readouts(model: PreTrainedModel, names: Sequence[str], seed: int) -> None:
    """Give `model` fresh heads called `names` (of KINDS), in place. The weights depend on `seed` alone."""
    size = model.config.get_text_config().hidden_size
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_module(HEADS, nn.ModuleDict({name: KINDS[name](size) for name in sorted(names)}))


def readouts_of(model: nn.Module) -> nn.ModuleDict | None:
    return getattr(model, HEADS, None)


def detach_readouts(model: nn.Module) -> dict[str, Tensor]:
    """Take the heads off; returns their tensors, "box.out.weight" …; empty for a model without."""
    heads = readouts_of(model)
    if heads is None:
        return {}
    delattr(model, HEADS)
    return {name: value.detach() for name, value in heads.state_dict().items()}
