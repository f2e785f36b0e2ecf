"""Two machines as network namespaces of this one: bytes on the wire per step, and what happens when the cable is cut.

    sudo python benchmarks/processes/two_hosts.py WORK --record

Each of two processes runs in a namespace of its own, joined by a virtual cable whose counters are read between two
steps. The calculation (`adapt.sharding.Parts`): in a ring of n processes each sends 2 (n - 1)/n of the gradients, 4
bytes a number; in parts it sends (n - 1)/n of the weights for the forward, again for the backward of blocks that have
one, and of the gradients what gloo makes of a sum to owners: 2 (n - 1)/n (NCCL: half of that). WORK takes the run
folders. Needs root and `ip`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from vlmtune.adapt.plan import apply_plan
from vlmtune.adapt.sharding import Parts
from vlmtune.build import load_base
from vlmtune.build_course import training_policies
from vlmtune.config import load_config

HERE = Path(__file__).parent
HOSTS = ("vlmtune-a", "vlmtune-b")
CABLE = ("vlmtune0", "vlmtune1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
TIMEOUT = 10  # train.rank_timeout
BETWEEN = (18, 30)  # steps between which bytes are counted: a run looks at its probe after steps 16 and 32
LORA = [
    {"match": "vision", "train": "frozen"}, {"match": "projector", "train": "full"},
    {"match": "language", "train": "lora", "rank": 16}, {"match": "*", "train": "frozen"},
]  # fmt: skip
FULL = [{"match": "vision", "train": "frozen"}, {"match": "*", "train": "full"}]
RUNS = {"lora": (LORA, False), "full": (FULL, False), "lora, in parts": (LORA, True), "full, in parts": (FULL, True)}
"""Name -> plan, and whether each process holds a part of the model."""


@contextlib.contextmanager
def two_hosts() -> Iterator[None]:
    for host in HOSTS:
        _ip("netns", "add", host)
    try:
        _ip("link", "add", CABLE[0], "netns", HOSTS[0], "type", "veth", "peer", "name", CABLE[1], "netns", HOSTS[1])
        for host, cable, address in zip(HOSTS, CABLE, ADDRESSES, strict=True):
            _ip("-n", host, "addr", "add", f"{address}/24", "dev", cable)
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", host, "link", "set", cable, "up")
        yield
    finally:
        for host in HOSTS:
            _ip("netns", "del", host)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def start(rank: int, config: Path, port: int) -> subprocess.Popen:
    environment = {
        "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "GROUP_RANK": rank, "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": CABLE[rank], "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    settings = [f"{name}={value}" for name, value in environment.items()]
    command = ["ip", "netns", "exec", HOSTS[rank], "env", *settings, sys.executable, "-m", "vlmtune", "train"]
    return subprocess.Popen([*command, str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def write(folder: Path, name: str, steps: int) -> Path:
    tree = {
        "model": "embedded", "run": str(folder / f"run-{name}".replace(" ", "-")),
        "data": {"train": [{"scenes": "base", "task": "vqa", "limit": 200}], "workers": 0},
        "plan": RUNS[name][0],
        "train": {
            "length": f"{steps} steps", "batch_size": 8, "micro_batch_size": 4, "precision": "fp32", "log_every": 1,
            "rank_timeout": TIMEOUT, "shard": RUNS[name][1],
        },
        "checkpoint": {"every": "1000 steps"},
    }  # fmt: skip
    path = folder / f"{name}.yaml".replace(" ", "-")
    path.write_text(yaml.safe_dump(tree))
    return path


def wait_for(run: Path, step: int, processes: list[subprocess.Popen]) -> None:
    history = run / "history.jsonl"
    while not history.exists() or sum(1 for _ in history.open()) < step:
        for process in processes:
            if process.poll() is not None:
                raise SystemExit(f"a process ended before step {step}: {process.stderr.read()}")
        time.sleep(0.01)


def bytes_sent(rank: int) -> int:
    place = f"/sys/class/net/{CABLE[rank]}/statistics/tx_bytes"
    return int(subprocess.check_output(["ip", "netns", "exec", HOSTS[rank], "cat", place]))


def count(folder: Path, name: str, port: int) -> dict:
    """Bytes per step that one process sends, counted and calculated."""
    config = write(folder, name, BETWEEN[1] + 5)
    processes = [start(rank, config, port) for rank in range(2)]
    run = Path(load_config(str(config)).run)
    counters = []
    for step in BETWEEN:
        wait_for(run, step, processes)
        counters.append([bytes_sent(rank) for rank in range(2)])
    codes = [process.wait() for process in processes]
    assert codes == [0, 0], [process.stderr.read() for process in processes]
    parts = parts_of(config)
    is_in_parts = RUNS[name][1]
    calculated = parts.sent(2, micro_batches=1, over_gloo=True) if is_in_parts else parts.sent_when_whole(2)
    trained = parts.trained_whole + parts.trained_divided
    steps = BETWEEN[1] - BETWEEN[0]
    counted = [(after - before) / steps for before, after in zip(*counters, strict=True)]
    return {"plan": name, "trained": trained, "counted": counted, "calculated": calculated}


def parts_of(path: Path) -> Parts:
    config = load_config(str(path))
    rules = training_policies(config, config.train.precision)
    model = load_base(config, rules=rules).model
    return Parts.of(model, apply_plan(model, rules, config.model, config.train.seed))


def cut(folder: Path, name: str, port: int) -> dict:
    """Seconds from the cut to the end of each process, and what it said."""
    config = write(folder, name, 100_000)
    config.write_text(config.read_text().replace("/run-", "/cut-"))
    processes = [start(rank, config, port) for rank in range(2)]
    wait_for(Path(load_config(str(config)).run), 5, processes)
    _ip("-n", HOSTS[0], "link", "set", CABLE[0], "down")
    begun, ended = time.monotonic(), {}
    while len(ended) < 2 and time.monotonic() - begun < 20 * TIMEOUT:
        for rank, process in enumerate(processes):
            if rank not in ended and process.poll() is not None:
                ended[rank] = time.monotonic() - begun
        time.sleep(0.05)
    for process in processes:
        process.kill()
    _ip("-n", HOSTS[0], "link", "set", CABLE[0], "up")
    said = [process.stderr.read().strip().splitlines() for process in processes]
    return {
        "plan": name, "timeout": TIMEOUT, "seconds": [ended.get(rank) for rank in range(2)],
        "codes": [process.returncode for process in processes], "said": [lines[-1] if lines else "" for lines in said],
    }  # fmt: skip


def report(rows: list[dict], silences: list[dict]) -> str:
    lines = [
        "| plan | parameters trained | bytes a step, each process: counted | calculated | counted / calculated |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        counted = " and ".join(f"{value:,.0f}" for value in row["counted"])
        ratio = " and ".join(f"{value / row['calculated']:.3f}" for value in row["counted"])
        lines.append(f"| {row['plan']} | {row['trained']:,} | {counted} | {row['calculated']:,} | {ratio} |")
    for silence in silences:
        seconds = ["did not end" if s is None else f"{s:.1f} s" for s in silence["seconds"]]
        lines += [
            "",
            f"{silence['plan'].capitalize()}: the cable is cut after step 5, with train.rank_timeout: "
            f"{silence['timeout']}. The processes end after {' and '.join(seconds)}, with exit codes "
            f"{' and '.join(map(str, silence['codes']))}:",
            "",
            *(f"- {text}" for text in silence["said"]),
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=lambda text: Path(text).absolute())
    parser.add_argument("--record", action="store_true", help="write two_hosts.md beside this file")
    args = parser.parse_args()
    if os.geteuid():
        raise SystemExit("network namespaces need root")
    args.work.mkdir(parents=True)
    with two_hosts():
        rows = [count(args.work, name, 29511 + n) for n, name in enumerate(RUNS)]
        silences = [cut(args.work, name, 29520 + n) for n, name in enumerate(("lora", "full, in parts"))]
    text = report(rows, silences)
    print(text)
    if args.record:
        head = __doc__.split("\n\n")[0]
        (HERE / "two_hosts.md").write_text(f"# Two machines\n\n{head}\n\n{text}\n")


if __name__ == "__main__":
    main()
