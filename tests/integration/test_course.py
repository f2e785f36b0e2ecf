"""Every option of the course of a run through the command line (SPEC D1-D5, D7, F1, F3, F4, G4, G5): it changes what
it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_setup import PLAN

from vlmtune.config import load_config
from vlmtune.observe.log import read_history

STEPS = 10


@pytest.fixture
def trained(write_config, vlmtune):
    """`trained("name", **sections)` -> (records of training steps, run folder, output)."""

    def run(name: str, *overrides: str, steps: int = STEPS, **sections) -> tuple[list[dict], Path, str]:
        config = write_config(name, steps, **sections)
        code, out, err = vlmtune("train", config, *overrides)
        assert code == 0, err
        folder = Path(load_config(str(config), overrides).run)
        return [r for r in read_history(folder / "history.jsonl") if r["kind"] == "train"], folder, out

    return run


def rates(records: list[dict], rule: str = "language") -> list[float]:
    return [record["lr"][rule] for record in records]


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ({"schedule": "constant", "warmup": 2}, [0.5] + [1.0] * 9),
        ({"schedule": "linear", "warmup": 0, "floor": 0.1}, [1 - 0.1 * n for n in range(10)]),
        ({"schedule": "wsd", "warmup": 2, "decay": "50%", "floor": 0.5}, [0.5, 1, 1, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5]),
        (
            {"schedule": [{"start": 2e-3, "to": 1e-2, "over": 4}, {"to": 1e-2, "over": "40%"}, {"to": 5e-3}]},
            [0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 0.75, 0.5],
        ),
    ],
)
def test_schedules_are_what_the_history_says(trained, optim, expected):
    records, _, _ = trained("schedule", optim={"lr": 1e-2, **optim})
    assert rates(records) == pytest.approx([1e-2 * factor for factor in expected])


def test_a_rule_with_another_rate_follows_stretches_in_proportion(trained):
    """Those of optim are in numbers of optim.lr; a rule at a tenth of it has a tenth everywhere."""
    plan = [rule | {"lr": 1e-3} if rule["match"] == "projector" else rule for rule in PLAN]
    stretches = [{"start": 2e-3, "to": 1e-2, "over": 4}, {"to": 5e-3}]
    records, _, _ = trained("proportion", plan=plan, optim={"lr": 1e-2, "schedule": stretches})
    assert rates(records)[3] == pytest.approx(1e-2) and rates(records)[-1] == pytest.approx(5e-3)
    assert rates(records, "projector") == pytest.approx([rate / 10 for rate in rates(records)])


def test_a_rule_may_have_a_schedule_of_its_own(trained):
    own = {"match": "projector", "train": "full", "lr": 4e-3, "schedule": "linear", "warmup": 0, "floor": 0.0}
    plan = [own if rule["match"] == "projector" else rule for rule in PLAN]
    records, _, _ = trained("own", plan=plan, optim={"lr": 1e-2, "schedule": "constant", "warmup": 0})
    assert rates(records) == [1e-2] * STEPS
    assert rates(records, "projector") == pytest.approx([4e-3 * (1 - n / 9) for n in range(10)])


@pytest.mark.parametrize(("scaling", "factor"), [("linear", 0.25), ("sqrt", 0.5)])
def test_learning_rates_follow_the_batch(trained, scaling, factor):
    optim = {"lr": 1e-2, "schedule": "constant", "warmup": 0, "lr_batch": 16, "scaling": scaling}
    records, _, out = trained("scaled", optim=optim, steps=2)
    assert rates(records) == pytest.approx([1e-2 * factor] * 2)
    assert f"learning rates x {factor:g} for the batch size" in out


def test_clipping_alone_and_together(trained):
    """A limit far below the norm makes a smaller first update; norms are those before it."""
    plan = [rule | {"clip": 1e-4} if rule["match"] == "projector" else rule for rule in PLAN]
    optim = {"lr": 1e-2, "warmup": 0, "eps": 1.0}  # a large eps: AdamW's update then depends on the gradient's size
    alone, _, _ = trained("alone", plan=plan, optim=optim | {"clip": None}, steps=3)
    free, _, _ = trained("free", optim=optim | {"clip": None}, steps=3)
    together, _, _ = trained("together", optim=optim | {"clip": 1e-4}, steps=3)
    assert alone[0]["norm_by_rule"] == free[0]["norm_by_rule"] == together[0]["norm_by_rule"]
    assert free[0]["norm"] > 1e-2
    losses = [run[2]["loss"] for run in (alone, free, together)]
    assert len(set(losses)) == 3


def test_staged_unfreezing_from_a_config(trained):
    """Phases are printed with their memory; a frozen rule has rate 0 and norm 0, then it trains."""
    lr = [[0, 0], [0.5, 1e-2], [0.8, 1e-3]]
    plan = [rule | {"lr": lr, "warmup": 2} if rule["match"] == "language" else rule for rule in PLAN]
    records, folder, out = trained("unfreeze", plan=plan, optim={"schedule": "constant", "warmup": 0, "lr": 1e-2})
    assert rates(records) == pytest.approx([0] * 5 + [5e-3, 1e-2, 1e-2, 1e-3, 1e-3])
    assert [record["norm_by_rule"]["language"] > 0 for record in records] == [False] * 5 + [True] * 5
    phases = [line for line in out.splitlines() if line.startswith("steps ")]
    assert len(phases) == 2 and phases[0].startswith("steps 1 to 5: projector train; predicted")
    assert phases[1].startswith("steps 6 to 10: projector, language train; predicted")
    assert json.loads((folder / "assignment.json").read_text())[2]["lr"] == 1e-2


def test_a_plan_that_trains_nothing_at_a_time_is_refused(write_config, vlmtune):
    plan = [rule | {"lr": [[0, 0], [0.5, 1e-2]]} if rule["train"] != "frozen" else rule for rule in PLAN]
    code, _, err = vlmtune("train", write_config("nothing", 4, plan=plan))
    assert code == 1 and "from step 1 on nothing trains" in err


def test_early_stopping_from_a_config(trained, rows):
    """A learning rate that is far too high: the held-out loss gets no better, and the run ends early and says why."""
    held_out = {"val": [{"path": str(rows), "limit": 4}]}
    _, folder, out = trained(
        "early", steps=40, data={"train": [{"path": str(rows)}], "eval": held_out, "workers": 0},
        optim={"lr": 1.0, "warmup": 0}, evaluate={"every": 2, "generate": False},
        checkpoint={"every": 50, "patience": 2, "delta": 0.5},
    )  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] < 40 and "checkpoint.patience" in summary["stopped"]
    assert f"stopped early at step {summary['steps']}" in out


def test_statistics_are_written_at_their_interval(trained):
    records, folder, _ = trained("statistics", stability={"statistics": "4 steps"})
    written = read_history(folder / "gradients.jsonl")
    assert [record["step"] for record in written] == [4, 8]
    names = set(written[0]["parameters"])
    assert any(name.startswith("projector") for name in names) and any("lora_A" in name for name in names)
    _, folder, _ = trained("none", stability={"statistics": None})
    assert not (folder / "gradients.jsonl").exists()


def test_float16_from_a_config(trained):
    records, folder, out = trained("fp16", "train.precision=fp16", steps=3)
    assert "fp16 on cpu" in out and records[0]["loss_scale"] == 2.0**16
    assert json.loads((folder / "summary.json").read_text())["overflows"] in (0, 1, 2, 3)


def test_policies_may_change_between_a_run_and_its_resume(write_config, vlmtune):
    config = write_config("policy", 3)
    assert vlmtune("train", config)[0] == 0
    code, out, _ = vlmtune("train", config, "stability.nonfinite=skip", "stability.spikes=rewind")
    assert code == 0 and "continuing from" in out


def test_a_float32_island_from_a_config(trained, write_config, vlmtune):
    """The losses differ from those of plain bfloat16, and the modules are named."""
    plan = [rule | {"compute": "fp32"} if rule["match"] in ("language", "projector") else rule for rule in PLAN]
    island, _, out = trained("island", "train.precision=bf16", plan=plan, steps=3)
    plain, _, _ = trained("plain", "train.precision=bf16", steps=3)
    assert "float32: model.multi_modal_projector" in out and "layers.0" in out
    assert island[0]["loss"] != plain[0]["loss"]
    head = [rule | {"compute": "fp32"} if rule["match"] == "lm_head" else rule for rule in PLAN]
    code, _, err = vlmtune("train", write_config("head", 3, plan=head))
    assert code == 1 and "covers lm_head.weight" in err
    narrow = [{"match": "projector.linear_1.weight", "train": "full", "compute": "fp32"}, *PLAN]
    code, _, err = vlmtune("train", write_config("narrow", 3, plan=narrow))
    assert code == 1 and "covers no whole module" in err


def batchnorm_plan(mode: str) -> list[dict]:
    return [{"match": "vision", "train": "full", "lr": 1e-4, "batchnorm": mode},
            *(rule for rule in PLAN if rule["match"] not in ("vision", "lm_head"))]  # fmt: skip


@pytest.mark.slow
def test_batchnorm_modes_from_a_config(trained, write_config, vlmtune):
    """On the embedded tower: a warning by default; frozen and sync do what they say, and differ."""
    losses = {}
    for mode in ("batch", "frozen", "sync"):
        records, folder, out = trained(f"bn_{mode}", steps=3, model="embedded", plan=batchnorm_plan(mode))
        losses[mode] = records[-1]["loss"]
        said = json.loads((folder / "start.json").read_text())
        found = [finding for finding in said if finding["what"].startswith("BatchNorm")]
        assert [finding["level"] for finding in found] == {"batch": ["warn"], "frozen": [], "sync": ["pass"]}[mode]
        assert ("keep the base's statistics" in out) == (mode == "frozen")
    assert len(set(losses.values())) == 3
    plan = [rule | {"batchnorm": "frozen"} if rule["match"] == "projector" else rule for rule in PLAN]
    code, _, err = vlmtune("train", write_config("none", 3, plan=plan))
    assert code == 1 and "covers no BatchNorm" in err
