"""Numbers that are not finite, parts that unfreeze, signals: what the run does, and that a resume does the same to the
last bit (SPEC D7, D8, F1, F3, F5)."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from training_setup import Setup, full_rules, lora_rules, make_trainer, snapshot

from vlmtune.checkpoint import checkpoints, read_state
from vlmtune.checks.during import LossWatch
from vlmtune.interrupt import Interrupted, StopRequest
from vlmtune.observer import Observer
from vlmtune.optim.optimizer import optimizer_tensors
from vlmtune.recovery import Recovery
from vlmtune.run import probe_of
from vlmtune.schedule import piecewise
from vlmtune.types import Batch, Finding, VlmtuneError

STEPS = 8


def with_dropout(model):
    return lora_rules(model, dropout=0.2)


def poisoned(setup: Setup, bad: set[int]) -> Setup:
    """The batches of these steps (0-based) have a NaN in an image."""
    clean = setup.trainer.steps

    def steps(start: int, stop: int) -> Iterator[list[Batch]]:
        for number, batches in zip(range(start, stop), clean(start, stop), strict=True):
            if number in bad:
                batches = list(batches)
                for batch in batches:
                    if "pixel_values" in batch.inputs:
                        batch.inputs["pixel_values"] = batch.inputs["pixel_values"].clone()
                        batch.inputs["pixel_values"][0, 0, 3, 3] = math.nan
            yield batches

    setup.trainer.steps = steps
    return setup


class Found(Observer):
    def __init__(self):
        self.findings: list[tuple[int, Finding]] = []
        self.steps: list[int] = []
        self.lr: dict[int, dict[str, float]] = {}

    def on_step(self, state, metrics) -> None:
        self.steps.append(state.step)
        if "lr" in metrics:
            self.lr[state.step] = metrics["lr"]

    def on_finding(self, state, finding: Finding) -> None:
        self.findings.append((state.step, finding))


class KillAt(Observer):
    def __init__(self, step: int, after_rewind: bool = False):
        self.step, self.is_armed = step, not after_rewind

    def on_rewind(self, state) -> None:
        self.is_armed = True

    def on_step(self, state, metrics) -> None:
        if self.is_armed and state.step == self.step:
            raise KeyboardInterrupt


def same_training(one: Setup, other: Setup) -> list[str]:
    """What differs in weights, optimizer, or where the runs stand."""
    a = snapshot(one.model) | optimizer_tensors(one.trainer.optimizer)
    b = snapshot(other.model) | optimizer_tensors(other.trainer.optimizer)
    assert set(a) == set(b)
    states = [{k: v for k, v in vars(s.trainer.state).items() if k != "seconds"} for s in (one, other)]
    assert states[0] == states[1]
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture
def make(model_folder, data, tmp_path) -> Callable[..., Setup]:
    def build(name: str, model: str = "llava", rules=with_dropout, steps: int = STEPS, every: int = 2, **more) -> Setup:
        return make_trainer(model_folder(model), data, tmp_path / name, rules, steps, checkpoint_every=every, **more)

    return build


# ---- a NaN in an image -------------------------------------------------------------------------------------------


def test_stop_updates_nothing_and_saves_what_it_has(make, tmp_path):
    """The error names the step and its samples; the checkpoint is the state before it; a resume may leave it out."""
    setup = poisoned(make("stop"), {5})
    with pytest.raises(VlmtuneError, match="step 6: not finite") as caught:
        setup.trainer.fit()
    assert "Samples of this step: s" in str(caught.value)
    newest = checkpoints(tmp_path / "stop")[-1]
    assert newest.name == "step_000005" and read_state(newest)["state"]["step"] == 5
    assert all(torch.isfinite(value).all() for value in snapshot(setup.model).values() if value.is_floating_point())
    resumed = poisoned(make("stop", parts={"recovery": Recovery("skip")}), {5})
    resumed.trainer.resume(newest)
    resumed.trainer.fit()
    at_once = poisoned(make("skip", parts={"recovery": Recovery("skip")}), {5})
    at_once.trainer.fit()
    assert same_training(resumed, at_once) == []


def test_skip_leaves_the_batch_out_and_counts_it(make):
    """The same as a run that was told beforehand to pass that step over: no trace of the bad batch."""
    found = Found()
    setup = poisoned(make("skip", observers=[found], parts={"recovery": Recovery("skip")}), {3})
    setup.trainer.fit()
    told = make("told")
    told.trainer.state.skipped.append(3)
    told.trainer.fit()
    assert same_training(setup, told) == []
    assert setup.trainer.state.skipped == [3] and setup.trainer.state.samples == 4 * STEPS
    assert found.steps == list(range(1, STEPS + 1)) and 4 not in found.lr
    assert [(step, finding.level) for step, finding in found.findings] == [(3, "warn")]


@pytest.mark.parametrize("model", ["llava", "embedded"])
def test_statistics_of_batchnorm_survive_a_bad_batch(make, model):
    """A tower in training writes NaN into its running statistics before the loss is known: they are put back."""
    setup = poisoned(make("bn", model=model, rules=full_rules, steps=3, parts={"recovery": Recovery("skip")}), {1})
    setup.trainer.fit()
    assert setup.trainer.state.skipped == [1]
    assert all(torch.isfinite(value).all() for value in snapshot(setup.model).values() if value.is_floating_point())


def test_the_limit_stops_a_run_that_is_mended_too_often(make):
    setup = poisoned(make("limit", parts={"recovery": Recovery("skip", limit=2)}), {1, 2, 4})
    with pytest.raises(VlmtuneError, match="2 batches were left out already"):
        setup.trainer.fit()
    assert setup.trainer.state.skipped == [1, 2]


def test_rewind_goes_back_with_half_the_learning_rate(make):
    found = Found()
    recovery = Recovery("rewind", lr_factor=0.5)
    setup = poisoned(make("rewind", observers=[found], parts={"recovery": recovery}), {5})
    setup.trainer.fit()
    state = setup.trainer.state
    assert found.steps == [1, 2, 3, 4, 5, 5, 6, 7, 8], "from step 4 again, without the batch of step 6"
    assert state.rewinds == [[5, 4]] and state.skipped == [5] and state.lr_scale == 0.5
    reference = Found()
    make("plain", observers=[reference]).trainer.fit()
    for step in (5, 7, 8):
        assert found.lr[step] == {rule: pytest.approx(lr / 2) for rule, lr in reference.lr[step].items()}
    assert "continues from step 4 with 0.5 x" in found.findings[-1][1].remedy


def test_a_bad_first_step_has_something_to_go_back_to(make):
    setup = poisoned(make("first", parts={"recovery": Recovery("rewind")}), {0})
    setup.trainer.fit()
    assert setup.trainer.state.rewinds == [[0, 0]] and setup.trainer.state.step == STEPS


@pytest.mark.parametrize("kill", [5, 7])
def test_a_rewound_run_resumes_bit_for_bit(make, tmp_path, kill):
    """Killed after it went back, before and after the next checkpoint."""
    recovery = {"recovery": Recovery("rewind", lr_factor=0.25)}
    whole = poisoned(make("whole", parts=recovery), {5})
    whole.trainer.fit()
    broken = poisoned(make("broken", observers=[KillAt(kill, after_rewind=True)], parts=recovery), {5})
    with pytest.raises(KeyboardInterrupt):
        broken.trainer.fit()
    resumed = poisoned(make("broken", parts=recovery), {5})
    resumed.trainer.resume(checkpoints(tmp_path / "broken")[-1])
    assert resumed.trainer.state.lr_scale == 0.25
    resumed.trainer.fit()
    assert same_training(whole, resumed) == []


def test_a_loss_that_jumps_takes_the_run_back(make):
    """The weights are shaken in the middle of the run; the watch sees the loss, and the run goes back behind it."""

    class Shake(Observer):
        done = False

        def on_step(self, state, metrics) -> None:
            if state.step == 25 and not Shake.done:
                Shake.done = True
                with torch.no_grad():
                    setup.model.get_output_embeddings().weight.mul_(300)

    found = Found()
    setup = make(
        "jump", rules=full_rules, steps=32, every=8, observers=[Shake(), found],
        parts={"recovery": Recovery("stop", "rewind")},
    )  # fmt: skip
    setup.trainer.fit()
    assert setup.trainer.state.rewinds == [[25, 24]], "the loss of step 26 jumps: back to the checkpoint of step 24"
    assert max(found.steps) == 32 and found.steps.count(25) == 2


def test_a_jump_is_only_reported_by_default(make):
    found = Found()
    setup = make("warn", observers=[found])
    watch = LossWatch()
    for _ in range(40):
        watch.observe(0.01)  # as if the run had come from a much lower loss
    setup.trainer.watch = watch
    setup.trainer.fit()
    assert found.findings and not setup.trainer.state.rewinds and setup.trainer.state.step == STEPS


WORSE = "the model is worse than before training"


@pytest.fixture
def probed(make) -> Callable[..., Setup]:
    """A run with stored samples, at any learning rate."""

    def build(name: str, lr: float, spikes: str = "rewind", **more) -> Setup:
        recovery = {"recovery": Recovery("stop", spikes, limit=20)}
        setup = make(name, rules=lambda model: full_rules(model, lr), parts=recovery, **more)
        setup.trainer.soundness.probe = probe_of(setup.steps)
        return setup

    return build


def test_a_rate_that_ruins_the_model_at_once_takes_the_run_back(probed):
    """The stored samples tell after the first step, where no loss of a step can; the run ends at a rate that works."""
    found = Found()
    setup = probed("ruin", 3.0, observers=[found])
    setup.trainer.fit()
    state = setup.trainer.state
    assert state.rewinds[0] == [0, 0] and state.lr_scale == 0.5 ** len(state.rewinds) and state.step == STEPS
    assert {finding.what for _, finding in found.findings} == {"the run went back"}
    assert WORSE in found.findings[0][1].evidence
    untrained = probed("untrained", 0.0).trainer
    before, after = (sum(t.soundness.probe.losses(t.model, "fp32")) / 3 for t in (untrained, setup.trainer))
    assert after < max(1.5 * before, before + 0.5)


def test_a_ruined_model_is_reported_once_by_default(probed):
    found = Found()
    setup = probed("warn", 3.0, "warn", observers=[found])
    setup.trainer.fit()
    assert [(step, finding.what) for step, finding in found.findings if finding.what == WORSE] == [(1, WORSE)]
    assert not setup.trainer.state.rewinds


def test_the_stored_samples_say_nothing_of_a_healthy_run_and_change_nothing(probed, make):
    found = Found()
    setup = probed("healthy", 1e-3, observers=[found])
    setup.trainer.fit()
    assert found.findings == []
    plain = make("plain", rules=full_rules)
    plain.trainer.fit()
    trained, reference = snapshot(setup.model), snapshot(plain.model)
    assert [name for name in reference if not torch.equal(trained[name], reference[name])] == []


@pytest.mark.parametrize("kill", [3, 7])
def test_a_run_that_went_back_from_ruin_resumes_bit_for_bit(probed, tmp_path, kill):
    whole = probed("whole", 3.0)
    whole.trainer.fit()
    broken = probed("broken", 3.0, observers=[KillAt(kill, after_rewind=True)])
    with pytest.raises(KeyboardInterrupt):
        broken.trainer.fit()
    resumed = probed("broken", 3.0)
    resumed.trainer.resume(checkpoints(tmp_path / "broken")[-1])
    resumed.trainer.fit()
    assert same_training(whole, resumed) == []


def ruin(setup: Setup, at: int) -> None:
    """After step `at` the head holds numbers whose products are infinite."""

    class Ruin(Observer):
        def on_step(self, state, metrics) -> None:
            if state.step == at and not state.rewinds:
                with torch.no_grad():
                    setup.model.get_output_embeddings().weight.fill_(3e38)

    setup.trainer.observers = [*setup.trainer.observers, Ruin()]


def with_policy(probed, name: str, nonfinite: str) -> Setup:
    setup = probed(name, 1e-3)
    setup.trainer.recovery = Recovery(nonfinite)
    return setup


@pytest.mark.parametrize("at", [3, 4])  # seen in the loss of the next step, or in the stored samples
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_ruined_weights_stop_the_run_and_are_never_saved(probed, tmp_path, policy, at):
    """No batch is to blame, so leaving batches out would go on for ever."""
    setup = with_policy(probed, "ruined", policy)
    ruin(setup, at)
    with pytest.raises(VlmtuneError, match="The weights themselves give no finite loss any more") as caught:
        setup.trainer.fit()
    assert "step_000002 is the newest" in str(caught.value) and "nonfinite=rewind" in str(caught.value)
    assert checkpoints(tmp_path / "ruined")[-1].name == "step_000002"
    resumed = with_policy(probed, "ruined", "rewind")
    resumed.trainer.resume(checkpoints(tmp_path / "ruined")[-1])
    resumed.trainer.fit()
    assert resumed.trainer.state.step == STEPS


@pytest.mark.parametrize("at", [3, 4])
def test_ruined_weights_take_a_run_back_that_may(probed, at):
    setup = with_policy(probed, "ruined", "rewind")
    ruin(setup, at)
    setup.trainer.fit()
    state = setup.trainer.state
    assert state.step == STEPS and len(state.rewinds) == 1 and state.rewinds[0][1] == 2
    assert [past.step for past in setup.trainer.history] == [n + 1 for n in range(STEPS) if n not in state.skipped]


# ---- unfreezing --------------------------------------------------------------------------------------------------


OVER = {"language": piecewise([[0, 0], [0.5, 1.0], [0.75, 0.1]])}


def test_unfreezing_starts_where_it_says(make):
    """Frozen: bit-identical weights and no optimizer state. Then a fresh state and a warmup of its own, and 0.1x."""
    found = Found()
    setup = make("unfreeze", over=OVER, observers=[found], steps=8)
    before = snapshot(setup.model)
    trainer = setup.trainer
    names = {name for name in setup.plan.parameters if setup.plan.rule_of[name] == "language"}

    class Look(Observer):
        def on_step(self, state, metrics) -> None:
            if state.step == 4:
                changed = [n for n, v in snapshot(setup.model).items() if not torch.equal(v, before[n])]
                assert changed and not any("lora" in name for name in changed)
                assert not names & {name.rpartition("/")[0] for name in optimizer_tensors(trainer.optimizer)}

    trainer.observers = [found, Look()]
    trainer.fit()
    counts = {n: float(v) for n, v in optimizer_tensors(trainer.optimizer).items() if n.endswith("/step")}
    assert {counts[f"{name}/step"] for name in names} == {4} and 8 in counts.values()
    assert [found.lr[step]["language"] for step in (1, 4)] == [0, 0]
    plain = Found()
    make("plain", observers=[plain]).trainer.fit()
    ratio = {step: found.lr[step]["language"] / plain.lr[step]["language"] for step in range(5, 9)}
    assert ratio == pytest.approx({5: 0.5, 6: 1.0, 7: 0.1, 8: 0.1})
    assert all(found.lr[step]["projector"] == plain.lr[step]["projector"] for step in range(1, 9))


def test_unfreezing_is_exact_under_resume_at_every_step(make, tmp_path):
    """A run of 8 steps that unfreezes at step 5, continued from each of its checkpoints."""
    whole = make("whole", over=OVER, every=1, keep=99)
    whole.trainer.fit()
    for checkpoint in checkpoints(tmp_path / "whole")[:-1]:
        resumed = make(f"from_{checkpoint.name}", over=OVER, every=99)
        resumed.trainer.resume(checkpoint)
        resumed.trainer.fit()
        assert same_training(whole, resumed) == [], checkpoint.name


@pytest.mark.parametrize("told", [False, True])
def test_a_batch_left_out_where_a_phase_begins_does_not_stop_the_phase(make, told):
    """The step at which a rule starts to train is skipped, when it fails or because a resume knows: it trains after."""
    setup = make("edge", over=OVER, parts={"recovery": Recovery("skip")})
    if told:
        setup.trainer.state.skipped.append(4)
    else:
        poisoned(setup, {4})
    setup.trainer.fit()
    assert setup.trainer.state.skipped == [4]
    counts = {n: float(v) for n, v in optimizer_tensors(setup.trainer.optimizer).items() if n.endswith("/step")}
    assert {counts[f"{name}/step"] for name in setup.plan.parameters if setup.plan.rule_of[name] == "language"} == {3}


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_unfreezing_does_not_depend_on_accumulation(make, micro_batch_size):
    """float32 sums in another order, through 8 AdamW steps that magnify the smallest gradients: 2e-3 of a weight."""
    one = make("one", rules=lora_rules, over=OVER)
    other = make("other", rules=lora_rules, over=OVER, micro_batch_size=micro_batch_size)
    one.trainer.fit(), other.trainer.fit()
    for name, parameter in one.plan.parameters.items():
        torch.testing.assert_close(parameter, other.plan.parameters[name], atol=2e-3, rtol=2e-3)


def test_a_batchnorm_that_unfreezes_saves_its_statistics(make, tmp_path):
    """The tower of the embedded model from the middle on: resumed before and after, bit for bit."""
    over = {"vision": piecewise([[0, 0], [0.5, 1.0]])}
    whole = make("whole", model="embedded", rules=full_rules, steps=4, every=1, keep=99, over=over)
    statistics = {n: v.clone() for n, v in snapshot(whole.model).items() if n.endswith("running_mean")}
    whole.trainer.fit()
    after = snapshot(whole.model)
    assert statistics and any(not torch.equal(after[name], value) for name, value in statistics.items())
    for step in (1, 3):
        resumed = make(f"from_{step}", model="embedded", rules=full_rules, steps=4, every=99, over=over)
        resumed.trainer.resume(tmp_path / "whole" / f"step_{step:06d}")
        resumed.trainer.fit()
        assert same_training(whole, resumed) == []


# ---- float16 -----------------------------------------------------------------------------------------------------


def test_an_overflow_of_float16_halves_the_scale_and_updates_nothing(make):
    """A loss scale that is far too large: the first steps overflow, then training goes on, as GradScaler does it."""
    setup = make("fp16", steps=6, precision="fp16")
    setup.trainer.scale.value = 2.0**19
    setup.trainer.fit()
    state = setup.trainer.state
    assert 1 <= state.overflows < 6 and setup.trainer.scale.value == 2.0 ** (19 - state.overflows)
    counts = {float(v) for n, v in optimizer_tensors(setup.trainer.optimizer).items() if n.endswith("/step")}
    assert counts == {6 - state.overflows}


def test_float16_resumes_with_its_scale(make, tmp_path):
    whole = make("whole", steps=6, precision="fp16")
    whole.trainer.scale.value = 2.0**19
    whole.trainer.fit()
    broken = make("broken", steps=6, precision="fp16", observers=[KillAt(5)])
    broken.trainer.scale.value = 2.0**19
    with pytest.raises(KeyboardInterrupt):
        broken.trainer.fit()
    resumed = make("broken", steps=6, precision="fp16")
    resumed.trainer.resume(checkpoints(tmp_path / "broken")[-1])
    resumed.trainer.fit()
    assert same_training(whole, resumed) == [] and resumed.trainer.scale == whole.trainer.scale


# ---- early stopping and signals ----------------------------------------------------------------------------------


def scores(values: list[float]) -> Callable[[int], dict[str, float]]:
    """An evaluation that reports these losses, at steps 2, 4, …"""
    return lambda step: {"loss": values[step // 2 - 1]}


def test_patience_counts_evaluations_that_are_not_better_by_delta(make, tmp_path):
    """2.0, 1.0 better; 0.95 not by 0.1, 0.92 neither: two in a row. The best is still the lowest."""
    parts = {"evaluate": scores([2.0, 1.0, 0.95, 0.92, 0.1, 0.1])}
    setup = make("early", steps=14, eval_every=2, patience=2, delta=0.1, parts=parts)
    state = setup.trainer.fit()
    assert state.step == 8 and "not better than 1 by 0.1 (checkpoint.delta) for 2 eval" in state.stopped
    assert state.best == 0.92 and state.best_step == 8
    again = make("early", steps=14, eval_every=2, patience=2, delta=0.1, parts=parts)
    again.trainer.resume(checkpoints(tmp_path / "early")[-1])
    assert again.trainer.fit().step == 8, "a run that stopped early does not go on when it is started again"
    patient = make("early", steps=14, eval_every=2, patience=3, delta=0.1, parts=parts)
    patient.trainer.resume(checkpoints(tmp_path / "early")[-1])
    assert patient.trainer.fit().step == 14 and patient.trainer.state.stopped is None, "the fifth one is better"


def test_patience_survives_a_resume(make, tmp_path):
    parts = {"evaluate": scores([2.0, 1.0, 1.5, 1.5, 1.5, 1.5])}
    setup = make("waits", steps=14, eval_every=2, patience=3, parts=parts, observers=[KillAt(7)])
    with pytest.raises(KeyboardInterrupt):
        setup.trainer.fit()
    resumed = make("waits", steps=14, eval_every=2, patience=3, parts=parts)
    resumed.trainer.resume(checkpoints(tmp_path / "waits")[-1])
    assert resumed.trainer.state.waited == 1
    assert resumed.trainer.fit().step == 10


class SignalAt(Observer):
    def __init__(self, step: int, number: int = signal.SIGTERM):
        self.step, self.number = step, number

    def on_step(self, state, metrics) -> None:
        if state.step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_signal_in_any_step_ends_after_it_with_a_checkpoint(make, tmp_path, step):
    whole = make("whole", every=3)
    whole.trainer.fit()
    with StopRequest().listening() as stop:
        stopped = make("stopped", every=3, observers=[SignalAt(step)], parts={"stop": stop})
        with pytest.raises(Interrupted, match=f"a checkpoint of step {step} is written"):
            stopped.trainer.fit()
    newest = checkpoints(tmp_path / "stopped")[-1]
    assert newest.name == f"step_{step:06d}"
    resumed = make("stopped", every=3)
    resumed.trainer.resume(newest)
    resumed.trainer.fit()
    assert same_training(whole, resumed) == []


def test_a_signal_during_an_evaluation_breaks_it_off_and_it_is_made_again(make, tmp_path):
    """Nothing of the broken evaluation counts; the resume evaluates first, and ends as a run without the signal."""
    called: list[int] = []

    def evaluate(step: int) -> dict[str, float]:
        called.append(step)
        if called == [2, 4]:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0 / step}

    with StopRequest().listening() as stop:
        stopped = make("eval", eval_every=2, every=3, parts={"evaluate": evaluate, "stop": stop})
        with pytest.raises(Interrupted, match="a checkpoint of step 4 is written"):
            stopped.trainer.fit()
    resumed = make("eval", eval_every=2, every=3, parts={"evaluate": evaluate})
    resumed.trainer.resume(checkpoints(tmp_path / "eval")[-1])
    assert resumed.trainer.state.best_step == 2
    resumed.trainer.fit()
    assert called == [2, 4, 4, 6]
    whole = make("whole", eval_every=2, every=3, parts={"evaluate": lambda step: {"loss": 1.0 / step}})
    whole.trainer.fit()
    assert same_training(whole, resumed) == []


def test_every_step_of_a_short_run_resumes(make, tmp_path):
    whole = make("whole", every=1, keep=99)
    whole.trainer.fit()
    folders: list[Path] = checkpoints(tmp_path / "whole")
    assert len(folders) == STEPS
    for checkpoint in folders[:-1]:
        resumed = make(f"from_{checkpoint.name}", every=99)
        resumed.trainer.resume(checkpoint)
        resumed.trainer.fit()
        assert same_training(whole, resumed) == [], checkpoint.name
