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
        self.seen[state.step] = float(sum(metrics["losses"].values()))

    def on_eval(self, state, metrics) -> None: ...


def with_dropout(model):
    """Dropout makes the result depend on torch's random numbers."""
    return lora_rules(model, dropout=0.2)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("llava", 0, 0), ("llava", 1, 0), ("llava", 0, 1), ("qwen2_5_vl", 0, 0), ("smolvlm", 0, 0)]
    + [pytest.param("embedded", 0, 0, marks=pytest.mark.slow)],  # 20 s: 33 steps of a real tower
)
def test_twenty_steps_are_ten_and_ten(name, first, second, model_folder, data, tmp_path):
    """The first process saves at 10, dies after step 13; the second starts afresh and continues from 10.

    first, second: loader processes before and after.
    """
    folder = model_folder(name)
    whole = Losses()
    straight = make_trainer(
        folder, data, tmp_path / "straight", with_dropout, 20, second, checkpoint_every=10, observers=[whole]
    )
    straight.trainer.fit()
    end = rng_state()

    halves = Losses()
    broken = make_trainer(
        folder, data, tmp_path / "broken", with_dropout, 20, first, checkpoint_every=10, observers=[halves, KillAt(13)]
    )
    with pytest.raises(Killed):
        broken.trainer.fit()
    resumed = make_trainer(
        folder, data, tmp_path / "broken", with_dropout, 20, second, checkpoint_every=10, observers=[halves]
    )
    torch.manual_seed(12345)  # whatever the new process drew before it resumed must not matter
    resumed.trainer.resume(tmp_path / "broken" / "step_000010")
    assert resumed.trainer.state.step == 10 and resumed.trainer.state.samples == 40
    resumed.trainer.fit()

    assert list(whole.seen) == list(range(1, 21)) and halves.seen == whole.seen
    assert len(set(whole.seen.values())) == 20
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
