"""What watching a run costs, as a share of a training step (SPEC D5: at most 2 %).

    python benchmarks/stability/overhead.py             # prints the table, about 10 CPU-minutes
    python benchmarks/stability/overhead.py --record    # also writes overhead.md (overhead_cuda.md) beside this file
    python benchmarks/stability/overhead.py --device cuda   # on a GPU, in bf16, with a model of 2 B parameters besides

Three kinds of steps take turns in one process, in rotating order, on the same model: plain (forward, backward, one
joint norm, clip, update), watched (norms by rule, and the loss watch), measured (watched, and the statistics of every
parameter, judged and written to a file). A run measures every `stability.statistics` steps, so

    share of a run = (watched - plain + (measured - watched) / interval) / plain.

Differences are taken within a round and their median is shown, so that a machine that grows slower in between does not
count. They are as uncertain as the steps themselves: `+-` is the range between the quartiles over the square root of
the number of rounds, about one standard error. "alone" is the share of the loss watch and the statistics from a clock
around them, in further steps (on a GPU the clock itself makes the host wait): far more exact, but without the norms by
rule, which take the place of the joint norm, and without what watching does to the rest of a step (caches).
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn

from vlmtune.adapt.plan import Plan, Policy, apply_plan
from vlmtune.checks.during import GradientWatch, LossWatch
from vlmtune.config.course import Stability
from vlmtune.losses.objective import Objective
from vlmtune.models.anatomy import part_modules
from vlmtune.models.embedded import write_embedded
from vlmtune.models.load import load_model
from vlmtune.models.synthetic import BatchShape, synthetic_batch
from vlmtune.models.vlm import VLM, set_training_mode
from vlmtune.observe.log import append_line
from vlmtune.optim.clip import clip_gradients
from vlmtune.optim.optimizer import build_adamw
from vlmtune.optim.precision import Precision, autocast
from vlmtune.optim.statistics import GradientStatistics
from vlmtune.schedule import Length
from vlmtune.step import TrainingModule
from vlmtune.types import Batch

ROUNDS = 15
KINDS = ("plain", "watched", "measured")
INTERVAL = Length.parse(Stability().statistics).steps(1, None)
CLIP, LR = 1.0, 1e-6  # small, so that 50 steps on one batch stay ordinary steps


@dataclass(frozen=True)
class Case:
    """plan: "full" (every parameter trains) or "lora" (rank 16 everywhere: many small parameters, a cheap update)."""

    name: str
    model: Callable[[Path], nn.Module]
    plan: str
    shape: BatchShape


def embedded(folder: Path) -> nn.Module:
    return load_model(str(write_embedded(folder / "embedded")))


def random_llava(folder: Path, hidden: int = 512, layers: int = 8) -> nn.Module:
    """About 50 million parameters; 2 billion with 28 layers of 2560."""
    text = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": hidden * 43 // 16,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 256,
        "vocab_size": 16_000,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
        "num_attention_heads": 6, "image_size": 224, "patch_size": 14,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=500, image_seq_length=256, tie_word_embeddings=False
    )
    return transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")


# few samples: the smaller the step, the larger the share of watching it
CASES = (
    Case("embedded, full", embedded, "full", BatchShape(8, 128, 1, 224, 224, 32)),
    Case("50 M, full", random_llava, "full", BatchShape(1, 320, 1, 224, 224, 32)),
    Case("50 M, LoRA", random_llava, "lora", BatchShape(1, 320, 1, 224, 224, 32)),
)
LARGE = partial(random_llava, hidden=2560, layers=28)
GPU_CASES = (
    Case("2 B, full", LARGE, "full", BatchShape(1, 320, 1, 224, 224, 32)),
    Case("2 B, LoRA", LARGE, "lora", BatchShape(1, 320, 1, 224, 224, 32)),
)


def apply(model: nn.Module, plan: str) -> Plan:
    adapted = Policy("full", lr=LR) if plan == "full" else Policy("lora", lr=LR, rank=16, alpha=32.0)
    rest = adapted if plan == "full" else Policy("frozen")
    parts = [part for part, modules in part_modules(model).items() if modules]
    rules = [(part, rest if part in ("embed", "lm_head") else adapted) for part in parts]
    return apply_plan(model, rules, "benchmark", seed=0)


@dataclass
class Clock:
    """Seconds within `with`, added up; the device has done what it was given by then."""

    device: torch.device
    seconds: float = 0.0
    _since: float = field(default=0.0)

    def __enter__(self) -> None:
        self._wait()
        self._since = time.perf_counter()

    def __exit__(self, *failure: object) -> None:
        self._wait()
        self.seconds += time.perf_counter() - self._since

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Steps:
    """The three kinds of steps of one model on one batch."""

    def __init__(self, model: nn.Module, plan: Plan, batch: Batch, folder: Path):
        self.plan, self.batch, self.file = plan, batch, folder / "gradients.jsonl"
        self.module = TrainingModule(VLM(model), Objective())
        self.optimizer = build_adamw(plan.optimizer_groups(), (0.9, 0.999), 1e-8)
        self.parameters = list(plan.parameters.values())
        self.statistics = GradientStatistics(plan.parameters)
        self.watch, self.gradients = LossWatch(), GradientWatch()
        self.groups = plan.groups()
        self.device = next(model.parameters()).device
        self.precision: Precision = "bf16" if self.device.type == "cuda" else "fp32"

    def run(self, kind: str, watching: Clock | None = None) -> float:
        """Seconds of a step. watching: gets the seconds of watching within it."""
        whole = Clock(self.device)
        with whole:
            with autocast(self.precision, self.device):
                losses = self.module(self.batch, self.module.objective.weights([self.batch]))
            losses.total.backward()
            loss = float(losses.total.detach())
            if kind == "plain":
                float(nn.utils.clip_grad_norm_(self.parameters, CLIP))
                self.optimizer.step()
            else:
                self._watched(loss, kind == "measured", watching or nullcontext())
            self.optimizer.zero_grad()
        return whole.seconds

    def _watched(self, loss: float, is_measured: bool, watching: AbstractContextManager) -> None:
        with watching:
            begun = self.statistics.begin() if is_measured else None
        norms = clip_gradients(self.groups, CLIP)
        torch.stack(list(norms.values())).tolist()
        self.optimizer.step()
        with watching:
            self.watch.observe(loss)
            if begun is not None:
                rows = self.statistics.end(begun)
                self.gradients.observe(rows)
                append_line(self.file, {"step": 0, "parameters": {name: asdict(row) for name, row in rows.items()}})


@dataclass(frozen=True)
class Result:
    """Seconds by kind of step, round by round, and of watching within it; parameters: how many tensors train, of how
    many numbers."""

    seconds: dict[str, list[float]]
    watching: dict[str, list[float]]
    tensors: int
    numbers: int

    @property
    def plain(self) -> float:
        return statistics.median(self.seconds["plain"])

    def difference(self, one: str, other: str) -> tuple[float, float]:
        """(median, uncertainty) of one - other within a round, as a share of a plain step."""
        gaps = [a - b for a, b in zip(self.seconds[one], self.seconds[other], strict=True)]
        low, _, high = statistics.quantiles(gaps, n=4)
        return statistics.median(gaps) / self.plain, (high - low) / len(gaps) ** 0.5 / self.plain

    def side_by_side(self) -> tuple[float, float]:
        """(share of a run, its uncertainty)."""
        (every, about_every), (some, about_some) = (
            self.difference("watched", "plain"), self.difference("measured", "watched"),
        )  # fmt: skip
        return every + some / INTERVAL, (about_every**2 + (about_some / INTERVAL) ** 2) ** 0.5

    def alone(self) -> float:
        """Share of a run: of the loss watch in every step, and of the statistics in every INTERVAL-th."""
        every, some = (statistics.median(self.watching[kind]) for kind in ("watched", "measured"))
        return (every + (some - every) / INTERVAL) / self.plain

    def measured_step(self) -> float:
        return statistics.median(self.watching["measured"]) / self.plain


def measure(case: Case, rounds: int, device: torch.device) -> Result:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = case.model(folder).to(device)
        plan = apply(model, case.plan)
        set_training_mode(model)
        batch = synthetic_batch(model.config, case.shape)
        noise = {n: torch.randn(v.shape) if v.is_floating_point() else v for n, v in batch.inputs.items()}
        batch.inputs = noise
        steps = Steps(model, plan, batch.to(device), folder)
        for kind in KINDS:  # AdamW's state, caches
            steps.run(kind)
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        watching: dict[str, list[float]] = {kind: [] for kind in KINDS[1:]}
        for n in range(rounds):
            for kind in KINDS[n % 3 :] + KINDS[: n % 3]:
                seconds[kind].append(steps.run(kind))
        for _ in range(math.ceil(rounds / 3)):
            for kind, found in watching.items():
                clock = Clock(device)
                steps.run(kind, clock)
                found.append(clock.seconds)
        parameters = plan.parameters.values()
        return Result(seconds, watching, len(parameters), sum(p.numel() for p in parameters))


HEADER = [
    "| model, plan | trained tensors | of numbers | plain step (s) | watched - plain | measured - watched "
    "| share of a run | alone: in a measuring step | alone: share of a run |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
]


def line(case: Case, result: Result) -> str:
    def shown(pair: tuple[float, float]) -> str:
        return f"{100 * pair[0]:+.2f} +- {100 * pair[1]:.2f} %"

    return (
        f"| {case.name} | {result.tensors} | {result.numbers / 1e6:.1f} M | {result.plain:.3f} "
        f"| {shown(result.difference('watched', 'plain'))} | {shown(result.difference('measured', 'watched'))} "
        f"| {shown(result.side_by_side())} | {100 * result.measured_step():.2f} % | {100 * result.alone():.4f} % |"
    )


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    models = [entry for entry in Path("/proc/cpuinfo").read_text().splitlines() if entry.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.processor()
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} thread used, load average {os.getloadavg()[0]:.1f} "
        f"at the end, torch {torch.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names of cases (default: all)")
    parser.add_argument("--record", action="store_true", help="write overhead.md beside this file")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"steps of each kind, 2 or more (default {ROUNDS})")
    parser.add_argument("--note", default="", help="a sentence for overhead.md: what else ran, for example")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    if options.record and options.names:
        parser.error("--record writes the whole table: leave the names out")
    if options.rounds < 2:
        parser.error("--rounds must be 2 or more: one number has no quartiles")
    torch.set_num_threads(1)
    device = torch.device(options.device)
    lines = list(HEADER)
    print("\n".join(lines), flush=True)
    for case in CASES + (GPU_CASES if options.device == "cuda" else ()):
        if not options.names or any(wish in case.name for wish in options.names):
            lines.append(line(case, measure(case, options.rounds, device)))
            print(lines[-1], flush=True)
    number_format = "bf16" if options.device == "cuda" else "float32"
    about = (
        f"{number_format}; {options.rounds} steps of each kind in turns; a run measures every {INTERVAL} steps. "
        "Shares are of a plain step; what the columns are is said in `overhead.py`."
    )
    print(f"\n{about}\n{machine(device)}")
    if options.record:
        text = ["# What watching a run costs", "", about, "", *lines, ""]
        text += [f"{datetime.date.today()}. {machine(device)}. {options.note}".strip(), ""]
        command = "python benchmarks/stability/overhead.py --record" + " --device cuda" * (options.device == "cuda")
        text += [f"Made by `{command}`.", ""]
        name = "overhead.md" if options.device == "cpu" else "overhead_cuda.md"
        (Path(__file__).parent / name).write_text("\n".join(text))


if __name__ == "__main__":
    main()
