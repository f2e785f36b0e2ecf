"""What a saved model answers in a process that holds nothing else.

`vlmtune validate` starts `python -m vlmtune.validation.fresh FOLDER CONFIG PLACES` and compares. The samples are read
from the run's own data; nothing of the trained model but the folder reaches this process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vlmtune.build import build_eval_groups, build_train
from vlmtune.checks.outcome import Fresh
from vlmtune.config import Config, load_config
from vlmtune.data.encode import Encoder
from vlmtune.errors import VlmtuneError
from vlmtune.evaluate.answers import Answer, answer
from vlmtune.optim.precision import Precision
from vlmtune.types import Sample
from vlmtune.use import open_model

Place = tuple[str | None, int, int]
"""Group of data.eval (None: data.train), number of the source in it, row."""
NEW_TOKENS = 16
SECONDS = 1800  # of a model that does not load, nothing else would be heard


def places_to_ask(config: Config, encoder: Encoder, count: int) -> list[Place]:
    """Where the first `count` samples stand that can be encoded as they are: held-out ones, else of the training."""
    found: list[Place] = []
    groups = build_eval_groups(config) or {None: [member.source for member in build_train(config.data)]}
    for group, sources in groups.items():
        for number, source in enumerate(sources):
            for row in range(min(count, source.size or count)):
                if len(found) < count and _can_be_encoded(encoder, source, row):
                    found.append((group, number, row))
    return found


def _can_be_encoded(encoder: Encoder, source, row: int) -> bool:
    try:
        encoder.encode(source[row])
    except VlmtuneError:  # data.on_bad_row and data.on_overlong said what becomes of it
        return False
    return True


def samples_at(config: Config, places: Sequence[Place]) -> list[Sample]:
    groups = build_eval_groups(config) | {None: [member.source for member in build_train(config.data)]}
    return [groups[group][number][row] for group, number, row in places]


def answers_at(
    network, encoder: Encoder, precision: Precision, config: Config, places: Sequence[Place]
) -> list[Answer]:
    samples = samples_at(config, places)
    return answer(
        network, encoder, {"": samples}, batch_size=1, max_new_tokens=NEW_TOKENS, precision=precision
    )  # fmt: skip


def record_of(answers: Sequence[Answer], encoder: Encoder) -> dict[str, list]:
    """Of each sample the ids of its prompt, its loss, and the reply."""
    return {
        "prompts": [encoder.encode_prompt(one.sample).ids.tolist() for one in answers],
        "losses": [one.loss for one in answers],
        "replies": [one.reply for one in answers],
    }


def ask_fresh(
    folder: Path, config: Path, places: Sequence[Place], here: dict[str, list], precision: Precision
) -> Fresh:
    """Start the process, and compare what it answers with what was answered here. precision: the shorter format."""
    command = [sys.executable, "-m", "vlmtune.validation.fresh", str(folder), str(config), json.dumps(places)]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Fresh(SECONDS, error=f"it had not answered after {SECONDS} s")
    seconds = time.perf_counter() - began
    if done.returncode:
        return Fresh(seconds, error=(done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300])
    there = json.loads(done.stdout.splitlines()[-1])
    return Fresh(
        seconds,
        list(zip(there["losses"], here["losses"], strict=True)),
        there["prompts"] == here["prompts"],
        sum(one == other for one, other in zip(there["replies"], here["replies"], strict=True)),
        len(here["replies"]),
        precision,
    )


def main(folder: str, config: str, places: str) -> None:
    network, encoder, precision = open_model(folder)
    answers = answers_at(network, encoder, precision, load_config(config), json.loads(places))
    print(json.dumps(record_of(answers, encoder)))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except VlmtuneError as error:
        sys.exit(str(error))
