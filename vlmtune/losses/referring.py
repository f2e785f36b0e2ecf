"""Losses of read-outs: boxes and masks that heads read from hidden states (SPEC B10, B12).

A region is a box in the text: an answer, read before its first number is written, or a place a question names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmtune.losses.boxes import box_costs, match
from vlmtune.types import Batch, Region

SOFTNESS = 0.02  # fraction of the canvas over which the edge of a soft box goes from .27 to .73


def soft_box(boxes: Tensor, rows: int, columns: int) -> Tensor:
    """float[N, rows, columns] in (0, 1): how much each cell of the canvas lies in a box, differentiable in the box.

    boxes: float[N, 4]. Inside it is 1, and each edge is a sigmoid of the distance / SOFTNESS.
    """
    x = (torch.arange(columns, device=boxes.device) + 0.5) / columns
    y = (torch.arange(rows, device=boxes.device) + 0.5) / rows
    x1, y1, x2, y2 = (value[:, None] for value in boxes.unbind(-1))
    across = ((x - x1) / SOFTNESS).sigmoid() * ((x2 - x) / SOFTNESS).sigmoid()
    down = ((y - y1) / SOFTNESS).sigmoid() * ((y2 - y) / SOFTNESS).sigmoid()
    return down[:, :, None] * across[:, None, :]


def same_grids(regions: Sequence[tuple[int, Region]]) -> list[list[int]]:
    """Indices of the regions, grouped by the shape of their patches: what can be one tensor."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (_, region) in enumerate(regions):
        groups.setdefault(tuple(region.patches.shape), []).append(index)
    return list(groups.values())


def states_at(hidden: Tensor, regions: Sequence[tuple[int, Region]]) -> Tensor:
    """float[N, D]: the state of every region. hidden: float[B, T, D]."""
    rows = torch.tensor([row for row, _ in regions], device=hidden.device)
    places = torch.tensor([region.at for _, region in regions], device=hidden.device)
    return hidden[rows, places]


def patches_at(hidden: Tensor, regions: Sequence[tuple[int, Region]]) -> Tensor:
    """float[N, rows, columns, D]: the states of the patches of every region; they have one shape."""
    rows = torch.tensor([row for row, _ in regions], device=hidden.device)
    places = torch.stack([region.patches for _, region in regions])
    return hidden[rows[:, None, None], places]


class HeadBoxLoss(nn.Module):
    """l1 x L1 + giou x (1 - GIoU) of the boxes that the box head reads, matched to the answers of the same list."""

    name = "box"

    def __init__(self, l1: float = 1.0, giou: float = 1.0):
        super().__init__()
        self.l1, self.giou = l1, giou

    def count(self, batch: Batch) -> int:
        """Boxes of replies."""
        return len(_answers(batch))

    def forward(self, states, head: nn.Module, readouts: nn.ModuleDict, batch: Batch, carries: Tensor):
        """{"box": sum over boxes}. states: `models.vlm.Supervised`."""
        answers = _answers(batch)
        if not answers:
            return {}
        predicted = readouts["box"](states_at(states.sequence, answers))
        targets = torch.stack([region.box for _, region in answers])
        total = predicted.new_zeros(())
        lists = [(row, region.list_of) for row, region in answers]
        for one in dict.fromkeys(lists):
            mine = [index for index, other in enumerate(lists) if other == one]
            costs = box_costs(predicted[mine][:, None], targets[mine][None], self.l1, self.giou)
            total = total + costs[match(costs)].sum()
        return {"box": total}

    def described(self) -> str:
        return f"plus, per box of a reply, read by the box head: {self.l1:g} × L1 + {self.giou:g} × (1 - GIoU)"


class ReferringLoss(nn.Module):
    """mask x BCE of the mask + box x (L1 + 1 - GIoU) of the box + consistency x their squared difference.

    The BCE is a mean over the cells of the canvas. The last term compares sigmoid(mask logits) with the soft mask of
    the predicted box, mean over cells too. Each region that has a mask counts.
    """

    name = "referring"

    def __init__(self, mask: float = 1.0, box: float = 0.5, consistency: float = 0.1):
        super().__init__()
        self.mask, self.box, self.consistency = mask, box, consistency

    @property
    def heads(self) -> set[str]:
        """The read-outs it needs."""
        return {
            *(["mask"] if self.mask or self.consistency else []),
            *(["box"] if self.box or self.consistency else []),
        }

    def count(self, batch: Batch) -> int:
        """Regions with a mask."""
        return len(_masked(batch))

    def forward(self, states, head: nn.Module, readouts: nn.ModuleDict, batch: Batch, carries: Tensor):
        """{"referring/mask", "referring/box", "referring/consistency": weighted sum over regions}.

        states: `models.vlm.Supervised`.
        """
        masked = _masked(batch)
        sums: dict[str, Tensor] = {}
        for indices in same_grids(masked):
            for name, value in self._of_one_shape(states.sequence, readouts, [masked[i] for i in indices]).items():
                sums[name] = sums[name] + value if name in sums else value
        return sums

    def _of_one_shape(self, hidden: Tensor, readouts: nn.ModuleDict, regions: list[tuple[int, Region]]):
        read = states_at(hidden, regions)
        targets = torch.stack([region.mask for _, region in regions])
        sums: dict[str, Tensor] = {}
        if "mask" in self.heads:
            logits = readouts["mask"](read, patches_at(hidden, regions))
            cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            sums["referring/mask"] = self.mask * cross_entropy.mean((1, 2)).sum()
        if "box" in self.heads:
            boxes = readouts["box"](read)
            truth = torch.stack([region.box for _, region in regions])
            sums["referring/box"] = self.box * box_costs(boxes, truth, 1.0, 1.0).sum()
        if self.consistency:
            apart = logits.sigmoid() - soft_box(boxes, *targets.shape[1:])
            sums["referring/consistency"] = self.consistency * apart.square().mean((1, 2)).sum()
        return sums

    def described(self) -> str:
        return (
            f"plus, per region with a mask: {self.mask:g} × BCE of the mask + {self.box:g} × (L1 + 1 - GIoU) of the "
            f"box + {self.consistency:g} × their difference"
        )


def _answers(batch: Batch) -> list[tuple[int, Region]]:
    return [(row, region) for row, region in batch.regions if region.is_answer]


def _masked(batch: Batch) -> list[tuple[int, Region]]:
    return [(row, region) for row, region in batch.regions if region.mask is not None]
