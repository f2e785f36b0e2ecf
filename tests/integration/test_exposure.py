"""Scheduled sampling on small models: what is read, what is predicted, and that rate 0 is teacher forcing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_setup import encode_all, encoder_of, micro_batches, write_data

from vlmtune.losses.exposure import Exposure
from vlmtune.losses.objective import Objective
from vlmtune.models.load import load_model
from vlmtune.models.vlm import VLM
from vlmtune.observe.log import read_history
from vlmtune.optim.precision import autocast
from vlmtune.step import TrainingModule
from vlmtune.types import Batch, supervised_mask

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setup(tiny_folder, tmp_path_factory):
    folder = tiny_folder("qwen2_5_vl")
    encoder = encoder_of(folder)
    encoded = encode_all(encoder, write_data(tmp_path_factory.mktemp("exposure"), 6))
    return load_model(str(folder)), encoder, micro_batches(encoder, encoded, 3)


def gradients(model, batches: list[Batch], exposure: Exposure | None, precision="fp32") -> tuple[list, dict]:
    module = TrainingModule(VLM(model), Objective(exposure=exposure))
    model.zero_grad()
    step = module.objective.weights(batches, 0.5)
    totals = []
    for batch in batches:
        with autocast(precision, CPU):
            total = module(batch, step).total
        total.backward()
        totals.append(total.detach())
    return totals, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def kept_ids(encoder) -> set[int]:
    return encoder.stop_token_ids() | encoder.image_token_ids


def test_rate_0_is_teacher_forcing_bit_for_bit(setup):
    model, encoder, batches = setup
    before = torch.get_rng_state()
    forced = gradients(model, batches, None)
    exposed = gradients(model, batches, Exposure(lambda progress: 0.0, kept_ids(encoder)))
    assert all(torch.equal(a, b) for a, b in zip(forced[0], exposed[0], strict=True))
    assert forced[1] and all(torch.equal(forced[1][name], exposed[1][name]) for name in forced[1])
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn"


def test_at_rate_1_replies_are_what_the_models_own_logits_say(setup):
    model, encoder, batches = setup
    exposure = Exposure(lambda progress: 1.0, kept_ids(encoder))
    for batch in batches:
        read = exposure.inputs(VLM(model), batch, 1.0)
        with torch.no_grad():
            said = model(**batch.inputs, use_cache=False).logits.argmax(-1)
        truth, kept = batch.inputs["input_ids"], torch.tensor(sorted(kept_ids(encoder)))
        exchanged = torch.zeros_like(truth, dtype=torch.bool)
        exchanged[:, 1:] = supervised_mask(batch.kinds[:, 1:]) & ~torch.isin(truth[:, 1:], kept)
        exchanged[:, 1:] &= ~torch.isin(said[:, :-1], kept)
        assert bool(exchanged.any()) and torch.equal(read[~exchanged], truth[~exchanged])
        assert torch.equal(read[:, 1:][exchanged[:, 1:]], said[:, :-1][exchanged[:, 1:]])


def test_what_is_predicted_stays_the_reference(setup):
    """The loss is Hugging Face's own on exchanged inputs with labels of the reference."""
    model, encoder, batches = setup
    exposure = Exposure(lambda progress: 0.5, kept_ids(encoder))
    torch.manual_seed(3)
    totals, _ = gradients(model, batches[:1], exposure)
    torch.manual_seed(3)
    read = exposure.inputs(VLM(model), batches[0], 0.5)
    truth = batches[0].inputs["input_ids"]
    assert not torch.equal(read, truth)
    labels = truth.masked_fill(~supervised_mask(batches[0].kinds), -100)
    with torch.no_grad():
        reference = model(**batches[0].inputs | {"input_ids": read}, labels=labels, use_cache=False).loss
    assert float(totals[0]) == pytest.approx(float(reference), rel=1e-5)  # sums of some tens of float32 terms


def test_the_first_pass_leaves_no_weights_without_gradient_behind_in_bf16(setup):
    """autocast keeps casts of weights; those made without gradient would cut the second pass off."""
    model, encoder, batches = setup
    torch.manual_seed(3)
    _, exposed = gradients(model, batches[:1], Exposure(lambda progress: 0.5, kept_ids(encoder)), "bf16")
    _, forced = gradients(model, batches[:1], None, "bf16")
    assert set(exposed) == set(forced)


def test_the_share_of_exchanged_tokens_is_the_rate(setup):
    model, encoder, batches = setup
    exposure = Exposure(lambda progress: 0.3, {-1})
    vlm, truth = VLM(model), batches[0].inputs["input_ids"]
    torch.manual_seed(0)
    exchanged = sum(int((exposure.inputs(vlm, batches[0], 0.3) != truth).sum()) for _ in range(40))
    possible = int((exposure.inputs(vlm, batches[0], 1.0) != truth).sum())
    share = exchanged / (40 * possible)
    assert share == pytest.approx(0.3, abs=4 * (0.21 / (40 * possible)) ** 0.5)


def trained(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "checkpoints" / "latest").glob("**/*.safetensors"))
    return {f"{file.name}:{name}": value for file in files for name, value in load_file(file).items()}


def test_a_run_logs_the_rate_prints_it_and_resumes_exactly(write_config, vlmtune):
    loss = {"exposure": {"rate": 0.5, "decay": "linear", "start": 0.2}, "balance": {"by": "uncertainty"}}
    config = write_config("run", 5, loss=loss, checkpoint={"every": 1, "keep": 5})
    code, out, err = vlmtune("train", config)
    assert (code, err) == (0, "") and "as the model predicts them: 0% at 0%, 19% at 50%, 50% at 100%" in out
    run = Path(yaml.safe_load(config.read_text())["run"])
    rates = [record["exposure"] for record in read_history(run / "history.jsonl")]
    assert rates == pytest.approx([0.0, 0.0, 0.125, 0.25, 0.375])
    whole = trained(run)
    for step in (3, 4, 5):
        shutil.rmtree(run / "checkpoints" / f"step_00000{step}")
    assert vlmtune("train", config)[0] == 0
    again = trained(run)
    assert set(again) == set(whole) and all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(
    ("exposure", "complaint"),
    [
        ({"rate": 0}, "loss.exposure.rate"),
        ({"rate": 1.5}, "loss.exposure.rate"),
        ({"k": 3}, "k means nothing with decay: linear"),
        ({"decay": "exponential", "k": 2}, "k 2 of an exponential decay is what is left at the end, below 1"),
        ({"decay": "inverse_sigmoid", "k": 0.5}, "is 1 or more"),
        ({"decay": "sigmoid"}, "loss.exposure.decay"),
        ({"probability": 0.1}, "unknown key loss.exposure.probability"),
    ],
)
def test_an_exposure_that_cannot_be_is_refused(write_config, vlmtune, exposure, complaint):
    code, _, err = vlmtune("train", write_config("run", 3, loss={"exposure": exposure}))
    assert code == 1 and complaint in err.replace("\n", " ") and "Traceback" not in err
