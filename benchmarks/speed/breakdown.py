"""Where a step of vlmtune spends its time: torch's profiler over three steps, by operator.

python benchmarks/speed/breakdown.py WORK/…/arm-1/config.yaml     # a config that run.py wrote for vlmtune
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from vlmtune.build_course import build_optimizer
from vlmtune.config import load_config
from vlmtune.models.vlm import VLM, set_training_mode
from vlmtune.optim.clip import clip_gradients
from vlmtune.optim.precision import autocast
from vlmtune.prepare import prepare
from vlmtune.step import TrainingModule

CPU = torch.device("cpu")
WARMUP, STEPS = 3, 3
GROUPS = {  # operator -> what it is counted as; the others are small
    "products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "copies between formats": ("aten::copy_",),
}


def main(path: Path) -> None:
    config = load_config(str(path))
    torch.set_num_threads(config.train.threads or 2)
    made = prepare(config, CPU, Console(quiet=True))
    module = TrainingModule(VLM(made.model), made.objective)
    set_training_mode(made.model)
    optimizer = build_optimizer(config, made.plan, made.objective, CPU)

    def step(number: int) -> None:
        micro_batches = made.steps[number]
        weights = made.objective.weights(micro_batches)
        for batch in micro_batches:
            with autocast(made.settings.precision, CPU):
                losses = module(batch, weights)
            losses.total.backward()
        clip_gradients(made.plan.groups(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for number in range(WARMUP):
        step(number)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for number in range(WARMUP, WARMUP + STEPS):
            step(number)
    spent = {event.key: event.self_cpu_time_total / 1e6 / STEPS for event in profiler.key_averages()}
    total = sum(spent.values())
    counted = {name: sum(s for key, s in spent.items() if key.startswith(of)) for name, of in GROUPS.items()}
    for name, seconds in (counted | {"everything else": total - sum(counted.values())}).items():
        print(f"{seconds / total:6.1%}  {seconds:.3f} s a step  {name}")
    print("\nlargest operators:")
    for key, seconds in sorted(spent.items(), key=lambda pair: -pair[1])[:12]:
        print(f"{seconds / total:6.1%}  {key}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
