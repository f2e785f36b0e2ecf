"""Held-out samples that the run page shows: chosen before training, answered before, on the way, and after (SPEC H2).

samples.json holds what does not change (picture, question, reference) and the first and last answers; a record of kind
"samples" in history.jsonl holds the answers of one step, in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vlmtune.data.encode import Encoder
from vlmtune.data.images import load_image
from vlmtune.data.sources import SampleSource
from vlmtune.evaluate.evaluation import Scored
from vlmtune.evaluate.generate import generate_replies
from vlmtune.evaluate.metrics import reference_text
from vlmtune.models.vlm import set_training_mode
from vlmtune.observe.log import History
from vlmtune.observer import Observer
from vlmtune.optim.precision import Precision, autocast
from vlmtune.paths import write_text
from vlmtune.types import Box, Boxes, Part, Points, Sample, Text, Turn

LOOKED_AT = 200  # rows of a source, evenly spread, where every evaluation is of all of them
SHOWN_WORDS = 60  # characters of a question or reply in the console

Answer = tuple[str, list[Box]]
"""A reply, and the boxes in it in original pixels."""


class Gallery:
    """The samples of a run that are shown.

    count: how many, spread over groups and tasks; limit: rows of a source that evaluations during training see.
    """

    def __init__(self, groups: Mapping[str, Sequence[SampleSource]], limit: int | None, count: int):
        places: dict[tuple[str, str], list[Sample]] = {}
        for group, sources in groups.items() if count else ():
            for source in sources:
                for row in _rows(source, limit):
                    sample = source[row]
                    if sample.images:
                        places.setdefault((group, sample.task), []).append(sample)
        per_place = -(-count // max(1, len(places)))
        chosen = [(group, sample) for (group, _), samples in places.items() for sample in samples[:per_place]]
        self.samples = chosen[:count]

    def describe(self, folder: Path) -> list[dict[str, Any]]:
        """Entries of samples.json without answers; the first picture of each is written to images/."""
        (folder / "images").mkdir(exist_ok=True)
        return [self._describe(folder, number, *pair) for number, pair in enumerate(self.samples)]

    @staticmethod
    def _describe(folder: Path, number: int, group: str, sample: Sample) -> dict[str, Any]:
        image = load_image(sample.images[0].source, sample.origin)
        name = f"images/{number:03d}.png"
        image.save(folder / name)
        last = sample.turns[-1]
        truth = [list(b) for part in last.parts if isinstance(part, Boxes) for b in part.boxes]
        asked = [list(b) for t in sample.turns[:-1] for p in t.parts if isinstance(p, Boxes) for b in p.boxes]
        return {
            "image": name,
            "group": group,
            "task": sample.task,
            "question": question_text(sample),
            "reference": reference_text(last) or _counted(last),
            "boxes_true": truth or asked,
            "width": image.width,
            "height": image.height,
        }

    def answers(self, scored: Sequence[Scored]) -> list[Answer | None]:
        """Theirs among all that an evaluation generated; None for those it did not ask."""
        known = {(s.group, s.sample.id): (s.reply, s.boxes) for s in scored}
        return [known.get((group, sample.id)) for group, sample in self.samples]

    def recorded(self, before: dict[str, Any] | None) -> list[Answer | None]:
        """The same from before.json."""
        known = {(g, i): (reply, boxes) for g, i, reply, boxes in (before["replies"] if before else [])}
        return [known.get((group, sample.id)) for group, sample in self.samples]

    def write(
        self, folder: Path, before: Sequence[Answer | None], after: Sequence[Answer | None] | None = None
    ) -> None:
        """samples.json. after: None while the run goes on."""
        entries = self.describe(folder)
        for moment, answers in (("before", before), ("after", after or [None] * len(before))):
            for entry, answer in zip(entries, answers, strict=True):
                reply, boxes = answer or (None, [])
                entry |= {moment: reply, f"boxes_{moment}": [list(box) for box in boxes]}
        write_text(folder / "samples.json", json.dumps(entries))


class SampleWriter(Observer):
    """Records the answers of a gallery during training, and prints one of them.

    every: steps between two times that they are asked for; None: they are taken from the evaluations, by `take`.
    """

    def __init__(
        self,
        gallery: Gallery,
        model: torch.nn.Module,
        encoder: Encoder,
        history: History,
        console: Console,
        every: int | None,
        max_new_tokens: int,
        batch_size: int,
        precision: Precision,
    ):
        self.gallery, self.model, self.encoder, self.history, self.console = gallery, model, encoder, history, console
        self.every, self.max_new_tokens, self.batch_size, self.precision = every, max_new_tokens, batch_size, precision
        self._told = 0

    def take(self, step: int, scored: Sequence[Scored]) -> None:
        """Of an evaluation after `step` that generated replies."""
        if scored and self.every is None:
            self._record(step, self.gallery.answers(scored))

    def on_step(self, state: Any, metrics: dict[str, Any]) -> None:
        if self.every is not None and state.step % self.every == 0 and self.gallery.samples:
            self._record(state.step, self._ask())

    def _ask(self) -> list[Answer]:
        """As an evaluation does it: the training does not notice."""
        rng = torch.get_rng_state()
        self.model.eval()
        try:
            prompts = [self.encoder.encode_prompt(sample) for _, sample in self.gallery.samples]
            with autocast(self.precision, self.model.device):
                replies = generate_replies(self.model, self.encoder, prompts, self.max_new_tokens, self.batch_size)
        finally:
            set_training_mode(self.model)
            torch.set_rng_state(rng)
        parse = self.encoder.coordinates.parse
        return [(reply, parse(reply, p.geometry[0])) for reply, p in zip(replies, prompts, strict=True)]

    def _record(self, step: int, answers: Sequence[Answer | None]) -> None:
        rows = [None if a is None else {"reply": a[0], "boxes": [list(box) for box in a[1]]} for a in answers]
        self.history.add({"kind": "samples", "step": step, "answers": rows})
        told = [number for number, answer in enumerate(answers) if answer is not None]
        if not told:
            return
        number = told[self._told % len(told)]  # another one every time
        self._told += 1
        group, sample = self.gallery.samples[number]
        texts = (
            question_text(sample),
            answers[number][0],
            reference_text(sample.turns[-1]) or _counted(sample.turns[-1]),
        )
        asked, said, true = (repr(_short(text)) for text in texts)
        self.console.print(
            f"sample at step {step}: {group}/{sample.task} {asked} -> {said}, true {true}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


def _rows(source: SampleSource, limit: int | None) -> range:
    if source.size is None:
        return range(limit or LOOKED_AT)
    if limit is not None:
        return range(min(limit, source.size))
    return range(0, source.size, max(1, source.size // LOOKED_AT))


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_WORDS else text[: SHOWN_WORDS - 1] + "…"


def question_text(sample: Sample) -> str:
    """The last user turn in words; a region is shown as "[region]", a point as "[point]" or "[click]"."""
    user = [turn for turn in sample.turns if turn.role == "user"][-1]
    return "".join(map(_in_words, user.parts)).strip()


def _counted(turn: Turn) -> str:
    """What a reply without words consists of: "2 boxes", "1 click"."""
    boxes = sum(len(part.boxes) for part in turn.parts if isinstance(part, Boxes))
    counts = {"point": 0, "click": 0}
    for part in turn.parts:
        if isinstance(part, Points):
            counts["click" if part.click else "point"] += len(part.points)
    said = [f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items() if count]
    if boxes or not said:
        said.insert(0, f"{boxes} box" + "es" * (boxes != 1))
    return ", ".join(said)


def _in_words(part: Part) -> str:
    match part:
        case Text(text):
            return text
        case Boxes():
            return "[region]"
        case Points(click=click):
            return "[click]" if click else "[point]"
    return ""
