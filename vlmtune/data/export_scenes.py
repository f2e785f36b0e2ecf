"""The embedded scenes as ordinary files.

A written split is what a user would bring: a JSON Lines file of OpenAI-style messages next to a folder of PNG files.

    scenes/train/train.jsonl
    scenes/train/images/base-train-vqa-17.png
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlmtune.data.atlas import Split
from vlmtune.data.scenes import CHAT_TASKS, TASKS, SceneRecipe
from vlmtune.paths import require_folder
from vlmtune.types import Boxes, ImageRef, Part, Sample, Text, VlmtuneError

DEMO_TURNS = 3  # questions about each training scene; held-out scenes have one


def write_split(
    recipe: SceneRecipe, tasks: Sequence[str], split: Split, per_task: int, folder: Path, start: int = 0, turns: int = 1
) -> Path:
    """Writes samples `start` to `start + per_task - 1` of every task; returns the path of the JSON Lines file.

    turns: up to so many questions about a scene, of the tasks that have several (`SceneRecipe.sample`).

    `folder` appears complete or not at all: everything is written to a temporary folder beside it, which is then
    renamed. The same arguments give the same bytes. VlmtuneError: the folder exists already.
    """
    folder = Path(folder)
    if folder.exists():
        raise VlmtuneError(f"{folder} exists already; remove it, or choose another folder for the scenes")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (unfinished / "images").mkdir()
        (unfinished / "masks").mkdir()
        with open(unfinished / f"{split}.jsonl", "w", encoding="utf-8", newline="\n") as lines:
            for task in tasks:
                asked = turns if task in CHAT_TASKS else 1
                for index in range(start, start + per_task):
                    lines.write(json.dumps(_row(recipe.sample(task, index, split, asked), unfinished)) + "\n")
        unfinished.chmod(0o755)  # mkdtemp makes it private
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder / f"{split}.jsonl"


def write_demo(folder: Path, train_per_task: int, val_per_task: int, start: int = 0) -> Iterator[tuple[Path, int]]:
    """The four splits of the demo, each (JSON Lines file, rows): new and old concepts, train and val.

    The old concepts' training split is replay, half as large. Training conversations ask up to DEMO_TURNS questions.
    A split that exists as it would be written is left as it is. VlmtuneError: `folder` cannot be written, or holds a
    split of other scenes.
    """
    require_folder(folder, "folder", "choose another one for the scenes")
    for group, concepts in (("new", "new"), ("old", "base")):
        for split, per_task, turns in (
            ("train", train_per_task if group == "new" else -(-train_per_task // 2), DEMO_TURNS),
            ("val", val_per_task, 1),
        ):
            target = Path(folder) / f"{group}-{split}"
            if target.exists():
                _require_split(target / f"{split}.jsonl", [f"{concepts}/{split}/{t}" for t in TASKS], per_task, start)
            else:
                write_split(SceneRecipe(concepts), TASKS, split, per_task, target, start, turns)
            yield target / f"{split}.jsonl", per_task * len(TASKS)


def _require_split(path: Path, prefixes: Sequence[str], per_task: int, start: int) -> None:
    """Raise VlmtuneError unless the file holds the samples `start` … of every task, by their ids."""
    wanted = [f"{prefix}/{index}" for prefix in prefixes for index in range(start, start + per_task)]
    try:
        with path.open(encoding="utf-8") as lines:
            found = [json.loads(line)["id"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found != wanted:
        raise VlmtuneError(
            f"{path.parent} is there already and holds other scenes than the {per_task} of each task from number "
            f"{start} on; remove it, or choose another folder."
        )


def _row(sample: Sample, folder: Path) -> dict:
    """The sample as one line of JSON; its images are written into `folder`."""
    messages = []
    for turn in sample.turns:
        messages.append({"role": turn.role, "content": [_part(part, sample.id, folder) for part in turn.parts]})
    return {"id": sample.id, "task": sample.task, "messages": messages, "meta": sample.meta}


def _part(part: Part, id: str, folder: Path) -> dict:
    match part:
        case Text(text):
            return {"type": "text", "text": text}
        case Boxes(boxes, region, masks=masks):
            written = {"type": "box", "boxes": [list(box) for box in boxes]} | ({"region": True} if region else {})
            return written | {"masks": [_mask(mask, folder) for mask in masks]}
        case ImageRef(bytes() as png):
            path = f"images/{id.replace('/', '-')}.png"
            (folder / path).write_bytes(png)
            return {"type": "image", "image": path}
    raise TypeError(f"a scene has no part like {part!r}")


def _mask(png: bytes, folder: Path) -> str:
    """Named by content: questions about one object share a mask."""
    path = f"masks/{hashlib.sha256(png).hexdigest()[:16]}.png"
    (folder / path).write_bytes(png)
    return path
