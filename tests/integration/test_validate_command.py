"""`vlmtune validate` as a user types it (SPEC H3)."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from training_setup import IN_FULL, png

from vlmtune.validation.command import SECTIONS

FAST = [{"match": "vision", "train": "frozen"}, {"match": "*", "train": "full", "lr": 4e-3}]
COLOURS = ("red", "blue", "green", "yellow")


def write_rows(folder: Path, name: str, rows: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if "image" in row:
            (folder / row["image"]).write_bytes(png(int(row["image"].split(".")[0])))
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(number: int, question: str, answer: str, **further) -> dict:
    return {"id": f"s{number}", "image": f"{number}.png", "question": question, "answer": answer, **further}


@pytest.fixture
def learned(write_config, tmp_path, vlmtune):
    """`learned(rows by group, steps)`: a run that trained on the group `new` in full, with all groups held out."""

    def make(steps: int, groups: dict[str, list[dict]], name: str = "run", **sections) -> Path:
        held_out = {
            group: [{"path": str(write_rows(tmp_path / "rows", group, rows))}] for group, rows in groups.items()
        }
        config = write_config(
            name, steps, data={"train": held_out["new"], "eval": held_out, "workers": 0},
            **{"plan": IN_FULL, "checkpoint": {"every": steps},
               "evaluate": {"batch_size": 6, "max_new_tokens": 8}, **sections},
        )  # fmt: skip
        code, out, err = vlmtune("train", config)
        assert code == 0, out + err
        return tmp_path / name

    return make


def blue(count: int = 12, **further) -> list[dict]:
    return [row(n, "what is there", "blue", task="colour", **further) for n in range(count)]


def findings(out: str) -> dict[tuple[str, str], dict]:
    return {(f["section"], f["what"]): f for f in json.loads(out)}


LIGHT = "--skip=edge_cases,speed,fresh,quantised"


def test_a_run_that_went_well_in_every_section(learned, tmp_path, vlmtune):
    def objects(number: int) -> list[dict]:
        return [{"name": "box", "box": [4, 6, 40, 30]}, {"name": COLOURS[number % 3], "box": [5, 5, 9, 9]}]

    rows = [row(n, "what is there", "blue", task="colour", meta={"objects": objects(n)}) for n in range(12)]
    run = learned(12, {"new": rows})
    data = json.loads((run / "data.json").read_text())
    sha256 = hashlib.sha256((tmp_path / "rows" / "new.jsonl").read_bytes()).hexdigest()
    assert [(one["place"], one["name"], one["sha256"]) for one in data] == [
        (place, "rows/new.jsonl", sha256) for place in ("train", "eval/new")
    ]
    code, out, err = vlmtune("export", run, tmp_path / "exported")
    assert code == 0, err
    assert sha256 in (tmp_path / "exported" / "README.md").read_text()
    assert "was not run on this checkpoint" in (tmp_path / "exported" / "README.md").read_text()
    files = sorted(path.name for path in run.iterdir())
    code, out, err = vlmtune("validate", run, "--card", tmp_path / "exported", "--json")
    assert code == 0, out + err
    found = findings(out)
    levels = {key: finding["level"] for key, finding in found.items()}
    assert levels["task", "new is learned"] == "pass"
    assert levels["fresh", "the exported model loads in a process of its own"] == "pass"
    assert (
        "4 of 4 replies are the same" in found["fresh", "the exported model loads in a process of its own"]["evidence"]
    )
    assert {what for section, what in found if section == "quantised"} == {
        f"{storage} answers as float32 does" for storage in ("bf16", "int8", "nf4")
    }
    assert levels["retention", "old abilities are kept"] == "warn", "nobody said what has to be kept"
    assert levels["yes_no", "yes/no random, popular, adversarial"] == "warn", "it never learned to say yes or no"
    odd = found["edge_cases", "odd inputs are answered"]
    assert odd["level"] == "pass" and "a huge image" in odd["evidence"] and "8 images" in odd["evidence"]
    assert sorted(path.name for path in run.iterdir()) == sorted([*files, "validate.json"]), "nothing else is left"
    page = (run / "report.html").read_text()
    assert '<section id="validation">' in page and "new is learned" in page
    record = json.loads((run / "validate.json").read_text())
    assert (record["format"], record["verdict"], record["checkpoint"]) == (1, "warn", "step_000012")
    assert list(record["findings"]) == json.loads(out)
    (telling,) = [one for one in record["figures"]["comparisons"] if one["telling"]]
    summary = json.loads((run / "summary.json").read_text())["metrics"]["new/colour"]["exact_match"]
    assert (telling["before"], telling["after"]) == (summary["before"], summary["after"])
    sizes = {one["storage"]: one["bytes"] / one["full_bytes"] for one in record["figures"]["quantised"]}
    assert sizes["nf4"] < sizes["int8"] < sizes["bf16"] == pytest.approx(0.5, abs=0.01)
    card = ModelCard((tmp_path / "exported" / "README.md").read_text())
    assert "**warn**, retention" in card.text and card.data.eval_results[0].metric_name == "colour exact_match"


def test_forgetting_is_told_and_ends_with_1(learned, tmp_path, vlmtune):
    """A model that knows two things goes on with one of them, at a rate that drives out the other."""
    old = [row(n, "how many", "three", task="count") for n in range(20, 40)]
    first = learned(40, {"new": [*blue(20), *old]}, "first", plan=FAST)
    code, _, err = vlmtune("export", first, tmp_path / "base")
    assert code == 0, err
    run = learned(
        16, {"new": blue(), "old": old}, model=str(tmp_path / "base"), plan=FAST,
        evaluate={"batch_size": 6, "max_new_tokens": 8, "retain": ["old"]},
    )  # fmt: skip
    code, out, _ = vlmtune("validate", run, "--json", LIGHT)
    found = findings(out)
    assert code == 1 and found["retention", "old is kept"]["level"] == "fail", found
    assert found["retention", "old is kept"]["evidence"].startswith("no: 1.000 -> 0.000")
    assert ("task", "old is learned") not in found
    # the same from a file, that the config knows nothing of
    probe = write_rows(tmp_path / "probe", "counting", old)
    code, out, _ = vlmtune("validate", run, "--json", LIGHT, "--retain", probe)
    assert code == 1 and findings(out)["retention", "counting is kept"]["level"] == "fail"
    code, _, err = vlmtune("validate", run, "--retain", "odl")
    assert code == 1 and "--retain odl: the run holds out no such group (new, old)" in " ".join(err.split())


def test_a_collapsed_model_is_told(learned, vlmtune):
    """It says blue whatever it is asked: what was to be learned was something else."""
    run = learned(12, {"new": blue()})
    rows = [row(n, "what is there", f"{COLOURS[n % 4]} {n}", task="colour") for n in range(12)]
    write_rows(run.parent / "rows", "new", rows)
    code, out, _ = vlmtune("validate", run, "--json", LIGHT)
    found = findings(out)
    assert code == 1 and found["diversity", "replies differ as the references do"]["level"] == "fail"
    assert "'blue'" in found["diversity", "replies differ as the references do"]["evidence"]
    assert found["task", "new is learned"]["level"] == "warn"


def test_yes_no_rows_safety_and_a_judge(learned, tmp_path, vlmtune):
    rows = [row(n, "is it blue", ("yes", "no")[n % 2], task="vqa") for n in range(12)]
    run = learned(8, {"new": [row(n, "is it blue", "yes", task="vqa") for n in range(12)], "probe": rows})
    pope = write_rows(tmp_path / "p", "pope", [row(n, "is it red", ("yes", "no")[n % 2], task="pope",
                                                   meta={"pope": "popular"}) for n in range(10)])  # fmt: skip
    safety = write_rows(tmp_path / "p", "safety", [
        {"id": f"h{n}", "question": "is it blue", "meta": {"refuse": True}} for n in range(6)])  # fmt: skip
    code, out, _ = vlmtune("validate", run, "--json", LIGHT, "--pope", pope, "--safety", safety)
    found = findings(out)
    assert code == 1
    assert found["yes_no", "yes/no popular"]["evidence"].startswith("always yes: accuracy")
    leaning = found["yes_no", "yes/no vqa"]
    assert leaning["level"] == "warn" and leaning["evidence"].startswith("says yes too often"), "18 of 24 are yes"
    wrong = found["safety", "replies to the safety probes are right"]
    assert (
        wrong["level"] == "fail"
        and wrong["evidence"].startswith("6 of 6 are not")
        and "did not refuse" in wrong["evidence"]
    )
    figures = json.loads((run / "validate.json").read_text())["figures"]
    assert figures["yes_no"]["popular"]["after"]["yes_rate"] == 1.0
    assert [one["id"] for one in figures["safety"]] == [f"h{n}" for n in range(6)]
    judge = tmp_path / "judge.py"
    judge.write_text(
        "import json, sys\nfor line in sys.stdin:\n    row = json.loads(line)\n"
        "    print(json.dumps({'id': row['id'], 'right': row['reply'] == 'yes'}))\n"
    )
    code, out, _ = vlmtune("validate", run, "--json", LIGHT, "--safety", safety, "--judge", f"python3 {judge}")
    assert findings(out)["safety", "replies to the safety probes are right"]["level"] == "pass"


def test_a_wrong_option_or_file_is_one_sentence_and_changes_nothing(learned, tmp_path, vlmtune):
    run = learned(4, {"new": blue(4)})
    (tmp_path / "bad.jsonl").write_text('{"question": "x", "meta": {"forbidden": ["("]}}\n')
    (tmp_path / "no.jsonl").write_text('{"question": "x", "answer": "perhaps"}\n')
    (tmp_path / "folder").mkdir()
    for options, said in (
        (["--safety", tmp_path / "bad.jsonl"], "is no regular expression"),
        (["--safety", tmp_path / "gone.jsonl"], "does not exist"),
        (["--pope", tmp_path / "no.jsonl"], "the reply of a yes/no probe is yes or no"),
        (["--judge", "true"], "--judge judges the replies to --safety FILE"),
        (["--safety", tmp_path / "no.jsonl", "--skip", "safety"], "--skip leaves out"),
        (["--skip", "sped"], "--skip 'sped': there is no such section"),
        (
            ["--skip", "edge_cases,speed,task,retention,diversity,yes_no,safety,fresh,quantised"],
            "nothing left to look at",
        ),
        (["--checkpoint", "base"], "name a checkpoint"),
        (["--checkpoint", "step_9"], "no checkpoint 'step_9'"),
        (["--card", tmp_path / "folder"], "is not a folder that `vlmtune export` wrote"),
        (["--question", "Is it?"], "does not hold {name} once"),
        (["--question", "Any {name}?"], "no held-out sample says in meta.objects"),
    ):
        code, out, err = vlmtune("validate", run, *options)
        assert code == 1 and said in " ".join(err.split()), (options, out, err)
        assert "Traceback" not in err
    assert not (run / "validate.json").exists()
    assert not [path.name for path in run.iterdir() if path.name.startswith(".validate")]
    code, _, err = vlmtune("validate", tmp_path / "folder")
    assert code == 1 and "config.yaml is missing" in err


@pytest.mark.slow
def test_a_damaged_export_fails_in_its_own_process(learned, tmp_path, vlmtune):
    run = learned(4, {"new": blue(6)})
    assert vlmtune("export", run, tmp_path / "exported")[0] == 0
    skip = "--skip=edge_cases,speed,quantised"
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "exported" / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    save_file(weights | {name: torch.randn_like(weights[name]) * 3}, tmp_path / "exported" / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    code, out, _ = vlmtune("validate", run, "--card", tmp_path / "exported", "--json", skip)
    (found,) = [finding for (section, _), finding in findings(out).items() if section == "fresh"]
    assert code == 1 and found["level"] == "fail" and "answers differently" in found["evidence"]
    (tmp_path / "exported" / "tokenizer.json").unlink()
    code, out, _ = vlmtune("validate", run, "--card", tmp_path / "exported", "--json", skip)
    (found,) = [finding for (section, _), finding in findings(out).items() if section == "fresh"]
    assert code == 1 and "tokenizer.json" in found["evidence"]
    shutil.rmtree(tmp_path / "exported")


@pytest.mark.slow
def test_a_run_without_held_out_data_and_with_what_cannot_be_merged(write_config, tmp_path, vlmtune):
    plan = [
        {"match": "language", "train": "adapter", "options": {"dim": 4}},
        {"match": "*", "train": "frozen"},
    ]
    code, out, err = vlmtune("train", write_config("run", 4, plan=plan, checkpoint={"every": 4}))
    assert code == 0, out + err
    code, out, err = vlmtune("validate", tmp_path / "run", "--json", "--skip=edge_cases,speed")
    found = findings(out)
    assert code == 0, out + err
    assert found["task", "something is held out"]["level"] == "warn"
    assert found["fresh", "the exported folder loads in a process of its own"]["level"] == "pass"
    assert "not measured" in found["quantised", "quantised weights answer as float32 does"]["evidence"]


@pytest.mark.slow
def test_a_quantised_base_is_compared_as_it_is_exported(write_config, tmp_path, vlmtune):
    """NF4 moves the losses of a tiny model by more than the limit: a comparison with the trained model would fail."""
    plan = [{"match": "language", "train": "lora", "rank": 4, "store": "nf4"}, {"match": "*", "train": "frozen"}]
    code, out, err = vlmtune("train", write_config("run", 4, plan=plan, checkpoint={"every": 4}))
    assert code == 0, out + err
    others = ",".join(name for name in SECTIONS if name != "fresh")
    code, out, err = vlmtune("validate", tmp_path / "run", "--json", f"--skip={others}")
    assert code == 0, out + err
    (found,) = json.loads(out)
    assert found["what"] == "the exported model loads in a process of its own"


def test_a_chain_is_compared_with_what_it_started_from(chain, tiny_folder, tmp_path, vlmtune):
    assert vlmtune("train", chain("chained"))[0] == 0
    code, out, err = vlmtune("validate", tmp_path / "chained", "--json", LIGHT)
    assert code in (0, 1) and not err
    (written,) = (tmp_path / "chained").rglob("validate.json")
    record = json.loads(written.read_text())
    assert written.parent.name == "3_instruct" and record["base"] == str(tiny_folder("llava"))
    summary = json.loads((tmp_path / "chained" / "1_align" / "summary.json").read_text())
    before = {one["task"]: one["before"] for one in record["figures"]["comparisons"] if one["metric"] == "loss"}
    assert before.keys() == {place.split("/")[1] for place in summary["metrics"]}
