"""Class 5: a run to 20 = a run to 10 + kill + resume, bit for bit: weights, optimizer, random numbers, history."""

from __future__ import annotations

import pytest
import torch
from training_setup import lora_rules, make_trainer, snapshot

from vlmtune.checkpoint import rng_state
from vlmtune.optim.optimizer import optimizer_tensors


class Killed(Exception):
    pass


class KillAt:
    """Stops the run in the middle of step `step`, after the update and before anything is saved."""

    def __init__(self, step: int):
        self.step = step

    def on_step(self, state, metrics) -> None:
        if state.step == self.step:
            raise Killed

    def on_eval(self, state, metrics) -> None: ...


class Losses:
    def __init__(self):
        self.seen: dict[int, float] = {}

    def on_step(self, state, metrics) -> None:
        self.seen[state.step] = metrics["loss"]

    def on_eval(self, state, metrics) -> None: ...


def with_dropout(model):
    """Dropout makes the result depend on torch's random numbers."""
    return lora_rules(model, dropout=0.2)


@pytest.mark.parametrize(
    ("name", "total", "first", "second"),
    [("llava", 20, 0, 0), ("llava", 6, 1, 0), ("llava", 6, 0, 1), ("qwen2_5_vl", 6, 0, 0), ("smolvlm", 6, 0, 0)]
    + [pytest.param("embedded", 20, 0, 0, marks=pytest.mark.slow)],  # 20 s: 33 steps of a real tower
)
def test_the_whole_run_is_its_two_halves(name, total, first, second, model_folder, data, tmp_path):
    """The first process saves half-way and dies two steps later; the second starts afresh and continues from there.

    first, second: loader processes before and after.
    """
    half = total // 2
    folder = model_folder(name)
    whole = Losses()
    straight = make_trainer(
        folder, data, tmp_path / "straight", with_dropout, total, second, checkpoint_every=half, observers=[whole]
    )
    straight.trainer.fit()
    end = rng_state()

    halves = Losses()
    broken = make_trainer(
        folder,
        data,
        tmp_path / "broken",
        with_dropout,
        total,
        first,
        checkpoint_every=half,
        observers=[halves, KillAt(half + 2)],
    )
    with pytest.raises(Killed):
        broken.trainer.fit()
    resumed = make_trainer(
        folder, data, tmp_path / "broken", with_dropout, total, second, checkpoint_every=half, observers=[halves]
    )
    torch.manual_seed(12345)  # whatever the new process drew before it resumed must not matter
    resumed.trainer.resume(tmp_path / "broken" / f"step_{half:06d}")
    assert resumed.trainer.state.step == half and resumed.trainer.state.samples == 4 * half
    resumed.trainer.fit()

    assert list(whole.seen) == list(range(1, total + 1)) and halves.seen == whole.seen
    assert len(set(whole.seen.values())) == total
    one, other = snapshot(straight.model), snapshot(resumed.model)
    assert set(one) == set(other) and [key for key in one if not torch.equal(one[key], other[key])] == []
    one, other = optimizer_tensors(straight.trainer.optimizer), optimizer_tensors(resumed.trainer.optimizer)
    assert set(one) == set(other) and len(one) == 3 * len(straight.plan.parameters)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert rng_state() == end
    assert straight.trainer.state.tokens == resumed.trainer.state.tokens


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_worker_count_changes_nothing(model_folder, data, tmp_path):
    ends = []
    for workers in (0, 1, 2):
        setup = make_trainer(model_folder("llava"), data, tmp_path / str(workers), with_dropout, 6, workers)
        setup.trainer.fit()
        ends.append((snapshot(setup.model), rng_state()["torch"]))
    for weights, rng in ends[1:]:
        assert rng == ends[0][1]
        assert [key for key in weights if not torch.equal(weights[key], ends[0][0][key])] == []
