"""The same step on a GPU as on the CPU. Skips itself without one."""

from __future__ import annotations

import pytest
import torch
from training_setup import encoder_of, gradient_gap, lora_rules, write_data

from vlmtune.adapt.fused import use_fused
from vlmtune.adapt.plan import apply_plan
from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.grounding import coordinates
from vlmtune.data.sources import FileSource
from vlmtune.losses.objective import Objective
from vlmtune.models.load import load_model, load_processor
from vlmtune.models.packing import packing_refusal, use_packed_attention
from vlmtune.models.vlm import VLM
from vlmtune.optim.precision import autocast
from vlmtune.types import Sample, Text, Turn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_loss_and_gradients_equal_those_of_the_cpu(tiny_folder, family):
    folder = str(tiny_folder(family))
    encoder = Encoder(load_processor(folder), coordinates("norm1000"))
    turns = (Turn("user", (Text("what color is the circle"),)), Turn("assistant", (Text("the circle is red"),)))
    batch = collate([encoder.encode(Sample("a", turns))], encoder.pad_token_id)
    results = {}
    for device in (torch.device("cpu"), torch.device("cuda")):
        vlm = VLM(load_model(folder).to(device))
        objective = Objective()
        weights = objective.weights([batch])
        loss = objective(vlm(batch.to(device)), vlm.head, batch.to(device), weights).total
        loss.backward()
        gradient = vlm.model.get_input_embeddings().weight.grad
        results[device.type] = loss.item(), gradient.cpu()
    # float32 on both; TF32 is off by default, sums run in another order
    assert results["cuda"][0] == pytest.approx(results["cpu"][0], rel=1e-5)
    torch.testing.assert_close(results["cuda"][1], results["cpu"][1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_less_work_gives_the_same_step(tiny_folder, family, precision, tmp_path):
    """Packed and exchanged modules on the GPU against the model's own, with images and unequal lengths."""
    folder = tiny_folder(family)
    encoder, source = encoder_of(folder), FileSource(write_data(tmp_path, 6))
    batch = collate([encoder.encode(source[n]) for n in range(6)], encoder.pad_token_id).to(torch.device("cuda"))
    model = load_model(str(folder)).to("cuda")
    apply_plan(model, lora_rules(model), str(folder), seed=0)

    def step() -> tuple[float, dict[str, torch.Tensor]]:
        objective, vlm = Objective(), VLM(model)
        model.zero_grad()
        weights = objective.weights([batch])
        with autocast(precision, batch.kinds.device):
            loss = objective(vlm(batch), vlm.head, batch, weights).total
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.eval()
    loss, gradients = step()
    use_fused(model)
    if packing_refusal(model) is None:
        use_packed_attention(model)
    fast_loss, of_fast = step()
    # float32: other orders of summation; bf16: epsilon 4e-3 through 4 layers, rounded at other places
    assert fast_loss == pytest.approx(loss, rel=1e-5 if precision == "fp32" else 2e-2)
    assert gradient_gap(gradients, of_fast) < (1e-3 if precision == "fp32" else 0.1)
