"""The same step on a GPU as on the CPU. Skips itself without one."""

from __future__ import annotations

import pytest
import torch

from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.data.grounding import coordinates
from vlmtune.losses.objective import Objective
from vlmtune.models.load import load_model, load_processor
from vlmtune.models.vlm import VLM
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
