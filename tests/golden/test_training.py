"""What six steps of training give on every tiny family, recorded: a change of torch, transformers or peft, or of ours,
that moves tokens or losses shows up here, by name, before a user finds it.

After a change that is meant: `VLMTUNE_RECORD=1 python -m pytest tests/golden`, and say in the commit why they moved.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from training_setup import make_trainer, write_data

from vlmtune.models.tiny import FAMILIES

RECORDED = Path(__file__).with_name("training.json")
STEPS = 6
# float32 on another CPU: blocking and instruction sets differ, and six AdamW steps amplify rounding near zero
TOLERANCE = 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_losses_are_the_recorded_ones(family, tiny_folder, tmp_path):
    losses = []
    setup = make_trainer(tiny_folder(family), write_data(tmp_path / "data", 8), tmp_path / "run", total_steps=STEPS)
    digest = hashlib.sha256()
    for step in range(STEPS):
        batches = setup.steps[step]
        for batch in batches:
            digest.update(json.dumps([batch.inputs["input_ids"].tolist(), batch.kinds.tolist()]).encode())
        losses.append(setup.trainer.train_step(batches)["loss"])
    here = {"tokens": digest.hexdigest()[:16], "losses": [round(loss, 6) for loss in losses]}
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if os.environ.get("VLMTUNE_RECORD"):
        RECORDED.write_text(json.dumps(recorded | {family: here}, indent=1, sort_keys=True) + "\n")
        pytest.skip("recorded")
    assert here["tokens"] == recorded[family]["tokens"], "ids or kinds of the same conversations changed"
    assert here["losses"] == pytest.approx(recorded[family]["losses"], rel=TOLERANCE)
    assert losses[-1] < losses[0]
