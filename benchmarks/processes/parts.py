"""What each of several processes holds when they train a model in full: all of it, or a part (`train.shard`).

    python benchmarks/processes/parts.py WORK --record

WORK takes the model and the run folders. The model is a LLaVA of 24 blocks of 512 with random weights and a small
vocabulary. Every row is a run of three steps under torchrun with one sample in a micro-batch; measured is the highest
peak of the first process above what it holds without a model, predicted what it said before (`memory.json`), sent what
the calculation says (`adapt.sharding.Parts`; measured for other runs in two_hosts.md).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, LlavaForConditionalGeneration
from two_hosts import parts_of

from vlmtune.config import load_config
from vlmtune.models.tiny import write_tiny

HERE = Path(__file__).parent
MIB = 2**20
RUNS = [(1, False), (2, False), (2, True), (4, False), (4, True)]
"""Processes, and whether each holds a part."""


def write_model(folder: Path) -> None:
    write_tiny("llava", folder)
    config = AutoConfig.from_pretrained(folder)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 512, 1408, 24
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 8, 8, 64
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)


def config_of(model: Path, folder: Path, processes: int, shard: bool) -> Path:
    tree = {
        "model": str(model), "run": str(folder / f"run-{processes}-{shard}"),
        "data": {"train": [{"scenes": "base", "task": "vqa", "limit": 50}], "workers": 0},
        "plan": [{"match": "*", "train": "full"}],
        "train": {"length": "3 steps", "batch_size": 4, "micro_batch_size": 1, "precision": "fp32", "log_every": 1,
                  "shard": shard},
        "optim": {"lr": 1e-5, "warmup": "0 steps"},
        "checkpoint": {"every": "1000 steps"},
    }  # fmt: skip
    path = folder / f"{processes}-{shard}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def measure(model: Path, folder: Path, processes: int, shard: bool) -> dict:
    path = config_of(model, folder, processes, shard)
    command = [sys.executable, "-m", "vlmtune", "train", str(path), "--no-check"]
    several = ["--nproc", str(processes)] if processes > 1 else []
    # else glibc keeps what is freed between two blocks: nearly a GiB here, of which nothing is in use
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    subprocess.run([*command, *several], check=True, env=os.environ | environment)
    config = load_config(str(path))
    memory = json.loads((Path(config.run) / "memory.json").read_text())
    parts = parts_of(path)
    sent = parts.sent(processes, 4 // processes) if shard else parts.sent_when_whole(processes)
    highest = memory.get("highest", memory["measured"])
    return {
        "processes": processes, "shard": shard, "measured": highest, "predicted": memory["predicted_later"],
        "sent": sent, "parameters": parts.trained_divided + parts.trained_whole,
    }  # fmt: skip


def report(rows: list[dict]) -> str:
    first = rows[0]
    lines = [
        f"{first['parameters']:,} parameters, all of them trained in float32 by AdamW; 4 samples a step.",
        "",
        "| processes | each holds | measured MiB, each | of one | predicted MiB | sent by each in a step, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        held = "a part" if row["shard"] else "all"
        lines.append(
            f"| {row['processes']} | {held} | {row['measured'] / MIB:,.0f} | {row['measured'] / first['measured']:.2f} "
            f"| {row['predicted'] / MIB:,.0f} | {row['sent'] / MIB:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=lambda text: Path(text).absolute())
    parser.add_argument("--record", action="store_true", help="write parts.md beside this file")
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    write_model(args.work / "model")
    rows = [measure(args.work / "model", args.work, *run) for run in RUNS]
    text = report(rows)
    print(text)
    if args.record:
        (HERE / "parts.md").write_text(f"# A model in parts\n\n{__doc__.split(chr(10) * 2)[0]}\n\n{text}\n")


if __name__ == "__main__":
    main()
