"""Rows per second and peak memory of indexing a JSONL file, against holding its rows in a list.

    python benchmarks/data/index.py             # prints the table
    python benchmarks/data/index.py --record    # also writes results.md beside this file

Files of 100,000 and 1,000,000 conversations of about 390 bytes in a temporary folder. Every variant runs in a process
of its own on a file that is in the page cache. Memory is the growth of the peak resident size (VmHWM; ru_maxrss of a
child begins with what its parent had) over that of the imported modules:

    list         every line parsed and kept, as loaders do that hand Python objects to their workers
    index        the file is indexed: byte offsets go to a memory-mapped file
    index again  the same file once more: the index is in the cache
    read         10,000 rows at random through the index, parsed into samples (images are looked up, not decoded)
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = (100_000, 1_000_000)
VARIANTS = ("list", "index", "index again", "read")
READS = 10_000


def write_rows(path: Path, count: int) -> None:
    """Conversations of one or two turns, every fifth without an image, and as many images as fit a small folder."""
    rng = random.Random(0)
    words = ["red", "square", "left", "of", "the", "blue", "circle", "and", "how", "many", "small", "triangles"]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = {"type": "text", "text": " ".join(rng.choices(words, k=12)) + "?"}
            content = [text] if number % 5 == 0 else [{"type": "image", "image": f"{number % 100}.png"}, text]
            messages = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": " ".join(rng.choices(words, k=15 + number % 25))},
            ]
            file.write(json.dumps({"id": f"sample-{number}", "task": "vqa", "messages": messages}) + "\n")


def peak_resident() -> int:
    """Bytes, since this process began to run its own program."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measure_here(variant: str, path: Path, cache: Path) -> dict:
    from vlmtune.data.sources import FileSource

    before, started = peak_resident(), time.perf_counter()
    if variant == "list":
        with path.open("rb") as file:
            rows = [json.loads(line) for line in file]
        count = len(rows)
    else:
        source = FileSource(path, cache=cache)
        count = source.size
        if variant == "read":
            rng, started = random.Random(0), time.perf_counter()
            for _ in range(READS):
                source[rng.randrange(count)]
            count = READS
    return {"seconds": time.perf_counter() - started, "rows": count, "grown": peak_resident() - before}


def measure(variant: str, path: Path, cache: Path) -> dict:
    command = [sys.executable, __file__, "--variant", variant, "--file", str(path), "--cache", str(cache)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def table() -> list[str]:
    lines = [
        "| rows | file (MB) | variant | time (s) | rows/s | peak memory (MB) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number in range(100):
            (folder / f"{number}.png").touch()
        for size in SIZES:
            path = folder / f"{size}.jsonl"
            write_rows(path, size)
            for variant in VARIANTS:
                got = measure(variant, path, folder / "cache")
                speed = "" if variant == "index again" else f"{got['rows'] / got['seconds']:,.0f}"  # it reads no row
                lines.append(
                    f"| {size:,} | {path.stat().st_size / 1e6:.0f} | {variant} | {got['seconds']:.4f} "
                    f"| {speed} | {got['grown'] / 1e6:.1f} |"
                )
            path.unlink()
    return lines


def machine() -> str:
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    name = cpu.partition(":")[2].strip()
    return (
        f"{datetime.date.today()}. {name}, {os.cpu_count()} cores, one process of ours at once, "
        f"load average {os.getloadavg()[0]:.1f} at the end, Python {platform.python_version()}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write results.md")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    wish = parser.parse_args()
    if wish.variant:
        print(json.dumps(measure_here(wish.variant, wish.file, wish.cache)))
        return
    lines = [
        "# Indexing a JSONL file", "",
        "Time and growth of peak memory of each variant in a process of its own; the variants are described in "
        "`benchmarks/data/index.py`.",
        "", *table(), "", machine(), "", "Made by `python benchmarks/data/index.py --record`.",
    ]  # fmt: skip
    print("\n".join(lines))
    if wish.record:
        (Path(__file__).parent / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
