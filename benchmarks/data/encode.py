"""Samples per second and peak memory of counting tokens before training, and of encoding samples.

    python benchmarks/data/encode.py             # prints the table
    python benchmarks/data/encode.py --record    # also writes encode.md beside this file

100,000 conversations of `index.py` (and 1,000,000 for the embedded model, counted only) with
100 JPEG pictures of 20 sizes around 640 x 480, through the processors of the
embedded model and of a Qwen2.5-VL of the real pixel settings with a small tokenizer. Every variant runs in a process of
its own. Memory is the growth of the peak resident size over that of the loaded processor:

    count         the length of every row, from image headers (`survey_source`), one process
    count again   the same once more: it is in the cache
    encode        2,000 rows at random, images decoded and resized
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from index import machine, peak_resident, write_rows

ENCODED = 2_000
VARIANTS = ("count", "count again", "encode")
MODELS = ("embedded", "qwen2_5_vl")
CASES = {  # model, number of rows -> variants
    ("embedded", 100_000): VARIANTS,
    ("qwen2_5_vl", 100_000): VARIANTS,
    ("embedded", 1_000_000): ("count", "count again"),
}
REAL_PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}  # what Qwen2.5-VL ships with


def write_pictures(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(100):
        size = (640 + 8 * (number % 20), 480 - 8 * (number % 20))
        noise = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)).resize(size)
        noise.save(folder / f"{number}.png", "JPEG", quality=85)  # rows name .png; Pillow reads the content


def load_encoder(model: str, folder: Path):
    from vlmtune.build import resolve_model
    from vlmtune.data.encode import Encoder
    from vlmtune.data.grounding import coordinates
    from vlmtune.models.load import load_processor
    from vlmtune.models.tiny import write_tiny

    if model == "embedded":
        return Encoder(load_processor(resolve_model("embedded")), coordinates("bins"))
    processor = load_processor(str(write_tiny(model, folder / f"{model}-{os.getpid()}")))
    processor.image_processor.size = type(processor.image_processor.size)(**REAL_PIXELS)
    return Encoder(processor, coordinates("pixels"))


def measure_here(model: str, variant: str, path: Path, cache: Path) -> dict:
    import torch

    from vlmtune.data.sources import FileSource
    from vlmtune.data.survey import survey_source
    from vlmtune.data.window import Window

    torch.set_num_threads(1)
    encoder = load_encoder(model, path.parent)
    source = FileSource(path, cache=cache)
    encoder.encode(source[1])
    before, started = peak_resident(), time.perf_counter()
    if variant == "encode":
        rng = random.Random(0)
        for _ in range(ENCODED):
            encoder.encode(source[rng.randrange(source.size)])
        rows = ENCODED
    else:
        rows = len(survey_source(source, encoder, Window(4096), cache / "lengths").tokens)
    return {"seconds": time.perf_counter() - started, "rows": rows, "grown": peak_resident() - before}


def measure(*arguments: str) -> dict:
    names = ("--model", "--variant", "--file", "--cache")
    pairs = [text for pair in zip(names, arguments, strict=True) for text in pair]
    out = subprocess.run([sys.executable, __file__, *pairs], check=True, capture_output=True, text=True).stdout
    return json.loads(out)


def table() -> list[str]:
    lines = [
        "| model | variant | rows | time (s) | rows/s | peak memory (MB) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_pictures(folder)
        for (model, size), variants in CASES.items():
            path = folder / f"{size}.jsonl"
            if not path.exists():
                write_rows(path, size)
            for variant in variants:
                got = measure(model, variant, str(path), str(folder / f"cache-{model}-{size}"))
                speed = "" if variant == "count again" else f"{got['rows'] / got['seconds']:,.0f}"
                lines.append(
                    f"| {model} | {variant} | {got['rows']:,} | {got['seconds']:.2f} | {speed} "
                    f"| {got['grown'] / 1e6:.1f} |"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write encode.md")
    parser.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    wish = parser.parse_args()
    if wish.variant:
        print(json.dumps(measure_here(wish.model, wish.variant, wish.file, wish.cache)))
        return
    lines = [
        "# Counting and encoding samples", "",
        "Each variant in a process of its own; they are described in `benchmarks/data/encode.py`.",
        "", *table(), "", machine(), "", "Made by `python benchmarks/data/encode.py --record`.",
    ]  # fmt: skip
    print("\n".join(lines))
    if wish.record:
        (Path(__file__).parent / "encode.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
