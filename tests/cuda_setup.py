"""A short run on the GPU, by its config."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from training_setup import write_data

from vlmtune.config import parse_config
from vlmtune.run import train


def run_of(model: Path, tmp_path: Path, store: str = "fp32", **sections) -> Path:
    """4 steps of a tiny LLaVA, projector in full and LoRA on the language model; `sections` replace those of the
    config, but `train` is merged. The same call again continues the run."""
    plan = [
        {"match": "projector", "train": "full"},
        {"match": "language", "train": "lora", "rank": 4, "store": store},
        *({"match": part, "train": "frozen"} for part in ("vision", "embed", "lm_head")),
    ]
    config = {
        "model": str(model),
        "run": str(tmp_path / "run"),
        "data": {"train": [{"path": str(write_data(tmp_path / "data", 12))}], "workers": 0},
        "plan": plan,
        **sections,
        "train": {
            "length": "4 steps", "batch_size": 4, "micro_batch_size": 2, "log_every": 1, **sections.get("train", {}),
        },
    }  # fmt: skip
    train(parse_config(config), Console(quiet=True))
    return tmp_path / "run"
