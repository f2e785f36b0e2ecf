"""`train.packing`, `train.micro_batch_tokens`, `train.fused`: the same training with less work, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmtune.models.packing import PACKED_ATTENTION

TRAIN = {"length": 5, "batch_size": 4, "precision": "fp32", "log_every": 1}
OPTIM = {"lr": 1e-3, "warmup": 0}
PLAN = [
    {"match": "vision", "train": "frozen"}, {"match": "projector", "train": "full"},
    {"match": "language", "train": "lora", "rank": 4},
    {"match": "embed", "train": "frozen"}, {"match": "lm_head", "train": "frozen"},
]  # fmt: skip
PADDED = {"packing": False, "fused": False, "micro_batch_size": 4}


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def start(run: Path) -> dict[str, dict]:
    return {finding["what"]: finding for finding in json.loads((run / "start.json").read_text())}


WAYS = {
    "defaults": {"micro_batch_size": 4},
    "tokens": {"micro_batch_tokens": 128},
    "padded tokens": {"micro_batch_tokens": 128, "packing": False},
    "checkpointing": {"micro_batch_size": 4, "gradient_checkpointing": True},
    "checkpointing of a part": {"micro_batch_size": 4, "gradient_checkpointing": ["language"]},
}


@pytest.fixture
def trained(vlmtune, write_config, rows):
    def run(name: str, plan: list[dict] = PLAN, **train) -> tuple[Path, str]:
        data = {"train": [{"path": str(rows)}], "workers": 0, "max_length": 128}
        config = write_config(name, 5, data=data, plan=plan, optim=OPTIM, train=TRAIN | train)
        code, out, err = vlmtune("train", config)
        assert code == 0, err
        return config.with_suffix(""), out

    return run


def test_every_way_is_the_same_training(trained):
    """Float32 rounding of other orders of summation grows over five steps of Adam; a lost sample would be 1e-1."""
    expected = losses(trained("padded", **PADDED)[0])
    assert len(expected) == 5
    for name, wish in WAYS.items():
        run, out = trained(name.replace(" ", "_"), **wish)
        assert losses(run) == pytest.approx(expected, rel=1e-4)
        found = start(run)
        states = "without padding the model has its own states"
        assert (states in found) == wish.get("packing", True)
        assert found["modules with fewer passes give the model's own states"]["level"] == "pass"
        padding = "no padding" if wish.get("packing", True) else "padding included"
        assert f"{padding})" in " ".join(out.split())
        for file in run.rglob("config.json"):
            assert PACKED_ATTENTION not in file.read_text()


@pytest.mark.slow
def test_a_packed_run_resumes_to_the_last_bit(trained):
    whole, _ = trained("whole", micro_batch_tokens=128)
    part, _ = trained("part", micro_batch_tokens=128)
    for newer in sorted((part / "checkpoints").glob("step_*"))[-1:]:
        for file in sorted(newer.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        newer.rmdir()
    again, _ = trained("part", micro_batch_tokens=128)
    assert losses(again)[-1] == losses(whole)[-1]


def test_families_that_cannot_be_packed(vlmtune, write_config, tiny_folder, rows):
    """auto keeps padding and says why; true is refused before anything is written."""
    sections = {"model": str(tiny_folder("gemma3")), "plan": PLAN[:-1], "optim": OPTIM}
    config = write_config("auto", 2, train=TRAIN | {"length": 1}, **sections)
    code, out, err = vlmtune("train", config)
    assert code == 0, err
    assert "padding stays: the attention of gemma3 looks ahead within images" in " ".join(out.split())
    config = write_config("packed", 2, train=TRAIN | {"packing": True}, **sections)
    code, _, err = vlmtune("train", config)
    assert code == 1 and "train.packing: the attention of gemma3" in err and "set it to auto or false" in err
    assert not config.with_suffix("").exists()


@pytest.mark.parametrize(
    "train, data, said",
    [
        ({"gradient_checkpointing": ["vision"]}, {}, "nothing of the vision tower trains"),
        ({"gradient_checkpointing": []}, {}, "gradient_checkpointing"),
        ({"micro_batch_tokens": 64}, {"max_length": 128}, "one sample may have 128 (data.max_length)"),
        ({"micro_batch_tokens": 4}, {}, "micro_batch_tokens"),
        ({"micro_batch_size": 3}, {}, "batch_size 4 is not a multiple of micro_batch_size 3"),
        ({"packing": "sometimes"}, {}, "packing"),
    ],
)
def test_wishes_that_contradict(vlmtune, write_config, rows, train, data, said):
    sources = {"train": [{"path": str(rows)}], "workers": 0, **data}
    code, _, err = vlmtune("train", write_config("run", 2, data=sources, train=TRAIN | train))
    assert code == 1 and said in " ".join(err.split())


def test_methods_that_read_padded_rows(vlmtune, write_config, rows):
    for method, why in (
        ("cross_modal", "train: cross_modal reads padded rows"),
        ("prefix", "vlmtune_prefix, not sdpa"),
    ):
        plan = [
            *PLAN[:2],
            {"match": "language.norm", "train": "frozen"},
            {"match": "language", "train": method},
            *PLAN[3:],
        ]
        config = write_config(method, 1, plan=plan, optim=OPTIM, train=TRAIN | {"length": 1})
        code, out, err = vlmtune("train", config)
        assert code == 0, err
        assert f"padding stays: {'the attention function of its language model is ' * (method == 'prefix')}{why}" in out
