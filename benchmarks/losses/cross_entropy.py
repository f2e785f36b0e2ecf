"""Time and peak memory of cross-entropy on full logits against ours, forward and backward, measured in one run.

    python benchmarks/losses/cross_entropy.py             # prints the table
    python benchmarks/losses/cross_entropy.py --record    # also writes results.md beside this file

A batch of image and text: T positions, of which 15% are supervised. "full logits" is what a Hugging Face model does:
project every position, shift, cross-entropy with ignore_index. "ours" projects the supervised rows only, in chunks.
"supervised only" is the plain formula on the same rows: what is left when the selection of rows is taken away.

Times: variants take turns, round by round, in one process; medians. Memory: each variant in a process of its own,
the growth of the peak resident size (VmHWM; ru_maxrss would include the parent's) over what is there before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmtune.losses.language import token_cross_entropy

POSITIONS, SUPERVISED, HIDDEN, VOCABULARY = 2048, 0.15, 512, 49_152
ROUNDS = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def problem(dtype: torch.dtype, trainable: bool) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    """(hidden [T, D], head, labels [T] with -100, mask [T])."""
    torch.manual_seed(0)
    hidden = torch.randn(POSITIONS, HIDDEN, dtype=dtype, requires_grad=True)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype).requires_grad_(trainable)
    mask = torch.rand(POSITIONS) < SUPERVISED
    return hidden, head, torch.randint(VOCABULARY, (POSITIONS,)).masked_fill(~mask, -100), mask


def full_logits(hidden: Tensor, head: nn.Linear, labels: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), labels, ignore_index=-100, reduction="sum")


def supervised_only(hidden: Tensor, head: nn.Linear, labels: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden[mask]).float(), labels[mask], reduction="sum")


def ours(hidden: Tensor, head: nn.Linear, labels: Tensor, mask: Tensor) -> Tensor:
    return token_cross_entropy(hidden[mask], head, labels[mask]).sum()


VARIANTS: dict[str, Callable[..., Tensor]] = {
    "full logits": full_logits,
    "supervised only": supervised_only,
    "ours": ours,
}


def run_once(variant: str, setting: tuple) -> float:
    """The loss, after forward and backward; gradients are dropped again."""
    loss = VARIANTS[variant](*setting)
    loss.backward()
    setting[0].grad = setting[1].weight.grad = None
    return float(loss.detach())


def seconds(dtype: str, trainable: bool, rounds: int) -> dict[str, float]:
    """Median of `rounds` interleaved runs after one that does not count. Asserts that all variants agree."""
    setting = problem(DTYPES[dtype], trainable)
    losses = {variant: run_once(variant, setting) for variant in VARIANTS}
    reference = losses["full logits"]
    assert all(abs(loss - reference) < 1e-3 * reference for loss in losses.values()), losses
    taken: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            start = time.perf_counter()
            run_once(variant, setting)
            taken[variant].append(time.perf_counter() - start)
    return {variant: statistics.median(values) for variant, values in taken.items()}


def peak_growth(variant: str, dtype: str, trainable: bool) -> int:
    """Bytes by which one forward and backward raises the peak resident size; in a fresh process."""
    command = [sys.executable, __file__, "--measure", json.dumps([variant, dtype, trainable])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_here(variant: str, dtype: str, trainable: bool) -> int:
    setting = problem(DTYPES[dtype], trainable)
    small = (setting[0][:8].detach().requires_grad_(), setting[1], setting[2][:8].clamp(min=0), torch.ones(8).bool())
    with torch.no_grad():
        VARIANTS[variant](*small)  # libraries, caches
    before = peak_resident()
    run_once(variant, setting)
    return peak_resident() - before


def peak_resident() -> int:
    """Bytes, since this process began to run its own program."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def table(rounds: int) -> list[str]:
    lines = [
        "| format | head | variant | time (s) | against full logits | peak memory (MB) | against full logits |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for dtype in DTYPES:
        for trainable in (False, True):
            times = seconds(dtype, trainable, rounds)
            memory = {variant: peak_growth(variant, dtype, trainable) for variant in VARIANTS}
            for variant in VARIANTS:
                speed = times["full logits"] / times[variant]
                lean = memory["full logits"] / memory[variant]
                head = "trainable" if trainable else "frozen"
                lines.append(
                    f"| {dtype} | {head} | {variant} | {times[variant]:.2f} | {speed:.1f}x faster "
                    f"| {memory[variant] / 1e6:.0f} | {lean:.1f}x less |"
                )
                print(lines[-1], flush=True)
    return lines


def machine() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.processor()
    load = os.getloadavg()[0]
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} thread used, "
        f"load average {load:.1f} at the end, torch {torch.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write results.md beside this file")
    parser.add_argument("--note", default="", help="a sentence for results.md: what else ran, for example")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"timed runs of each variant (default {ROUNDS})")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        print(measure_here(*json.loads(arguments.measure)))
        return
    lines = table(arguments.rounds)
    about = (
        f"T = {POSITIONS} positions, {SUPERVISED:.0%} of them supervised, D = {HIDDEN}, V = {VOCABULARY:,}; "
        f"forward and backward; times are medians of {arguments.rounds} interleaved runs, memory is the growth of the "
        "peak resident size in a process of its own."
    )
    print(f"\n{about}\n{machine()}")
    if arguments.record:
        text = ["# Cross-entropy: full logits against ours", "", about, "", *lines, ""]
        text += [f"{datetime.date.today()}. {machine()}. {arguments.note}".strip(), ""]
        text += ["Made by `python benchmarks/losses/cross_entropy.py --record`.", ""]
        (Path(__file__).parent / "results.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
