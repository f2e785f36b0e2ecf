"""Configs and runs with nothing wrong, of many methods, formats and lengths: neither command may say warn or fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import yaml
from PIL import Image

from .case import Healthy, run_command
from .config_cases import on_text, plan, setting
from .data_cases import llava, questions, spoiled
from .run_cases import trained
from .workshop import Row, Thing, Workshop, box_row, reply_of, words_row

FULL = [{"match": "vision", "train": "frozen"}, {"match": "*", "train": "full", "lr": 1e-3}]
LATER = plan({"match": "language", "train": "lora", "rank": 4, "lr": [[0, 0], [0.5, 1e-2]]})


def table(shop: Workshop) -> Path:
    """CSV with a quoted answer."""
    rows = [json.loads(line) for line in shop.data().read_text().splitlines()]
    lines = ["image,question,answer"]
    for row in rows:
        image, text = (part.get("image") or part["text"] for part in row["messages"][0]["content"])
        lines.append(f'{image},{text},"{reply_of(row)["content"]}"')
    path = shop.folder / "train" / "train.csv"
    path.write_text("\n".join(lines) + "\n")
    return shop.config(path)


def two_turns(name: str, image: str, thing: Thing, number: int) -> Row:
    row, other = words_row(name, image, thing, number), words_row(name, image, thing, number + 1)
    text = other["messages"][0]["content"][1]
    return {**row, "messages": [*row["messages"], {"role": "user", "content": [text]}, other["messages"][1]]}


def short_answers(name: str, image: str, thing: Thing, number: int) -> Row:
    """Choices in the question, an answer of a word: the question holds it, and that is no fault."""
    colours = "red, green, blue, yellow, black, white, orange or purple"
    return {"id": name, "image": image, "question": f"Which colour is it: {colours}?", "answer": thing.colour}


def hostile_words(name: str, image: str, thing: Thing, number: int) -> Row:
    """Letters of many scripts, signs, and the word assistant: nothing of it is a marker."""
    row = words_row(name, image, thing, number)
    text = row["messages"][0]["content"][1]
    text["text"] = f"assistant: «Größe» naïve café — 図形は何色? 5 < 6 [1, 2] {number}\n{text['text']}"
    return row


def portrait(rows, folder, random):
    """Every second picture is another size."""
    for row in rows[::2]:
        file = folder / row["messages"][0]["content"][0]["image"]
        with Image.open(file) as image:
            image.resize((48, 90)).save(file)


def recipe(name: str) -> Callable[[Workshop], Path]:
    """One that ships, as it is but for the folder of its run."""

    def build(shop: Workshop) -> Path:
        tree = yaml.safe_load((resources.files("vlmtune.recipes") / f"{name}.yaml").read_text())
        tree["run"] = str(shop.folder / "run")
        path = shop.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return build


def demo(shop: Workshop) -> Path:
    """The demo, on fewer files than `vlmtune scenes` writes by default, and as many epochs of them."""
    data = shop.folder / "demo-data"
    code, _, err = run_command("scenes", data, "--train-per-task", 24, "--val-per-task", 6)
    assert code == 0, err
    path = recipe("demo")(shop)
    text = path.read_text().replace("runs/demo-data", str(data)).replace("380 steps", "20 steps")
    path.write_text(text.replace("190 steps", "10 steps").replace("warmup: 10 steps", "warmup: 1"))
    return path


HEALTHY = [
    Healthy("lora_and_projector", setting()),
    Healthy("in_full", setting(plan=FULL)),
    Healthy("projector_alone", setting(plan=plan({"match": "language", "train": "frozen"}))),
    Healthy("staged_unfreezing", setting(plan=LATER, train__length=20, optim__warmup=1)),
    Healthy("bottleneck_adapters", setting(plan=plan({"match": "language", "train": "adapter", "lr": 1e-2,
                                                      "options": {"dim": 8}}))),
    Healthy("text_alone", on_text(plan=plan({"match": "projector", "train": "frozen"}))),
    Healthy("llava_rows", spoiled(lambda rows, folder, random: llava(rows, 1))),
    Healthy("csv_rows", table),
    Healthy("boxes", spoiled(lambda rows, folder, random: None, box_row, size=(64, 64), rows=40)),
    Healthy("two_turns", spoiled(lambda rows, folder, random: None, two_turns)),
    Healthy("short_answers", spoiled(lambda rows, folder, random: None, short_answers)),
    Healthy("many_scripts", spoiled(lambda rows, folder, random: None, hostile_words)),
    Healthy("many_sizes", spoiled(portrait)),
    Healthy("long_prompts", spoiled(questions(lambda text, row: f"{text} " + "Look well before you answer. " * 12))),
    Healthy("generated_replies", setting(evaluate={"generate": True, "every": 4})),
    Healthy("recipe_debug", recipe("debug"), is_slow=True),
    Healthy("recipe_demo", demo, is_slow=True),
    Healthy("run_lora_and_projector", trained(), "doctor"),
    Healthy("run_in_full", trained(plan=FULL, train__length=24, evaluate__every=6), "doctor"),
    Healthy("run_trimmed", trained(data__on_overlong="trim", data__max_length=68), "doctor"),
]  # fmt: skip
