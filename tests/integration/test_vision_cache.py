"""Features of a frozen tower kept on disk: the same training to the last bit, nothing stale, nothing by accident."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file
from sizes_of_tests import by_default
from training_setup import PLAN, png, write_data

from vlmtune.models import trunk
from vlmtune.models.tiny import write_tiny

STEPS = 6


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Where this test's features go."""
    monkeypatch.setenv("VLMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def own_rows(tmp_path) -> Path:
    return write_data(tmp_path / "own", 12)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def weights(run: Path) -> dict:
    folder = run / "checkpoints" / "latest"
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {f"{path.relative_to(folder)}/{name}": value for path in files for name, value in load_file(path).items()}


def came(out: str) -> tuple[int, int]:
    kept, total = re.search(r"vision cache: ([\d,]+) of ([\d,]+) images came with their features", out).groups()
    return int(kept), int(total)


CASES = [(family, precision) for family in ("llava", "qwen2_5_vl", "smolvlm") for precision in ("fp32", "bf16")]


@pytest.mark.parametrize(("family", "precision"), by_default({("llava", "bf16"), ("qwen2_5_vl", "fp32")}, CASES))
def test_the_same_training_to_the_last_bit(vlmtune, write_config, tiny_folder, cache, own_rows, family, precision):
    """Without, with features made on the way, and with features that are all there; in worker processes too."""
    runs = {}
    for name, wish in (("plain", {}), ("first", {"vision_cache": "1GB"}), ("second", {"vision_cache": "1GB"})):
        config = write_config(
            name, STEPS, model=str(tiny_folder(family)),
            data={"train": [{"path": str(own_rows)}], "workers": int(name == "second"), **wish},
        )  # fmt: skip
        code, out, err = vlmtune("train", config, f"train.precision={precision}")
        assert (code, err) == (0, ""), out
        run = config.with_suffix("")
        runs[name] = losses(run), weights(run), out
    assert "vision cache" not in runs["plain"][2]
    assert runs["plain"][0] == runs["first"][0] == runs["second"][0] and len(runs["plain"][0]) == STEPS
    for name in ("first", "second"):
        assert runs[name][1].keys() == runs["plain"][1].keys()
        assert all(value.equal(runs["plain"][1][key]) for key, value in runs[name][1].items())
    kept, total = came(runs["first"][2])
    assert 0 <= kept < total
    assert came(runs["second"][2]) == (total, total)
    assert "start: pass: kept features give the model's own states: largest difference 0.0e+00" in runs["second"][2]


def test_cache_ahead_and_what_changes_is_made_anew(vlmtune, write_config, cache, own_rows, tmp_path):
    source = {"path": str(own_rows)}
    config = write_config("run", 3, data={"train": [source], "workers": 0, "vision_cache": "1GB"})
    code, out, err = vlmtune("cache", config)
    assert (code, err) == (0, ""), out
    assert "11 images were new, 0 were there" in out, "one of twelve rows is text alone"
    code, out, _ = vlmtune("cache", config, "data.workers=1")
    assert code == 0 and "0 images were new, 11 were there" in out
    assert not (tmp_path / "run").exists()
    (folder,) = cache.iterdir()
    assert all(path.suffix == ".safetensors" for path in folder.iterdir())
    code, out, _ = vlmtune("train", config)
    assert code == 0 and came(out) == (12 - 1, 12 - 1), "three steps of four samples"

    (own_rows.parent / "0.png").write_bytes(png(1000))  # another picture under the same name
    code, out, _ = vlmtune("cache", config)
    assert code == 0 and "1 images were new, 10 were there" in out
    code, out, _ = vlmtune("cache", config, f"model={write_tiny('llava', tmp_path / 'other', seed=1)}")
    assert code == 0 and "11 images were new, 0 were there" in out and len(list(cache.iterdir())) == 2


def test_a_small_limit_is_kept_and_said(vlmtune, write_config, cache, own_rows):
    config = write_config("run", 3, data={"train": [{"path": str(own_rows)}], "workers": 0, "vision_cache": "10kB"})
    code, out, err = vlmtune("train", config)
    assert (code, err) == (0, ""), out
    assert "it is full; raise data.vision_cache" in out
    assert sum(path.stat().st_size for path in cache.rglob("*.safetensors")) < 16_000
    code, _, err = vlmtune("cache", config)
    said = " ".join(err.split())
    assert code == 1 and "it is full; raise data.vision_cache" in said and "of 12 rows are left" in said


def test_a_disk_that_refuses_ends_no_training(vlmtune, write_config, cache, own_rows):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder goes")
    config = write_config("run", 3, data={"train": [{"path": str(own_rows)}], "workers": 0, "vision_cache": "1GB"})
    code, out, err = vlmtune("train", config)
    assert (code, err) == (0, ""), out
    assert "cannot be written" in out and came(out)[0] == 0


def test_interrupted_it_keeps_what_was_made(vlmtune, write_config, cache, own_rows, monkeypatch):
    """A signal in the middle; the same command goes on."""
    config = write_config("run", 3, data={"train": [{"path": str(own_rows)}], "workers": 0, "vision_cache": "1GB"})
    whole = trunk.tower_features
    calls: list[int] = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return whole(*arguments)

    monkeypatch.setattr(trunk, "tower_features", interrupted)
    code, _, err = vlmtune("cache", config)
    assert code == 128 + signal.SIGTERM and "stopped by SIGTERM; what was made is kept" in " ".join(err.split())
    monkeypatch.setattr(trunk, "tower_features", whole)
    code, out, _ = vlmtune("cache", config)
    assert code == 0 and "7 images were new, 4 were there" in out


def test_a_damaged_shard_is_named(vlmtune, write_config, cache, own_rows):
    config = write_config("run", 3, data={"train": [{"path": str(own_rows)}], "workers": 0, "vision_cache": "1GB"})
    assert vlmtune("cache", config)[0] == 0
    (shard,) = cache.rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:100])
    code, _, err = vlmtune("train", config)
    assert code == 1 and shard.name in "".join(err.split()) and "is damaged" in err and "delete it" in err
    shard.unlink()
    assert vlmtune("train", config)[0] == 0


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"plan": [{"match": "vision", "train": "full", "lr": 1e-5}, *PLAN[1:]]}, "the vision tower trains"),
        ({"plan": [{"match": "vision", "train": "lora", "rank": 2}, *PLAN[1:]]}, "the vision tower trains"),
        ({"plan": [{"match": "vision", "train": "full", "lr": [[0.0, 0.0], [0.5, 1e-5]]}, *PLAN[1:]]},
         "the vision tower trains"),
    ],
)  # fmt: skip
def test_a_tower_that_trains_at_any_time_is_refused(vlmtune, write_config, cache, tmp_path, section, said):
    config = write_config("run", 4, **section)
    code, _, err = vlmtune("train", config, "data.vision_cache=1GB")
    assert code == 1 and said in " ".join(err.split()) and not (tmp_path / "run").exists()


def test_bad_wishes(vlmtune, write_config, tmp_path):
    config = write_config("run", 3)
    code, _, err = vlmtune("train", config, "data.vision_cache=20")
    assert code == 1 and "data.vision_cache: size 20 is not a size; write a number and a unit" in " ".join(err.split())
    code, _, err = vlmtune("cache", config)
    assert code == 1 and "data.vision_cache is not set" in err
    texts = write_data(tmp_path / "texts", 6, images=False)
    wish = "data.vision_cache=1GB", f"data.train=[{{path: {texts}}}]"
    code, _, err = vlmtune("cache", config, *wish)
    assert code == 1 and "none of 6 rows has an image" in " ".join(err.split())
    code, out, _ = vlmtune("train", config, *wish, "plan.1.train=frozen")
    assert code == 0 and "not compared: none of the first samples has an image" in " ".join(out.split()), out


def test_a_run_goes_on_with_a_larger_cache(vlmtune, write_config, cache, own_rows):
    config = write_config("run", 6, data={"train": [{"path": str(own_rows)}], "workers": 0, "vision_cache": "1GB"})
    whole = write_config("whole", 6, data={"train": [{"path": str(own_rows)}], "workers": 0, "vision_cache": "1GB"})
    assert vlmtune("train", config, "train.length=3")[0] == 0
    assert vlmtune("train", whole)[0] == 0
    code, _, err = vlmtune("train", config, "train.length=3", "data.vision_cache=null")
    assert code == 1 and "data.vision_cache" in err
    code, out, err = vlmtune("train", config, "train.length=3", "data.vision_cache=2GB")
    assert (code, err) == (0, ""), out
