"""What threatens a long run, on a GPU: short formats, numbers that are not finite, ids beyond the vocabulary, waits for
the device. Skips itself without one."""

from __future__ import annotations

import io
import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from cuda_setup import run_of
from rich.console import Console
from safetensors.torch import load_file, save_file
from training_setup import make_trainer, write_data

from vlmtune.checkpoint import read_state
from vlmtune.doctor import examine
from vlmtune.observe.log import read_history
from vlmtune.observer import Observer
from vlmtune.optim.precision import LossScale
from vlmtune.types import VlmtuneError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def losses_of(run: Path) -> list[float]:
    return [record["loss"] for record in read_history(run / "history.jsonl") if record.get("loss") is not None]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_continues_from_a_checkpoint(precision, tiny_folder, tmp_path):
    sections = {"train": {"precision": precision}, "checkpoint": {"every": "2 steps", "keep": 5}}
    run = run_of(tiny_folder("llava"), tmp_path, **sections)
    whole = losses_of(run)
    assert len(whole) == 4
    newest = run / "checkpoints" / "step_000004"
    scale = read_state(newest)["state"]["loss_scale"]
    assert (scale is not None) == (precision == "fp16")
    shutil.rmtree(newest)
    run_of(tiny_folder("llava"), tmp_path, **sections)
    # sums run in another order each time (atomic additions), and bf16 rounds what comes of it
    assert losses_of(run) == pytest.approx(whole, rel=1e-4 if precision == "fp32" else 2e-2)
    assert read_state(newest)["state"]["loss_scale"] == scale


def test_float16_lowers_its_scale_until_the_gradients_fit(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(LossScale, "of", lambda precision: LossScale(value=2.0**30))
    run = run_of(tiny_folder("llava"), tmp_path, train={"precision": "fp16", "length": "20 steps"})
    state = read_state(run / "checkpoints" / "latest")["state"]
    assert 0 < state["overflows"] < 20 and state["loss_scale"]["value"] == 2.0 ** (30 - state["overflows"])


def poisoned(folder: Path, to: Path) -> Path:
    """A copy of a model folder with one NaN in the second decoder layer's MLP."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    (name,) = [name for name in tensors if "layers.1.mlp.down_proj.weight" in name and "vision" not in name]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def test_the_first_module_that_is_not_finite_is_named_and_doctor_repeats_it(tiny_folder, tmp_path):
    model = poisoned(tiny_folder("llava"), tmp_path / "model")
    with pytest.raises(VlmtuneError, match="layers.1.mlp"):
        run_of(model, tmp_path)
    said = io.StringIO()
    assert examine(tmp_path / "run", Console(file=said, width=200)) == 1
    assert "layers.1.mlp" in said.getvalue()
    assert torch.ones(2, device="cuda").sum().item() == 2, "the device is usable after it"


def test_ids_beyond_the_vocabulary_do_not_break_the_device(tiny_folder, tmp_path):
    setup = make_trainer(tiny_folder("llava"), write_data(tmp_path / "data", 8), tmp_path / "run", device="cuda")
    batches = next(iter(setup.trainer.steps(0, 1)))
    batches[0].inputs["input_ids"][0, 0] = 10**6
    setup.trainer.steps = lambda start, stop: iter([batches])
    with pytest.raises(VlmtuneError, match="1000000"):
        setup.trainer.fit()
    assert torch.ones(2, device="cuda").sum().item() == 2


class Waits(Observer):
    """Where vlmtune's own code waited for the device, step by step: file -> times."""

    def __init__(self, caught: list):
        self.caught, self.by_step, self.seen = caught, [], 0

    def on_step(self, state, metrics) -> None:
        said = [w for w in self.caught[self.seen :] if "synchronizing CUDA operation" in str(w.message)]
        self.by_step.append(dict(Counter(Path(w.filename).name for w in said if "/vlmtune/" in w.filename)))
        self.seen = len(self.caught)


def test_watching_every_parameter_waits_for_the_device_once(tiny_folder, tmp_path):
    """SPEC D5: one host sync per logging step."""
    data = write_data(tmp_path / "data", 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        waits = Waits(caught)
        setup = make_trainer(
            tiny_folder("llava"), data, tmp_path / "run", device="cuda", observers=[waits], total_steps=12,
            checkpoint_every=100, statistics_every=4,
        )  # fmt: skip
        batches = next(iter(setup.trainer.steps(0, 1)))
        setup.trainer.steps = lambda start, stop: iter([batches] * (stop - start))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            setup.trainer.fit()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # each of two micro-batches waits for the number of its supervised tokens; the step for all losses and all norms
    plain = {"vlm.py": 2, "step.py": 1, "trainer.py": 1}
    measured = [number % 4 == 3 for number in range(1, 12)]  # step 0 checks besides that every gradient is there
    assert waits.by_step[1:] == [plain | ({"statistics.py": 1} if yes else {}) for yes in measured]
