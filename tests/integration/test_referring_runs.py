"""Box and mask heads through the commands: trained, scored, resumed, exported, asked for masks; and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from training_setup import png

from vlmtune.data.scenes import SceneRecipe
from vlmtune.models.load import load_model
from vlmtune.observe.log import read_history

TRAIN = {"length": 4, "batch_size": 8, "micro_batch_size": 4, "precision": "fp32", "log_every": 1}
HEADS = {"match": "heads", "train": "full", "lr": 1e-3}
PLAN = [HEADS, {"match": "language", "train": "lora", "rank": 4}, {"match": "*", "train": "frozen"}]
LOSS = {
    "referring": {}, "box": {"read": "head"}, "balance": {"by": "uncertainty"}, "weights": {"box": 2},
    "exposure": {"rate": 0.5},
}  # fmt: skip


def run_of(config: Path) -> Path:
    return Path(yaml.safe_load(config.read_text())["run"])


def scenes(**options) -> dict:
    train = [{"scenes": "base", "task": task} for task in ("referring", "grounding", "vqa")]
    held_out = [{"scenes": "base", "task": "referring", "split": "val", "limit": 2}]
    return {"train": train, "eval": {"val": held_out}, "workers": 0, **options}


def trained(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "checkpoints" / "latest").glob("**/*.safetensors"))
    return {f"{file.name}:{name}": value for file in files for name, value in load_file(file).items()}


def test_heads_are_trained_with_everything_else_scored_resumed_exported_and_asked(write_config, vlmtune, tmp_path):
    config = write_config(
        "run", 4, model="embedded", data=scenes(), plan=PLAN, train=TRAIN, loss=LOSS,
        checkpoint={"every": 1, "keep": 4}, evaluate={"max_new_tokens": 4},
    )  # fmt: skip
    code, out, err = vlmtune("train", config)
    assert (code, err) == (0, "") and "per region with a mask: 1 × BCE" in out and "in these samples)" in out
    run = run_of(config)
    records = [record for record in read_history(run / "history.jsonl") if record["kind"] == "train"]
    assert {name for record in records for name in record["loss_terms"]} == {
        "box", "referring/mask", "referring/box", "referring/consistency",
    }  # fmt: skip
    metrics = json.loads((run / "summary.json").read_text())["metrics"]["val/referring"]
    assert {"mask_iou", "mask_oiou", "head_iou", "accuracy"} <= set(metrics) and 0 <= metrics["mask_iou"]["after"] <= 1
    whole = trained(run)
    assert "trained.safetensors:heads.mask.key.weight" in whole
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"step_00000{step}")
    assert vlmtune("train", config)[0] == 0
    again = trained(run)
    assert set(again) == set(whole) and all(torch.equal(whole[name], again[name]) for name in whole)

    assert vlmtune("export", run, tmp_path / "out")[0] == 0
    heads = load_file(tmp_path / "out" / "heads.safetensors")
    assert torch.equal(heads["mask.key.weight"], whole["trained.safetensors:heads.mask.key.weight"])
    assert not any(name.startswith("heads.") for name in load_model(str(tmp_path / "out")).state_dict())

    image, masks = tmp_path / "scene.png", tmp_path / "masks"
    image.write_bytes(SceneRecipe("base").sample("referring", 0, "val").images[0].source)
    ask = ["predict", image, "What is in [region]?", "--model", run, "--region", "10,10,60,60"]
    code, out, _ = vlmtune(*ask, "--masks", masks)
    assert code == 0 and "mask_0.png" in out
    mask = Image.open(masks / "mask_0.png")
    assert mask.size == (128, 128) and set(np.unique(np.asarray(mask))) <= {0, 255}
    code, _, err = vlmtune("predict", image, "Describe the image.", "--model", run, "--masks", masks)
    assert code == 1 and "nothing to give a mask of" in err.replace("\n", " ")
    code, _, err = vlmtune(*ask[:3], "--region", "10,10,60,60", "--masks", masks)
    assert code == 1 and "has no mask head; train one with loss.referring" in err.replace("\n", " ")


def rows(folder: Path, **part) -> Path:
    (folder / "a.png").write_bytes(png(0))
    Image.fromarray(np.pad(np.ones((20, 20), np.uint8), ((2, 26), (2, 42)))).save(folder / "m.png")
    Image.fromarray(np.ones((9, 9), np.uint8)).save(folder / "small.png")
    reply = [{"type": "box", "boxes": [[2, 2, 22, 22]], "masks": ["m.png"], **part}]
    user = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "where"}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": f"r{n}", "messages": messages}) + "\n" for n in range(4)))
    return path


def test_masks_of_a_file_train_on_a_model_that_writes_boxes_as_text(write_config, vlmtune, tmp_path, tiny_folder):
    data = {"train": [{"path": str(rows(tmp_path))}], "workers": 0}
    loss = {"referring": {}, "box": {"read": "head"}}
    config = write_config("run", 3, model=str(tiny_folder("qwen2_5_vl")), data=data, plan=PLAN, loss=loss)
    code, _, err = vlmtune("train", config)
    assert (code, err) == (0, "")
    terms = read_history(run_of(config) / "history.jsonl")[0]["loss_terms"]
    assert set(terms) == {"box", "referring/mask", "referring/box", "referring/consistency"}
    assert all(value > 0 for value in terms.values())


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        ({"masks": ["small.png"]}, "rows.jsonl:1 (sample r0): a mask of 9x9 pixels for an image of 64x48"),
        ({"masks": ["a.png"]}, "one channel"),
        ({"masks": ["m.png", "m.png"]}, "2 masks for 1 boxes"),
        ({"masks": "m.png"}, "'masks' is a list of paths"),
        ({"masks": ["none.png"]}, "none.png not found"),
        ({"boxes": [[22, 2, 2, 22]]}, "with x1 <= x2 and y1 <= y2"),
    ],
)
def test_masks_and_boxes_that_cannot_be_are_refused(write_config, vlmtune, tmp_path, part, complaint):
    data = {"train": [{"path": str(rows(tmp_path, **part))}], "workers": 0}
    config = write_config("run", 3, data=data, plan=PLAN, loss={"referring": {}})
    code, _, err = vlmtune("train", config)
    assert code == 1 and complaint in err.replace("\n", " ") and "Traceback" not in err


@pytest.mark.parametrize(
    ("plan", "loss", "complaint"),
    [
        (PLAN[1:], {"referring": {}}, "which is new and random; put a rule {match: heads, train: full} in front"),
        ([{"match": "*", "train": "lora"}], {"box": {"read": "head"}}, "says lora, but covers heads.box"),
        (PLAN, {}, "heads"),
        (PLAN, {"referring": {"mask": 0, "box": 0, "consistency": 0}}, "mask, box and consistency are all 0"),
        (PLAN, {"referring": {"mask": -1}}, "loss.referring.mask"),
    ],
)
def test_plans_and_losses_that_do_not_fit_are_refused(write_config, vlmtune, plan, loss, complaint):
    code, _, err = vlmtune("train", write_config("run", 3, plan=plan, loss=loss))
    assert code == 1 and complaint in err.replace("\n", " ") and "Traceback" not in err
