"""Losses of read-outs against loops over regions, closed forms and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlmtune.losses.boxes import box_costs
from vlmtune.losses.objective import Objective
from vlmtune.losses.referring import SOFTNESS, HeadBoxLoss, ReferringLoss, soft_box
from vlmtune.models.readouts import BoxHead, MaskHead
from vlmtune.models.vlm import Supervised
from vlmtune.types import PER_PATCH, Batch, Kind, Region

D, T = 6, 12


def region(at, list_of, is_answer, seed, shape=(2, 2), mask=True) -> Region:
    generator = torch.Generator().manual_seed(seed)
    low, size = torch.rand(2, generator=generator) / 2, torch.rand(2, generator=generator) / 2
    rows, columns = shape
    covered = torch.rand(rows * PER_PATCH, columns * PER_PATCH, generator=generator).round() if mask else None
    patches = torch.arange(rows * columns).view(rows, columns)
    return Region(at, torch.cat([low, low + size]), list_of, is_answer, 0, patches, covered)


ROWS = [
    [region(7, 1, True, 0), region(8, 1, True, 1), region(10, 2, True, 2, mask=False)],  # a list of two, and one
    [region(6, 0, False, 3), region(9, 3, True, 4)],
    [],
    [region(5, 0, False, 5, shape=(1, 3))],
]


def batch_of(rows) -> Batch:
    kinds = torch.full((len(rows), T), int(Kind.RESPONSE), dtype=torch.int8)
    inputs = {"input_ids": torch.zeros(len(rows), T, dtype=torch.int64)}
    regions = [(n, region) for n, row in enumerate(rows) for region in row]
    return Batch(inputs, kinds, ["t"] * len(rows), [str(n) for n in range(len(rows))], regions)


def states_of(hidden: torch.Tensor) -> Supervised:
    count = hidden.shape[0] * (T - 1)
    row = torch.arange(hidden.shape[0]).repeat_interleave(T - 1)
    flat = hidden[:, :-1].reshape(count, D)
    return Supervised(flat, torch.zeros(count, dtype=torch.int64), row.to(torch.int8), row, torch.ones(count), hidden)


@pytest.fixture
def heads() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"box": BoxHead(D), "mask": MaskHead(D)})


HIDDEN = torch.randn(4, T, D, generator=torch.Generator().manual_seed(9))


def test_a_soft_box_is_a_product_of_sigmoids_and_has_the_area_of_the_box():
    box = torch.tensor([[0.2, 0.3, 0.7, 0.9]])
    soft = soft_box(box, 40, 50)
    x, y = (13 + 0.5) / 50, (12 + 0.5) / 40

    def edge(distance):
        return 1 / (1 + math.exp(-distance / SOFTNESS))

    assert float(soft[0, 12, 13]) == pytest.approx(
        edge(x - 0.2) * edge(0.7 - x) * edge(y - 0.3) * edge(0.9 - y), rel=1e-4
    )
    assert float(soft.mean()) == pytest.approx(0.5 * 0.6, abs=2e-3)  # the soft edges cancel but for the cells
    assert float(soft.min()) >= 0 and float(soft.max()) <= 1


def test_gradients_of_the_soft_box_by_finite_differences():
    boxes = torch.tensor([[0.2, 0.3, 0.7, 0.9], [0.4, 0.1, 0.5, 0.2]], dtype=torch.float64, requires_grad=True)

    def mean_square(boxes):
        return (soft_box(boxes, 9, 8) - 0.3).square().mean((1, 2)).sum()

    analytic = torch.autograd.grad(mean_square(boxes), boxes)[0]
    step = 1e-6
    for n in range(2):
        for k in range(4):
            moved = torch.zeros_like(boxes)
            moved[n, k] = step
            difference = (mean_square(boxes + moved) - mean_square(boxes - moved)) / (2 * step)
            # the grid of cells is float32: its own rounding, 1e-7, over the sharpest edge, 1 / SOFTNESS
            assert float(analytic[n, k]) == pytest.approx(float(difference), rel=1e-4, abs=1e-7)


@torch.no_grad()
def test_the_referring_loss_is_that_of_a_loop_over_regions(heads):
    loss, batch = ReferringLoss(1.5, 0.5, 0.1), batch_of(ROWS)
    sums = loss(states_of(HIDDEN), None, heads, batch, None)
    expected = {"referring/mask": 0.0, "referring/box": 0.0, "referring/consistency": 0.0}
    masked = [(row, one) for row, one in batch.regions if one.mask is not None]
    for row, one in masked:
        state = HIDDEN[row, one.at][None]
        patches = torch.stack([torch.stack([HIDDEN[row, t] for t in line]) for line in one.patches])[None]
        logits, box = heads["mask"](state, patches)[0], heads["box"](state)
        said = logits.sigmoid()
        cross = -(one.mask * said.log() + (1 - one.mask) * (1 - said).log()).mean()
        expected["referring/mask"] += 1.5 * float(cross)
        expected["referring/box"] += 0.5 * float(box_costs(box, one.box[None], 1.0, 1.0))
        expected["referring/consistency"] += 0.1 * float(F.mse_loss(said, soft_box(box, *one.mask.shape)[0]))
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(expected, rel=1e-4)
    assert loss.count(batch) == len(masked) == 5


@torch.no_grad()
def test_the_box_head_is_matched_within_a_list(heads):
    batch, loss = batch_of(ROWS[:2]), HeadBoxLoss(1.0, 0.5)

    def cost(row, at, target):
        return float(box_costs(heads["box"](HIDDEN[row, at][None]), target.box[None], 1.0, 0.5))

    (a, b, c), (_, e) = ROWS[0], ROWS[1]
    pair = min(cost(0, a.at, a) + cost(0, b.at, b), cost(0, a.at, b) + cost(0, b.at, a))
    expected = pair + cost(0, c.at, c) + cost(1, e.at, e)
    assert float(loss(states_of(HIDDEN[:2]), None, heads, batch, None)["box"]) == pytest.approx(expected, rel=1e-5)
    assert loss.count(batch) == 4, "regions of questions are no answers"
    assert loss(states_of(HIDDEN[2:3]), None, heads, batch_of(ROWS[2:3]), None) == {}


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [((1, 0, 0), {"mask"}), ((0, 1, 0), {"box"}), ((0, 0, 1), {"mask", "box"}), ((1, 0.5, 0.1), {"mask", "box"})],
)
def test_only_heads_with_an_effect_are_wanted(weights, wanted):
    assert ReferringLoss(*weights).heads == wanted


def test_micro_batches_add_up_whatever_has_regions(heads):
    head = nn.Linear(D, 3)
    objective = Objective(terms=[HeadBoxLoss(), ReferringLoss()])
    results = []
    for cuts in ([(0, 4)], [(0, 1), (1, 3), (3, 4)]):
        batches = [batch_of(ROWS[a:b]) for a, b in cuts]
        step = objective.weights(batches)
        assert step.counts == {"box": 4, "referring": 5}
        heads.zero_grad()
        parts = [
            objective(states_of(HIDDEN[a:b]), head, batch, step, heads)
            for batch, (a, b) in zip(batches, cuts, strict=True)
        ]
        sum(part.total for part in parts).backward()
        gradients = {name: p.grad.clone() for name, p in heads.named_parameters()}
        results.append((sum(float(p.total) for p in parts), gradients))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-4, atol=1e-6)


def test_heads_get_a_gradient_of_zero_where_there_is_no_region(heads):
    objective = Objective(terms=[HeadBoxLoss()])
    batch = batch_of(ROWS[2:3])
    losses = objective(states_of(HIDDEN[2:3]), nn.Linear(D, 3), batch, objective.weights([batch]), heads)
    losses.total.backward()
    assert losses.terms == {} and all(float(p.grad.abs().sum()) == 0 for p in heads.parameters())
