"""`vlmtune doctor`: a run that failed is replayed from its folder alone (SPEC F5)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from training_setup import PLAN

from vlmtune.config import load_config
from vlmtune.failure import load_failure

EXPLODES = {"lr": 1e30, "warmup": 0}  # AdamW's first update is about the learning rate itself


def run_of(config: Path) -> Path:
    return Path(load_config(str(config)).run)


@pytest.fixture(scope="module")
def exploded(tiny_folder, rows, tmp_path_factory) -> Path:
    """The folder of a run whose second step is not finite. LoRA with dropout: the replay needs the same random
    numbers."""
    import sys

    from vlmtune import cli

    folder = tmp_path_factory.mktemp("exploded")
    tree = {
        "model": str(tiny_folder("llava")), "run": str(folder / "run"),
        "data": {"train": [{"path": str(rows)}], "workers": 0}, "plan": PLAN, "optim": EXPLODES,
        "train": {"length": 4, "batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "log_every": 1},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    before, sys.argv = sys.argv, ["vlmtune", "train", str(folder / "run.yaml")]
    try:
        with pytest.raises(SystemExit):
            cli.main()
    finally:
        sys.argv = before
    return folder / "run"


def test_what_the_run_says_when_it_stops(write_config, vlmtune):
    config = write_config("stops", 4, optim=EXPLODES)
    code, _, err = vlmtune("train", config)
    assert code == 1
    said = " ".join(err.split())
    assert "step 2: not finite" in said and "most probable: " in said
    assert str(run_of(config) / "failures" / "step_000002") in said


def test_a_failure_is_reproduced_where_the_run_saw_it(exploded, vlmtune):
    code, out, err = vlmtune("doctor", exploded)
    assert code == 1 and err == ""
    lines = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
    assert lines["failure"] == str(exploded / "failures" / "step_000002")
    assert lines["what"] == "step 2 was not finite, in fp32"
    assert lines["replay"] == "not finite again, in the same place"
    assert lines["first"].startswith("micro-batch 1 (")
    assert "gradient norm before" in lines and "loss before" in lines
    assert "have grown" in lines["cause 1"]
    assert lines["in order"]


def test_the_same_as_json(exploded, vlmtune):
    code, out, _ = vlmtune("doctor", exploded, "--failure", "step_000002", "--json")
    found = json.loads(out, parse_constant=pytest.fail)  # strict JSON
    assert code == 1 and found["reproduced"] and found["same_module"]
    assert found["now"]["origin"] == found["then"]["origin"], "to the last bit: the same weights, tensors, dropout"
    assert found["now"]["causes"] == found["then"]["causes"]
    assert found["failure"] == "step_000002" and len(found["loss_history"]) == 1


def test_the_checkpoint_has_the_weights_before_the_update(exploded):
    failure = load_failure(exploded / "failures" / "step_000002")
    trained = load_file(failure.checkpoint / "trained.safetensors")
    assert max(float(value.abs().max()) for value in trained.values()) > 1e28  # of the first update
    assert all(bool(torch.isfinite(value).all()) for value in trained.values())


def test_a_run_without_a_failure(write_config, vlmtune):
    config = write_config("sound", 3)
    assert vlmtune("train", config)[0] == 0
    code, out, _ = vlmtune("doctor", run_of(config))
    assert code == 0 and "no step of this run was saved as not finite" in out
    code, out, _ = vlmtune("doctor", run_of(config), "--json")
    assert code == 0 and json.loads(out)["failure"] is None
    code, _, err = vlmtune("doctor", run_of(config), "--failure", "step_000001")
    assert code == 1 and "has saved no failure; leave --failure out" in err


def test_the_questions_come_in_order_and_what_is_ruled_out_is_said(write_config, vlmtune):
    """A healthy run: data, config, code, and nothing fails."""
    config = write_config("asked", 12)
    assert vlmtune("train", config)[0] == 0
    code, out, _ = vlmtune("doctor", run_of(config), "--json")
    sections = [finding["section"] for finding in json.loads(out)["findings"]]
    assert code == 0 and list(dict.fromkeys(sections)) == ["data", "config", "code"]
    code, out, _ = vlmtune("doctor", run_of(config))
    for said in (
        "data: ruled out: every source was read",
        "code: ruled out: checkpoints are whole",
        "adapters have left 0",
    ):
        assert said in out


def test_a_run_that_learned_nothing_has_its_cause_first(write_config, vlmtune):
    """A learning rate of almost nothing: adapters stay at 0 only without any update; here the loss does not fall."""
    config = write_config("idle", 12, optim={"lr": 1e-12, "warmup": 1})
    plan = [{**rule, "lr": 1e-12} if rule["train"] != "frozen" else rule for rule in PLAN]
    assert vlmtune("train", config, f"plan={json.dumps(plan)}")[0] == 0
    code, out, _ = vlmtune("doctor", run_of(config))
    assert out.splitlines()[1].startswith("config: warn: at the start: learning rates are usual: far below")


def test_other_versions_and_a_damaged_checkpoint_are_questions_of_code(write_config, vlmtune):
    config = write_config("changed", 4, checkpoint={"every": 2})
    assert vlmtune("train", config)[0] == 0
    file = run_of(config) / "environment.json"
    environment = json.loads(file.read_text())
    environment["packages"]["torch"] = "1.0"
    file.write_text(json.dumps(environment))
    newest = run_of(config) / "checkpoints" / "step_000004" / "trained.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    code, out, _ = vlmtune("doctor", run_of(config), "--json")
    found = {f["what"]: f["evidence"] for f in json.loads(out)["findings"] if f["level"] != "pass"}
    assert "torch 1.0 -> " in found["the versions are those of the run"]
    assert "step_000004/trained.safetensors is damaged" in found["checkpoints are whole"]
    code, _, err = vlmtune("doctor", newest.parent)
    assert code == 1 and "trained.safetensors is damaged" in err


def test_quick_looks_at_a_checkpoint(write_config, vlmtune):
    config = write_config("looks", 12)
    assert vlmtune("train", config)[0] == 0
    folder = run_of(config) / "checkpoints" / "latest"
    code, out, _ = vlmtune("doctor", folder)
    assert code == 0, out
    for said in ("every file is whole", "the loss until then: from ", "no weight has grown", "no gradient stands out"):
        assert f"checkpoint: ruled out: {said}" in out


def test_what_is_no_run(tmp_path, vlmtune):
    code, _, err = vlmtune("doctor", tmp_path)
    assert code == 1 and "is not a run folder: config.yaml is missing" in err


@pytest.mark.parametrize("name", ["batch.safetensors", "failure.json", "checkpoint/trained.safetensors"])
def test_a_damaged_failure_names_the_file(exploded, tmp_path, vlmtune, name):
    run = tmp_path / "run"
    shutil.copytree(exploded, run, symlinks=True)
    path = run / "failures" / "step_000002" / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    code, _, err = vlmtune("doctor", run)
    assert code == 1 and Path(name).name in err


def test_a_base_model_that_is_mended(write_config, tiny_folder, tmp_path, vlmtune):
    """The weights of a frozen part are not in the checkpoint: the doctor reads them from the model folder, as it is."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llava"), folder)
    sound = load_file(folder / "model.safetensors")
    name = next(n for n in sound if n.endswith("layers.2.mlp.up_proj.weight") and "language" in n)
    broken = {key: value.clone() for key, value in sound.items()}
    broken[name][3, 4] = float("nan")
    save_file(broken, folder / "model.safetensors", {"format": "pt"})
    config = write_config("broken", 3, model=str(folder))
    code, _, err = vlmtune("train", config)
    assert code == 1 and "Weight language.layers.2.mlp.up_proj.weight is not finite" in " ".join(err.split())
    code, out, _ = vlmtune("doctor", run_of(config))
    assert code == 1 and "cause 1: weights were not finite before this step" in out and "read like that" in out
    save_file(sound, folder / "model.safetensors", {"format": "pt"})
    code, out, err = vlmtune("doctor", run_of(config))
    assert code == 0, err
    assert "the same step is finite here" in out and "cause 1: not reproduced" in out


@pytest.mark.parametrize("compute, where", [("auto", "projector."), ("fp32", "language.")])
def test_float16_with_a_module_that_overflows(write_config, vlmtune, compute, where):
    """Whole path: scale, autocast, float32 islands and checkpoint are those of the run."""
    plan = [rule | ({"compute": compute} if rule["match"] == "projector" else {}) for rule in PLAN]
    config = write_config(
        "half", 3, optim={"lr": 1e3, "warmup": 0}, plan=plan,
        train={"length": 3, "batch_size": 4, "micro_batch_size": 2, "precision": "fp16", "log_every": 1},
    )  # fmt: skip
    code, _, err = vlmtune("train", config)
    assert code == 1, err
    code, out, _ = vlmtune("doctor", run_of(config), "--json")
    found = json.loads(out)
    assert code == 1 and found["precision"] == "fp16" and found["scale"] > 1
    assert found["now"]["origin"] == found["then"]["origin"] and found["now"]["origin"]["dtype"] == "float16"
    assert found["now"]["origin"]["module"].startswith(where)
    assert any(cause["what"].startswith("float16 overflow in") for cause in found["now"]["causes"])


def test_damaged_and_missing_files_of_a_run_are_named_among_the_other_answers(write_config, vlmtune, tmp_path):
    config = write_config("run", 3)
    assert vlmtune("train", config)[0] == 0
    run = run_of(config)

    def said() -> list[str]:
        return vlmtune("doctor", run)[1].splitlines()

    whole = {path: path.read_text() for path in (run / "config.yaml", run / "summary.json", run / "history.jsonl")}
    (run / "config.yaml").write_text("model: [unclosed")
    assert any(line.startswith("config: fail: config.yaml can be read") for line in said())
    (run / "config.yaml").write_text(whole[run / "config.yaml"])
    (run / "history.jsonl").write_text(whole[run / "history.jsonl"] + '{"kind": "tra')
    assert any(line.startswith("config: warn: history.jsonl can be read: no, from line") for line in said())
    (run / "history.jsonl").write_text(whole[run / "history.jsonl"])
    (run / "summary.json").write_text("{")
    lines = said()
    assert any(line.startswith("config: fail: its files can be read") and "summary.json" in line for line in lines)
    assert any(line.startswith("code: ") for line in lines), "the other questions are asked all the same"
    (run / "summary.json").unlink()
    assert any("not finished, it stands at step 3; the same command continues" in line for line in said())
    (run / "summary.json").write_text(whole[run / "summary.json"])
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    assert any("code: fail: checkpoints are whole: there is none, but the run was finished" in line for line in said())


def test_what_is_no_run_is_told_what_it_is(write_config, vlmtune, tmp_path):
    config = write_config("run", 3)
    assert vlmtune("train", config)[0] == 0
    run = run_of(config)
    for path, words in (
        (tmp_path / "nowhere", "does not exist"),
        (run / "checkpoints", f"lies in the run folder {run}; pass that"),
        (config, "is a file; pass the folder of a run"),
        (tmp_path, "config.yaml is missing; it holds the runs run"),
    ):
        for command in ("doctor", "validate", "align", "eval"):
            code, _, err = vlmtune(command, path)
            assert code == 1 and words in " ".join(err.split()), (command, err)
