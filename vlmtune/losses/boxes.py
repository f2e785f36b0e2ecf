"""A loss that knows how far a box is off: L1 and generalised IoU (SPEC B10).

Cross-entropy over coordinate tokens calls a number that is one bin off as wrong as one across the picture. Here the
probabilities of the coordinate tokens are read as an expected position, which needs no new weights, and compared as a
box. Boxes are x1, y1, x2, y2 in fractions of the canvas (or y1, x1, y2, x2: both losses are the same).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from vlmtune.types import Batch, Kind


def generalised_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """float[...] in [-1, 1]: IoU - (C - U) / C, with C the area of the smallest box around both (Rezatofighi et al.
    2019). boxes, others: float[..., 4], broadcast.

    A box of which x2 <= x1 or y2 <= y1 is empty: its area and its intersections are 0, and C still spans its corners.
    Where C is 0, nothing has an area: 1 if the boxes are equal, else -1.
    """
    boxes, others = torch.broadcast_tensors(boxes, others)
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    sides = (high - low).clamp(min=0)
    filled = (_area(boxes) > 0) & (_area(others) > 0)
    intersection = torch.where(filled, sides.prod(-1), 0.0)
    union = _area(boxes) + _area(others) - intersection
    corners = torch.stack([boxes[..., :2], boxes[..., 2:], others[..., :2], others[..., 2:]])
    around = (corners.amax(0) - corners.amin(0)).prod(-1)
    iou = intersection / torch.where(union > 0, union, 1.0)
    found = iou - (around - union) / torch.where(around > 0, around, 1.0)
    same = torch.where((boxes == others).all(-1), 1.0, -1.0)
    return torch.where(around > 0, found, same)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def box_costs(predicted: Tensor, targets: Tensor, l1: float, giou: float) -> Tensor:
    """float[...]: l1 x sum of absolute differences + giou x (1 - GIoU), of float[..., 4] that are broadcast."""
    return l1 * (predicted - targets).abs().sum(-1) + giou * (1.0 - generalised_iou(predicted, targets))


def match(costs: Tensor) -> tuple[Tensor, Tensor]:
    """int64[min(P, T)] each: which prediction goes with which target so that the sum of costs is smallest (the
    Hungarian method). costs: float[P, T]; either may be 0."""
    rows, columns = linear_sum_assignment(costs.detach().cpu().double().numpy())
    return torch.from_numpy(rows).to(costs.device), torch.from_numpy(columns).to(costs.device)


@dataclass(frozen=True)
class BoxPlaces:
    """The targets of a micro-batch that are numbers of boxes. is_number: bool[B, T - 1]; list_of: int64[B, T - 1], a
    different value for each list of boxes (`<box>` to `</box>`) of a sample."""

    is_number: Tensor
    list_of: Tensor

    @property
    def boxes(self) -> int:
        return int(self.is_number.sum()) // 4


class BoxLoss(nn.Module):
    """l1 x L1 + giou x (1 - GIoU), of the position that is expected under the probabilities of the coordinate tokens.

    values: id of each coordinate token -> the fraction of the canvas it stands for; opens, closes: ids of `<box>` and
    `</box>`. Predictions are matched to the targets of the same list with the Hungarian method.
    """

    name = "box"

    def __init__(self, values: Mapping[int, float], opens: int, closes: int, l1: float = 1.0, giou: float = 1.0):
        super().__init__()
        self.opens, self.closes, self.l1, self.giou = opens, closes, l1, giou
        self.register_buffer("ids", torch.tensor(list(values), dtype=torch.int64), persistent=False)
        self.register_buffer("values", torch.tensor(list(values.values()), dtype=torch.float32), persistent=False)
        codes = torch.full((max(values) + 1,), -1, dtype=torch.int64)
        codes[self.ids] = torch.arange(len(values))
        self.register_buffer("codes", codes, persistent=False)

    def places(self, batch: Batch) -> BoxPlaces:
        """Numbers inside `<box>` … `</box>` of supervised replies; points and regions are none."""
        ids, kinds = batch.inputs["input_ids"], batch.kinds
        supervised = kinds == Kind.BOX
        opened = ((ids == self.opens) & supervised).cumsum(1)
        inside = opened > ((ids == self.closes) & supervised).cumsum(1)
        is_number = supervised & inside & torch.isin(ids, self.ids.to(ids.device))
        return BoxPlaces(is_number[:, 1:], opened[:, 1:])

    def count(self, batch: Batch) -> int:
        """Boxes of replies."""
        return self.places(batch).boxes

    def described(self) -> str:
        return f"plus, per box of a reply: {self.l1:g} × L1 + {self.giou:g} × (1 - GIoU)"

    def forward(self, states, head: nn.Module, readouts: nn.ModuleDict | None, batch: Batch, carries: Tensor):
        """{"box": sum over the boxes of this micro-batch, float32 scalar with gradient}; empty without boxes.

        states: `models.vlm.Supervised`; head: of the language; carries: bool[B, T - 1], the targets `states` holds, in
        its order.
        """
        found = self.places(batch)
        here = found.is_number[carries]
        if not bool(here.any()):
            return {}
        logits = head(states.hidden[here]).float()[:, self.ids.to(states.hidden.device)]
        values = self.values.to(logits.device)
        predicted = (logits.softmax(1) @ values).view(-1, 4)
        codes = self.codes.to(logits.device)[states.targets[here]]
        targets = values[codes].view(-1, 4)
        lists = torch.stack([states.row[here], found.list_of[carries][here]], 1)[::4]
        total = predicted.new_zeros(())
        for one in torch.unique(lists, dim=0):
            mine = (lists == one).all(1)
            costs = box_costs(predicted[mine][:, None], targets[mine][None], self.l1, self.giou)
            total = total + costs[match(costs)].sum()
        return {"box": total}
