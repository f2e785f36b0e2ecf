"""The loss section of a config through `vlmtune train`: weights by kind, balances between tasks, saved and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_setup import write_data

from vlmtune.observe.log import read_history

BALANCES = {
    "tokens": {"by": "tokens"},
    "fixed": {"by": "fixed", "weights": {"caption": 0.2, "vqa": 1.0}},
    "inverse": {"by": "inverse", "initial_steps": 1},
    "uncertainty": {"by": "uncertainty", "lr": 0.1},
    "gradnorm": {"by": "gradnorm", "initial_steps": 1, "lr": 0.1},
}


def run_of(config: Path) -> Path:
    return Path(yaml.safe_load(config.read_text())["run"])


def tensors(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "checkpoints" / "latest").glob("**/*.safetensors"))
    return {f"{file.name}:{name}": value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize("by", BALANCES)
def test_a_balance_moves_weights_is_logged_and_resumes_exactly(by, write_config, vlmtune):
    config = write_config("run", 5, loss={"balance": BALANCES[by]}, checkpoint={"every": 1, "keep": 5})
    code, out, err = vlmtune("train", config)
    assert (code, err) == (0, "") and "what the loss counts" in out
    run = run_of(config)
    history = read_history(run / "history.jsonl")
    weights = [record["task_weights"] for record in history]
    assert by == "tokens" or all(set(w) == {"caption", "vqa"} for w in weights)
    if by == "fixed":
        assert weights == [{"caption": 0.2, "vqa": 1.0}] * 5
    elif by == "tokens":
        assert all(sum(w.values()) == pytest.approx(1) for w in weights)
    else:
        assert weights[0]["caption"] == weights[0]["vqa"] != weights[-1]["caption"] != weights[-1]["vqa"]
        assert any(name.startswith("objective.safetensors:") for name in tensors(run))
    whole = tensors(run)
    for step in (4, 5):
        shutil.rmtree(run / "checkpoints" / f"step_00000{step}")
    assert vlmtune("train", config)[0] == 0
    again = tensors(run)
    assert set(again) == set(whole) and all(torch.equal(whole[name], again[name]) for name in whole)
    assert [r["task_weights"] for r in read_history(run / "history.jsonl")] == weights


@pytest.mark.slow
def test_balances_train_to_different_weights(write_config, vlmtune):
    ends = {}
    for by, wish in BALANCES.items():
        config = write_config(by, 4, loss={"balance": wish})
        assert vlmtune("train", config)[0] == 0
        ends[by] = tensors(run_of(config))["trained.safetensors:projector.linear_1.weight"]
    names = list(ends)
    assert not any(torch.equal(ends[a], ends[b]) for n, a in enumerate(names) for b in names[:n])


def test_accumulation_changes_nothing(write_config, vlmtune):
    """4 samples at once or one by one: the same step, for the balance that looks into gradients too."""
    losses = []
    for size in (4, 1):
        wish = {"weights": {"instruction": 0.3}, "balance": BALANCES["gradnorm"]}
        train = {"length": 4, "batch_size": 4, "micro_batch_size": size, "precision": "fp32", "log_every": 1}
        plan = [
            {"match": "vision", "train": "frozen"}, {"match": "projector", "train": "full"},
            {"match": "language", "train": "lora", "rank": 4}, {"match": "*", "train": "frozen"},
        ]  # fmt: skip
        config = write_config(f"of{size}", 4, loss=wish, train=train, plan=plan)
        assert vlmtune("train", config)[0] == 0
        losses.append([(r["loss"], r["task_weights"]) for r in read_history(run_of(config) / "history.jsonl")])
    # float32: sums in another order, amplified by four AdamW steps
    for (one, first), (other, second) in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=1e-4) and first == pytest.approx(second, rel=1e-3)


def test_weights_by_kind_follow_their_schedule(write_config, tmp_path, vlmtune):
    """Instructions weigh 1, then 0: the loss is over other tokens, and the plain loss says so."""
    rows = write_data(tmp_path / "data", 4)
    wish = {"weights": {"instruction": [[0, 1.0], [0.5, 0.0]], "response": 2.0}}
    config = write_config("run", 4, loss=wish, data={"train": [{"path": str(rows)}], "workers": 0})
    code, out, _ = vlmtune("train", config)
    assert code == 0 and "1, 0 from 50%" in out.replace("\n", " ")
    history = read_history(run_of(config) / "history.jsonl")
    supervised = [r["supervised_tokens_per_second"] / r["tokens_per_second"] for r in history]
    assert supervised[:2] == pytest.approx([supervised[0]] * 2)  # one epoch per step
    assert supervised[2:] == pytest.approx([supervised[2]] * 2) and supervised[0] > 1.5 * supervised[2]
    assert history[0]["loss"] != history[0]["loss_plain"]
    assert history[3]["loss"] == pytest.approx(history[3]["loss_plain"])  # one kind is left: weights cancel


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [
        ({"weights": {"image": 1}}, "loss.weights: no tokens of kind 'image' can carry loss"),
        ({"weights": {"box": -2}}, "the weight of box falls to -2"),
        ({"weights": {"response": 0, "box": 0, "entity": 0}}, "from progress 0 on every weight is 0"),
        ({"balance": {"by": "fixed"}}, "by: fixed needs weights"),
        ({"balance": {"by": "fixed", "weights": {"caption": 0, "vqa": 0}}}, "one must be above 0"),
        ({"balance": {"by": "fixed", "weights": {"caption": 1, "vqa": -1}}}, "none may be negative"),
        ({"balance": {"by": "fixed", "weights": {"caption": 1}}}, "has no number for the task vqa"),
        (
            {"balance": {"by": "fixed", "weights": {"caption": 1, "vqa": 1, "ocr": 1}}},
            "no training sample has the task 'ocr'; tasks of data.train: caption, vqa",
        ),
        ({"balance": {"by": "inverse", "initial": {"caption": 1, "vqa": 0}}}, "loss.balance.initial.vqa"),
        ({"balance": {"by": "tokens", "alpha": 1}}, "alpha means nothing with by: tokens"),
        ({"balance": {"by": "gradnorm", "initial": {"caption": 1}, "initial_steps": 3}}, "keep one"),
        ({"balance": {"by": "gradnom"}}, "loss.balance.by: input should be 'tokens', 'fixed', 'inverse'"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(write_config, vlmtune, loss, complaint):
    config = write_config("run", 4, loss=loss)
    code, _, err = vlmtune("train", config)
    assert code == 1 and complaint in err.replace("\n", " ") and "Traceback" not in err
    assert not run_of(config).exists()


def test_gradnorm_needs_something_that_tasks_share(write_config, vlmtune):
    plan = [{"match": "lm_head", "train": "full"}, {"match": "*", "train": "frozen"}]
    config = write_config("run", 4, plan=plan, loss={"balance": {"by": "gradnorm"}})
    code, _, err = vlmtune("train", config)
    assert code == 1 and "compares gradients where the tasks meet" in err


def test_the_record_of_losses_is_json(write_config, vlmtune):
    config = write_config("run", 3, loss={"balance": {"by": "uncertainty"}})
    assert vlmtune("train", config)[0] == 0
    line = json.loads((run_of(config) / "history.jsonl").read_text().splitlines()[0])
    assert {"loss", "loss_plain", "loss_by_task", "loss_plain_by_task", "task_weights"} <= set(line)
    assert "balance" in line["lr"]
