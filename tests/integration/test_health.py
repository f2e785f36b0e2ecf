"""What a run says about its own pace, and the answers it records on the way (SPEC H2)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from run_setup import final_tensors

from vlmtune import run as run_module
from vlmtune.checks.pace import BLOCK, MIB, PART, RISING
from vlmtune.config import load_config
from vlmtune.observe.log import read_history
from vlmtune.observer import Observer
from vlmtune.run import train

LONG = BLOCK * (RISING + 2)


@pytest.fixture
def findings_of(write_config, tmp_path, quiet):
    """`findings_of("name", steps, *observers, **sections)` -> what was found while it ran."""

    def run(name: str, steps: int, *observers: Observer, **sections) -> list[dict]:
        calm = {"checkpoint": {"every": steps}, **sections}
        train(load_config(str(write_config(name, steps, **calm))), quiet, observers=observers, check=False)
        return [r for r in read_history(tmp_path / name / "history.jsonl") if r["kind"] == "finding"]

    return run


class Keeper(Observer):
    """Keeps 4 MiB of every step, as a list of losses that hold on to their graphs would."""

    def __init__(self):
        self.kept = []

    def on_step(self, state, metrics) -> None:
        self.kept.append(np.ones(4 * MIB, dtype=np.uint8))


def test_a_healthy_run_is_silent_and_a_leak_is_named(findings_of):
    calm = {"optim": {"lr": 1e-4, "warmup": 2}, "stability": {"statistics": None}}
    assert findings_of("healthy", LONG, **calm) == []
    (found,) = findings_of("leak", LONG, Keeper(), **calm)
    assert found["what"] == "memory grows from step to step" and "MiB a step" in found["evidence"]
    assert 3.0 < float(found["evidence"].split(" MiB a step")[0].split()[-1]) < 6.0


@pytest.mark.slow
def test_late_data_is_named(findings_of, tmp_path, monkeypatch):
    """Photographs of four megapixels for a model that sees 64x48 of them, and nobody who decodes ahead; as if the run
    were long."""
    monkeypatch.setattr("vlmtune.checks.pace.WAITED_SECONDS", 0.0)
    noise = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    content = [{"type": "image", "image": "large.png"}, {"type": "text", "text": "what is there"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red circle"}]
    rows = tmp_path / "large.jsonl"
    rows.write_text("".join(json.dumps({"id": str(n), "messages": messages}) + "\n" for n in range(4)))
    (found,) = findings_of("late", PART + 1, data={"train": [{"path": str(rows)}], "workers": 0})
    assert found["what"] == "data is late" and "data.workers" in found["remedy"]


def test_an_observer_that_sets_the_learning_rate_is_found_out(write_config, tmp_path, monkeypatch):
    class Meddler(Observer):
        optimizer = None

        def on_step(self, state, metrics) -> None:
            if state.step == 3:
                self.optimizer.param_groups[0]["lr"] *= 2

    meddler, build = Meddler(), run_module.build_optimizer

    def keep(*arguments):
        meddler.optimizer = build(*arguments)
        return meddler.optimizer

    monkeypatch.setattr(run_module, "build_optimizer", keep)
    with open(tmp_path / "out.txt", "w") as file:
        config = load_config(str(write_config("run", 5)))
        train(config, Console(file=file, width=200), observers=[meddler], check=False)
    (found,) = [r for r in read_history(tmp_path / "run" / "history.jsonl") if r["kind"] == "finding"]
    assert (found["level"], found["step"], found["what"]) == ("fail", 3, "a learning rate is not the planned one")
    assert "step 3: fail: a learning rate is not the planned one" in (tmp_path / "out.txt").read_text()
    assert "a learning rate is not the planned one" in (tmp_path / "run" / "report.html").read_text()


# ---- answers on the way --------------------------------------------------------------------------------------------


@pytest.fixture
def sampled(write_config, rows, vlmtune, tmp_path):
    """`sampled("name", **evaluate)` -> (run folder, what was printed); 4 steps, gallery of 3."""

    def run(name: str, **evaluate) -> tuple[Path, str]:
        data = {"train": [{"path": str(rows)}], "eval": {"val": [{"path": str(rows), "limit": 6}]}, "workers": 0}
        wish = {"max_new_tokens": 3, "gallery": 3, **evaluate}
        code, out, err = vlmtune("train", write_config(name, 4, data=data, evaluate=wish))
        assert (code, err) == (0, "")
        return tmp_path / name, out

    return run


def answers(run: Path) -> dict[int, list]:
    records = [r for r in read_history(run / "history.jsonl") if r["kind"] == "samples"]
    return {record["step"]: record["answers"] for record in records}


def test_answers_come_from_the_evaluations_or_as_often_as_one_wants(sampled):
    run, out = sampled("evaluated", every=2)
    assert list(answers(run)) == [2] and out.count("sample at step") == 1
    often, out = sampled("often", every=2, samples_every=1)
    assert list(answers(often)) == [1, 2, 3, 4] and out.count("sample at step") == 4
    assert answers(often)[2] == answers(run)[2], "asked for alone or in an evaluation: the same replies"
    entries = json.loads((often / "samples.json").read_text())
    assert len(entries) == 3 and all((often / entry["image"]).is_file() for entry in entries)
    assert [entry["after"] for entry in entries] == [answer["reply"] for answer in answers(often)[4]]
    before = {i: reply for _, i, reply, _ in json.loads((often / "before.json").read_text())["replies"]}
    assert all(entry["before"] in before.values() for entry in entries)


def test_asking_on_the_way_changes_nothing(sampled):
    """LoRA's dropout draws from the same random numbers, with and without replies in between."""
    without, with_samples = (
        final_tensors(sampled(name, **wish)[0]) for name, wish in (("without", {}), ("with", {"samples_every": 1}))
    )
    assert without.keys() == with_samples.keys()
    assert all(torch.equal(without[name], with_samples[name]) for name in without)


def test_an_interval_without_samples_is_refused(write_config, vlmtune):
    for idle, said in ({"generate": False}, "generate: false"), ({"gallery": 0}, "gallery: 0"):
        config = write_config("run", 2, evaluate={"samples_every": 1, **idle})
        code, _, err = vlmtune("train", config)
        assert code == 1 and f"samples_every means nothing with {said}" in err
