"""Sums over the global weight: terms by task add up to the mean token loss of the whole step (DESIGN idea 2)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlmtune.losses.objective import Objective
from vlmtune.models.vlm import Supervised
from vlmtune.types import Batch, Kind, supervised_mask

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


def states_of(batch: Batch, seed: int) -> Supervised:
    carries = supervised_mask(batch.kinds[:, 1:])
    row = torch.arange(len(batch.kinds)).unsqueeze(1).expand_as(carries)[carries]
    hidden = torch.randn(int(carries.sum()), 5, generator=torch.Generator().manual_seed(seed))
    return Supervised(hidden, batch.inputs["input_ids"][:, 1:][carries], batch.kinds[:, 1:][carries], row)


ONE = batch_of([[S, M, Q, R, R, R], [S, Q, U, R, P, P]], ["caption", "vqa"])
TWO = batch_of([[S, Q, B, E, S, Q, R]], ["caption"])


def test_weights_count_supervised_tokens_by_task():
    """Replies, boxes and entities count; instructions, images, padding and `train: false` replies do not."""
    assert Objective().weights([ONE, TWO]) == {"caption": 3 + 3, "vqa": 1}


def test_a_first_token_is_never_predicted():
    assert Objective().weights([batch_of([[R, R, R]], ["caption"])]) == {"caption": 2}


@torch.no_grad()
def test_terms_of_all_micro_batches_add_up_to_the_mean():
    """The mean over tokens of the step, not a mean of the micro-batches' means, which would be another number."""
    head, objective = nn.Linear(5, 7), Objective()
    weights = objective.weights([ONE, TWO])
    states = [states_of(ONE, 1), states_of(TWO, 2)]
    terms = [objective(s, head, b, weights) for s, b in zip(states, (ONE, TWO), strict=True)]
    assert [sorted(t) for t in terms] == [["language/caption", "language/vqa"], ["language/caption"]]
    total = sum(value for term in terms for value in term.values())
    means = [F.cross_entropy(head(s.hidden), s.targets) for s in states]
    joint = F.cross_entropy(head(torch.cat([s.hidden for s in states])), torch.cat([s.targets for s in states]))
    # float32 sums of 7 numbers of order 1
    assert float(total) == pytest.approx(float(joint), rel=1e-6)
    assert float(total) != pytest.approx(float(sum(means) / 2), rel=1e-3)
    vqa = F.cross_entropy(head(states[0].hidden[states[0].row == 1]), states[0].targets[states[0].row == 1])
    assert float(terms[0]["language/vqa"]) == pytest.approx(float(vqa) / 7, rel=1e-6)
