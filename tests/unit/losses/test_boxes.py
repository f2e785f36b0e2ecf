"""Box losses against second sources: exact arithmetic, finite differences, brute force, a loop over samples."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vlmtune.losses.boxes import BoxLoss, box_costs, generalised_iou, match
from vlmtune.losses.objective import Objective
from vlmtune.models.vlm import Supervised
from vlmtune.types import Batch, Kind

whole = st.tuples(*[st.integers(0, 8)] * 4)


def exact_giou(a, b) -> Fraction:
    """By counting in fractions, from the definition."""

    def area(box):
        return max(0, box[2] - box[0]) * max(0, box[3] - box[1])

    inner = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    shared = area(inner) if area(a) and area(b) else 0
    union = area(a) + area(b) - shared
    xs, ys = [a[0], a[2], b[0], b[2]], [a[1], a[3], b[1], b[3]]
    around = (max(xs) - min(xs)) * (max(ys) - min(ys))
    if around == 0:
        return Fraction(1 if a == b else -1)
    return (Fraction(shared, union) if union else Fraction(0)) - Fraction(around - union, around)


@settings(max_examples=400)
@given(whole, whole)
def test_giou_is_that_of_exact_arithmetic_degenerate_boxes_too(a, b):
    got = generalised_iou(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    assert float(got) == pytest.approx(float(exact_giou(a, b)), abs=1e-12) and -1 <= float(got) <= 1


@pytest.mark.parametrize(
    ("a", "b", "giou"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 1, 1), (1, 1, 2, 2), -0.5),  # touching corners: no overlap, half of the square around is empty
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),
        ((1, 1, 1, 1), (1, 1, 1, 1), 1.0),
        ((1, 1, 1, 1), (1, 1, 1, 2), -1.0),
        ((2, 2, 0, 0), (0, 0, 2, 2), 0.0),  # inverted: empty
    ],
)
def test_giou_of_known_pairs(a, b, giou):
    assert float(generalised_iou(torch.tensor(a).double(), torch.tensor(b).double())) == pytest.approx(giou)


def test_gradients_by_finite_differences():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)  # some are inverted
    targets = torch.tensor([[0.1, 0.2, 0.6, 0.9]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: box_costs(p, targets, 1.0, 2.0), (predicted,))


@given(st.integers(1, 5), st.integers(0, 10_000))
def test_matching_is_that_of_brute_force(size, seed):
    costs = torch.rand(size, size, generator=torch.Generator().manual_seed(seed))
    best = min(sum(float(costs[r, c]) for r, c in enumerate(order)) for order in permutations(range(size)))
    assert float(costs[match(costs)].sum()) == pytest.approx(best, rel=1e-6)


def test_nothing_is_matched_with_nothing():
    assert [len(found) for found in match(torch.zeros(0, 3))] == [0, 0]


# tokens: 0 to 3 are numbers (.125, .375, .625, .875), 4 opens, 5 closes, 6 is text
LOSS = BoxLoss({n: (n + 0.5) / 4 for n in range(4)}, opens=4, closes=5, l1=1.0, giou=0.5)
REPLIES = [
    [6, 4, 0, 0, 2, 3, 5, 6],
    [6, 4, 1, 1, 3, 3, 0, 0, 1, 2, 5, 6],  # two boxes in one list
    [6, 4, 0, 1, 1, 2, 5, 6, 4, 2, 2, 3, 3, 5],  # two lists
    [6, 0, 1, 2, 3, 6],  # two points, in tags that are text
]


def batch_of(replies) -> Batch:
    width = max(map(len, replies))
    ids, kinds = torch.full((len(replies), width), 6), torch.full((len(replies), width), int(Kind.PADDING))
    for n, reply in enumerate(replies):
        ids[n, : len(reply)] = torch.tensor(reply)
        kinds[n, : len(reply)] = torch.tensor([int(Kind.RESPONSE if i == 6 else Kind.BOX) for i in reply])
    inputs = {"input_ids": ids, "attention_mask": (kinds >= 0).long()}
    return Batch(inputs, kinds.to(torch.int8), ["t"] * len(replies), [str(n) for n in range(len(replies))])


def states_of(batch: Batch, hidden: torch.Tensor) -> tuple[Supervised, torch.Tensor]:
    carries = batch.kinds[:, 1:] >= 0
    row = torch.arange(len(carries)).unsqueeze(1).expand_as(carries)[carries]
    targets = batch.inputs["input_ids"][:, 1:][carries]
    kinds = batch.kinds[:, 1:][carries]
    return Supervised(hidden[:, :-1][carries], targets, kinds, row, torch.ones(len(row))), carries


def test_which_tokens_are_numbers_of_boxes():
    found = LOSS.places(batch_of(REPLIES))
    assert found.is_number.sum(1).tolist() == [4, 8, 8, 0] and found.boxes == 5


def test_the_loss_is_that_of_a_loop_over_lists():
    torch.manual_seed(0)
    batch, head = batch_of(REPLIES), nn.Linear(5, 7)
    hidden = torch.randn(4, 14, 5)
    states, carries = states_of(batch, hidden)
    values = torch.tensor([0.125, 0.375, 0.625, 0.875])

    def expected(row, first):  # the state before a token predicts it
        return torch.stack([head(hidden[row, k - 1])[:4].softmax(0) @ values for k in range(first, first + 4)])

    def target(row, first):
        return values[torch.tensor(REPLIES[row][first : first + 4])]

    def cost(p, t):
        return float((p - t).abs().sum() + 0.5 * (1 - generalised_iou(p, t)))

    alone = sum(cost(expected(r, k), target(r, k)) for r, k in [(0, 2), (2, 2), (2, 9)])
    p, t = [expected(1, 2), expected(1, 6)], [target(1, 2), target(1, 6)]
    pair = min(cost(p[0], t[0]) + cost(p[1], t[1]), cost(p[0], t[1]) + cost(p[1], t[0]))
    assert float(LOSS(states, head, None, batch, carries)["box"]) == pytest.approx(alone + pair, rel=1e-5)


def test_a_batch_without_boxes_adds_nothing():
    batch = batch_of(REPLIES[3:])
    states, carries = states_of(batch, torch.randn(1, 6, 5))
    assert LOSS(states, nn.Linear(5, 7), None, batch, carries) == {}


def test_the_mean_is_over_the_boxes_of_the_step_whatever_the_micro_batches():
    torch.manual_seed(1)
    head, hidden = nn.Linear(5, 7), torch.randn(4, 14, 5)
    objective = Objective(terms=[LOSS])
    results = []
    for cuts in ([(0, 4)], [(0, 1), (1, 3), (3, 4)]):
        batches = [batch_of(REPLIES[a:b]) for a, b in cuts]
        step = objective.weights(batches)
        assert step.counts == {"box": 5}
        parts = []
        for batch, (a, b) in zip(batches, cuts, strict=True):
            states, _ = states_of(batch, hidden[a:b, : batch.kinds.shape[1]])
            parts.append(objective(states, head, batch, step))
        head.zero_grad()
        sum(part.total for part in parts).backward()
        results.append((sum(float(p.terms.get("box", 0)) for p in parts), head.weight.grad.clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5) and results[0][0] > 0
    torch.testing.assert_close(results[0][1], results[1][1])
