"""Sums over the global weight: terms by task add up to the mean token loss of the whole step (DESIGN idea 2)."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlmtune.errors import VlmtuneError
from vlmtune.losses.balance import Fixed
from vlmtune.losses.objective import Objective
from vlmtune.losses.weights import TokenWeights
from vlmtune.models.vlm import Supervised
from vlmtune.schedule import piecewise
from vlmtune.step import StepLosses
from vlmtune.types import Batch, Kind, token_weights

R, B, E, U, Q, P, S, M = (
    int(k)
    for k in (
        Kind.RESPONSE, Kind.BOX, Kind.ENTITY, Kind.UNTRAINED, Kind.INSTRUCTION, Kind.PADDING, Kind.SPECIAL, Kind.IMAGE,
    )
)  # fmt: skip


def batch_of(kinds: list[list[int]], tasks: list[str]) -> Batch:
    tensor = torch.tensor(kinds, dtype=torch.int8)
    ids = torch.arange(tensor.numel()).reshape(tensor.shape) % 7
    return Batch({"input_ids": ids}, tensor, tasks, [str(n) for n in range(len(tasks))])


def states_of(batch: Batch, seed: int, table: dict | None = None, progress: float = 0.0) -> Supervised:
    kinds = batch.kinds[:, 1:]
    weights = token_weights(kinds, TokenWeights(table or {}).at(progress))
    carries = weights > 0
    row = torch.arange(len(batch.kinds)).unsqueeze(1).expand_as(carries)[carries]
    hidden = torch.randn(int(carries.sum()), 5, generator=torch.Generator().manual_seed(seed))
    return Supervised(hidden, batch.inputs["input_ids"][:, 1:][carries], kinds[carries], row, weights[carries])


ONE = batch_of([[S, M, Q, R, R, R], [S, Q, U, R, P, P]], ["caption", "vqa"])
TWO = batch_of([[S, Q, B, E, S, Q, R]], ["caption"])


def test_weights_count_supervised_tokens_by_task():
    """Replies, boxes and entities count; instructions, images, padding and `train: false` replies do not."""
    step = Objective().weights([ONE, TWO])
    assert step.tasks == step.tokens == {"caption": 3 + 3, "vqa": 1} and step.micro_batches == 2


def test_a_first_token_is_never_predicted():
    assert Objective().weights([batch_of([[R, R, R]], ["caption"])]).tokens == {"caption": 2}


@torch.no_grad()
def test_micro_batches_add_up_to_the_mean():
    """The mean over tokens of the step, not a mean of the micro-batches' means, which would be another number."""
    head, objective = nn.Linear(5, 7), Objective()
    step = objective.weights([ONE, TWO])
    states = [states_of(ONE, 1), states_of(TWO, 2)]
    parts = [objective(s, head, b, step) for s, b in zip(states, (ONE, TWO), strict=True)]
    assert [sorted(part.tasks) for part in parts] == [["caption", "vqa"], ["caption"]]
    means = [F.cross_entropy(head(s.hidden), s.targets) for s in states]
    joint = F.cross_entropy(head(torch.cat([s.hidden for s in states])), torch.cat([s.targets for s in states]))
    # float32 sums of 7 numbers of order 1
    assert float(sum(part.total for part in parts)) == pytest.approx(float(joint), rel=1e-6)
    assert float(joint) != pytest.approx(float(sum(means) / 2), rel=1e-3)
    vqa = F.cross_entropy(head(states[0].hidden[states[0].row == 1]), states[0].targets[states[0].row == 1])
    assert float(parts[0].tasks["vqa"]) == pytest.approx(float(vqa), rel=1e-6) == float(parts[0].plain["vqa"])


@torch.no_grad()
@pytest.mark.parametrize("progress", [0.0, 0.29, 0.3, 0.79, 0.8, 1.0])
def test_the_weighted_mean_by_hand(progress):
    """SPEC B3 and B4: sum of w·ce over sum of w, of the step, at every stage of the schedule of the handbook."""
    wishes = {
        "box": piecewise(2.0), "entity": piecewise(1.5), "instruction": piecewise([[0, 1.0], [0.3, 0.5], [0.8, 0.0]]),
    }  # fmt: skip
    instruction = 1.0 if progress < 0.3 else 0.5 if progress < 0.8 else 0.0
    by_kind = {R: 1.0, B: 2.0, E: 1.5, Q: instruction}
    head, objective = nn.Linear(5, 7), Objective(TokenWeights(wishes))
    step = objective.weights([ONE, TWO], progress)
    total = weight = plain = 0.0
    count = 0
    parts = []
    for seed, batch in enumerate((ONE, TWO)):
        states = states_of(batch, seed, wishes, progress)
        parts.append(objective(states, head, batch, step))
        losses = F.cross_entropy(head(states.hidden), states.targets, reduction="none")
        for loss, kind in zip(losses.tolist(), states.kinds.tolist(), strict=True):
            total, weight = total + by_kind[kind] * loss, weight + by_kind[kind]
            plain, count = plain + loss, count + 1
    assert sum(step.tasks.values()) == pytest.approx(weight) and sum(step.tokens.values()) == count
    assert float(sum(part.total for part in parts)) == pytest.approx(total / weight, rel=1e-6)
    shares = [(loss, step.tokens[task]) for part in parts for task, loss in part.plain.items()]
    assert sum(float(loss) * n for loss, n in shares) / count == pytest.approx(plain / count, rel=1e-6)


@torch.no_grad()
def test_tasks_are_means_of_their_own_tokens():
    """SPEC B5: w_i times the mean over the tokens of task i in the step, however many there are."""
    head, objective = nn.Linear(5, 7), Objective(balance=Fixed({"caption": 0.25, "vqa": 3.0}))
    step = objective.weights([ONE, TWO])
    states = [states_of(ONE, 1), states_of(TWO, 2)]
    total = sum(float(objective(s, head, b, step).total) for s, b in zip(states, (ONE, TWO), strict=True))
    caption = [(s.hidden[s.row == 0], s.targets[s.row == 0]) for s in states]
    expected = 0.25 * F.cross_entropy(head(torch.cat([h for h, _ in caption])), torch.cat([t for _, t in caption]))
    expected += 3.0 * F.cross_entropy(head(states[0].hidden[states[0].row == 1]), states[0].targets[states[0].row == 1])
    assert total == pytest.approx(float(expected), rel=1e-6)


def test_a_micro_batch_without_loss_still_reaches_every_parameter():
    head, objective = nn.Linear(5, 7), Objective()
    nothing = batch_of([[S, Q, U, P]], ["vqa"])
    step = objective.weights([ONE, nothing])
    assert step.tasks["vqa"] == 1
    states = states_of(nothing, 0)
    states.hidden.requires_grad_()
    losses = objective(states, head, nothing, step)
    losses.total.backward()
    assert float(losses.total.detach()) == 0 and states.hidden.grad is not None


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ({"image": 1.0}, "kind 'image' can carry loss; kinds: special, instruction, response, box, entity"),
        ({"respones": 1.0}, "no tokens of kind 'respones'"),
        ({"box": -1.0}, "the weight of box falls to -1"),
        ({"response": 0, "box": 0, "entity": 0}, "from progress 0 on every weight is 0"),
        ({"response": [[0, 1], [0.5, 0]], "box": 0, "entity": 0}, "from progress 0.5 on every weight is 0"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights, complaint):
    with pytest.raises(VlmtuneError, match=re.escape(complaint)):
        TokenWeights({name: piecewise(value) for name, value in weights.items()})


def test_the_losses_of_samples_are_told_where_somebody_asks():
    """Mean and largest of each, weights 1; not a number for one without loss; the total is as without the question."""
    asked = batch_of([[S, M, Q, R, B, R], [S, Q, U, U, P, P], [S, Q, R, R, P, P]], ["caption", "vqa", "vqa"])
    head, objective = nn.Linear(5, 7), Objective(TokenWeights({"box": piecewise(2.0)}))
    step, states = objective.weights([asked, TWO]), states_of(asked, 1, {"box": piecewise(2.0)})
    without = objective(states, head, asked, step)
    asked.numbers = [7, 4, 5]
    found = objective(states, head, asked, step).detach()
    assert without.samples is None and torch.equal(found.total, without.total)
    losses = F.cross_entropy(head(states.hidden), states.targets, reduction="none").detach()
    means, largest = found.samples
    for row in (0, 2):
        torch.testing.assert_close(means[row], losses[states.row == row].mean())
        torch.testing.assert_close(largest[row], losses[states.row == row].max())
    assert means[1].isnan() and found.numbers == [7, 4, 5]

    other = objective(states_of(TWO, 2), head, TWO, step).detach()  # nobody asked there
    told = StepLosses.of([found, other])
    assert [number for number, *_ in told.samples] == [7, 4, 5] and told.samples[2][2] == float(largest[2])
    assert told.total == pytest.approx(float(found.total + other.total))
    both = StepLosses.over_all([vars(told), vars(StepLosses.of([other]))])
    assert [number for number, *_ in both.samples] == [4, 5, 7]
