"""Where cases are made: pictures of shapes, rows about them, configs and runs, all from a seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw

Row = dict[str, Any]
COLOURS = {
    "red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 200), "yellow": (220, 200, 30),
    "black": (10, 10, 10), "white": (250, 250, 250), "orange": (240, 130, 20), "purple": (130, 40, 160),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star")
SIDES = (("left", "right"), ("top", "bottom"))
PLAN: list[dict[str, Any]] = [
    {"match": "vision", "train": "frozen"},
    {"match": "projector", "train": "full", "lr": 3e-3},
    {"match": "language", "train": "lora", "rank": 4, "lr": 1e-2},
    {"match": "embed", "train": "frozen"},
    {"match": "lm_head", "train": "frozen"},
]
"""Of a tiny LLaVA, with rates that its size bears (`checks.settings.usual_rate`)."""


@dataclass(frozen=True)
class Thing:
    """One shape in a picture. box: x1, y1, x2, y2 in pixels."""

    colour: str
    shape: str
    size: tuple[int, int]
    box: tuple[int, int, int, int]

    @property
    def words(self) -> str:
        return f"a {self.colour} {self.shape}"

    @property
    def place(self) -> str:
        x, y = (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2
        return f"{SIDES[1][y > self.size[1] / 2]} {SIDES[0][x > self.size[0] / 2]}"


def draw_thing(random: Random, size: tuple[int, int]) -> tuple[Image.Image, Thing]:
    """A picture of `size` (width, height) pixels with one shape on a noisy ground."""
    width, height = size
    side = random.randint(min(size) // 4, min(size) // 2)
    left, top = random.randint(0, width - side - 1), random.randint(0, height - side - 1)
    box = (left, top, left + side, top + side)
    thing = Thing(random.choice(sorted(COLOURS)), random.choice(SHAPES), size, box)
    ground = np.random.default_rng(random.getrandbits(32)).integers(90, 170, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(ground)
    pen, colour = ImageDraw.Draw(image), COLOURS[thing.colour]
    x1, y1, x2, y2 = box
    middle = (x1 + x2) // 2
    match thing.shape:
        case "circle":
            pen.ellipse(box, fill=colour)
        case "square":
            pen.rectangle(box, fill=colour)
        case "triangle":
            pen.polygon([(middle, y1), (x2, y2), (x1, y2)], fill=colour)
        case "star":
            pen.polygon([(middle, y1), (x2, (y1 + y2) // 2), (middle, y2), (x1, (y1 + y2) // 2)], fill=colour)
    return image, thing


def words_row(name: str, image: str, thing: Thing, number: int) -> Row:
    """One of three questions with an answer in words."""
    asked = [
        ("caption", "What is in the picture?", f"There is {thing.words} in the {thing.place} of the picture."),
        ("vqa", f"What colour is the {thing.shape}?", f"The {thing.shape} is {thing.colour}."),
        ("vqa", f"Where is the {thing.colour} one?", f"It is in the {thing.place}."),
    ]
    task, question, answer = asked[number % len(asked)]
    return _row(name, task, image, question, answer)


def box_row(name: str, image: str, thing: Thing, number: int) -> Row:
    """A question whose answer is a box."""
    return _row(name, "grounding", image, f"Find the {thing.shape}.", [{"type": "box", "boxes": [list(thing.box)]}])


def _row(name: str, task: str, image: str, question: str, answer: Any) -> Row:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"id": name, "task": task, "messages": messages}


@dataclass
class Workshop:
    """A folder of one case. model: folder of a tiny model, never changed; seed: of everything drawn here."""

    folder: Path
    model: Path
    seed: int = 0
    made: dict[str, Path] = field(default_factory=dict)

    def data(
        self,
        name: str = "train",
        rows: int = 24,
        row: Callable[[str, str, Thing, int], Row] = words_row,
        size: tuple[int, int] = (80, 60),
        change: Callable[[list[Row], Path, Random], list[Row] | None] = lambda rows, folder, random: None,
    ) -> Path:
        """NAME.jsonl with its pictures beside it. change: spoils rows and files; what it returns takes their place."""
        random = Random(f"{self.seed} {name}")
        folder = self.folder / name
        folder.mkdir()
        lines = []
        for number in range(rows):
            image, thing = draw_thing(random, size)
            file = f"{name}-{number:03d}.png"
            image.save(folder / file)
            lines.append(row(f"{name}-{number}", file, thing, number))
        lines = change(lines, folder, random) or lines
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        return path

    def config(self, train: Path | None = None, name: str = "run", **over: Any) -> Path:
        """NAME.yaml of a run of 8 steps with a held-out group. over: "optim.lr" written `optim__lr` -> value."""
        held_out = self.made.get("val") or self.made.setdefault("val", self.data("val", 8))
        tree: dict[str, Any] = {
            "model": str(self.model),
            "run": str(self.folder / name),
            "data": {
                "train": [{"path": str(train or self.data())}], "eval": {"val": [{"path": str(held_out)}]},
                "workers": 0,
            },
            "plan": [dict(rule) for rule in PLAN],
            "optim": {"lr": 1e-2, "warmup": 1},
            "train": {"length": 8, "batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "log_every": 1},
            "checkpoint": {"every": 4},
            "evaluate": {"generate": False},
        }  # fmt: skip
        for key, value in over.items():
            *parents, leaf = key.split("__")
            node = tree
            for part in parents:
                node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
            node[int(leaf) if isinstance(node, list) else leaf] = value
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path


def messages_of(row: Row, role: str) -> list[dict[str, Any]]:
    return [message for message in row["messages"] if message["role"] == role]


def reply_of(row: Row) -> Mapping[str, Any]:
    return messages_of(row, "assistant")[-1]
