"""Rows on disk become `Sample`s: OpenAI-messages JSONL, LLaVA / ShareGPT JSON, and the endless scenes.

A source is indexable and pure: `source[i]` gives the same sample in any process. JSONL is read by byte offset, without
schema inference (PAINS 22).
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlparse

import numpy as np

from vlmtune.data.scenes import SceneRecipe
from vlmtune.types import Boxes, ImageRef, Part, Points, Sample, Text, Turn, VlmtuneError

ROLE_NAMES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
LONGEST_PATH = 4096  # bytes a Linux kernel takes; longer "paths" are image bytes somebody pasted
LARGEST_COORDINATE = 1e9  # pixels
PLACEHOLDER = "<image>"  # of the LLaVA and ShareGPT formats only; there it is markup by definition of the format


class SampleSource(Protocol):
    """`size` is None for a source without end. The same index gives the same sample in any process."""

    name: str
    size: int | None

    def __getitem__(self, index: int) -> Sample: ...


class SceneSource:
    """Generated scenes of one task. Index i is scene i: every epoch of training draws fresh ones.

    `turns`: up to so many questions about each scene.
    """

    def __init__(self, concepts: str, task: str, split: str, limit: int | None = None, turns: int = 1):
        self.name = f"scenes/{concepts}/{task}/{split}"
        self.size = limit
        self._task, self._split, self._turns = task, split, turns
        self._recipe = SceneRecipe(concepts)

    def __getitem__(self, index: int) -> Sample:
        return self._recipe.sample(self._task, index, self._split, self._turns)


class FileSource:
    """A .jsonl file (one conversation per line) or a .json file (a list of conversations).

    `image_root`: where relative image paths start (default: the folder of the file). `task`: for rows without one.
    """

    def __init__(self, path: Path, image_root: Path | None = None, task: str | None = None, limit: int | None = None):
        self.path = path
        self.name = path.name
        self._roots = [image_root] if image_root is not None else [path.parent]
        self._task = task or "default"
        if not path.is_file():
            raise VlmtuneError(f"data file {path} does not exist.")
        self._rows: list[dict] | None = None
        if path.suffix == ".json":
            self._rows = _read_json_list(path)
            size = len(self._rows)
        elif path.suffix == ".jsonl":
            self._offsets = _line_offsets(path)
            size = len(self._offsets)
        else:
            raise VlmtuneError(f"data file {path}: unknown ending {path.suffix!r}; use .jsonl or .json.")
        if size == 0:
            raise VlmtuneError(f"data file {path} holds no rows.")
        self.size = min(size, limit) if limit else size

    def __getitem__(self, index: int) -> Sample:
        line, row = self._row(index)
        return parse_row(row, f"{self.path}:{line}", self._roots, self._task, default_id=f"{self.path.stem}/{index}")

    def _row(self, index: int) -> tuple[int, dict]:
        if self._rows is not None:
            return index + 1, self._rows[index]
        line, offset = (int(v) for v in self._offsets[index])
        with self.path.open("rb") as file:
            file.seek(offset)
            text = file.readline()
        try:
            row = json.loads(text)
        except ValueError as error:
            raise VlmtuneError(f"{self.path}:{line}: not valid JSON ({error}); mend or remove the line.") from error
        return line, row


def _line_offsets(path: Path) -> np.ndarray:
    """int64[rows, 2]: (1-based line number, byte offset) of every line that is not blank."""
    rows = []
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append((number, offset))
            offset += len(line)
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def _read_json_list(path: Path) -> list[dict]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VlmtuneError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(rows, list):
        raise VlmtuneError(f"{path}: a .json data file is a list of conversations, this is a {type(rows).__name__}.")
    return rows


# ---- one row ----------------------------------------------------------------------------------------------------


def parse_row(row: Any, origin: str, roots: Sequence[Path], task: str, default_id: str) -> Sample:
    """A row of any known format. Raises VlmtuneError naming `origin` and what is wrong with the row."""
    if not isinstance(row, dict):
        raise VlmtuneError(f"{origin}: a row is a JSON object, this is {type(row).__name__}.")
    sample_id = default_id if row.get("id") is None else str(row["id"])
    where = f"{origin} (sample {sample_id})"
    if "messages" in row:
        turns = _openai_turns(row["messages"], where, roots)
    elif "conversations" in row:
        turns = _sharegpt_turns(row, where, roots)
    else:
        raise VlmtuneError(f"{where}: a row needs 'messages' (OpenAI) or 'conversations' (LLaVA, ShareGPT).")
    task = task if row.get("task") is None else str(row["task"])
    sample = Sample(sample_id, tuple(turns), task, origin, row.get("meta") or {})
    _check_turns(sample, where)
    _check_places(sample, where)
    return sample


def _check_turns(sample: Sample, where: str) -> None:
    if not any(t.role == "assistant" and _has_reply(t) for t in sample.turns):
        raise VlmtuneError(f"{where}: no assistant text to learn from; add a reply or remove the row.")
    for number, turn in enumerate(sample.turns, 1):
        if turn.role == "assistant" and turn.train and not _has_reply(turn):
            raise VlmtuneError(
                f"{where}: the assistant reply in message {number} is empty; fill it or set train: false."
            )
        if turn.role == "assistant" and any(isinstance(p, ImageRef) for p in turn.parts):
            raise VlmtuneError(f"{where}: message {number} puts an image into an assistant reply; move it to the user.")


def _check_places(sample: Sample, where: str) -> None:
    count = len(sample.images)
    for part in (part for turn in sample.turns for part in turn.parts if isinstance(part, (Boxes, Points))):
        if part.image >= count:
            what = "box" if isinstance(part, Boxes) else "point"
            raise VlmtuneError(
                f"{where}: a {what} refers to image {part.image} (from 0) of {count}; correct its 'image'."
            )


def _has_reply(turn: Turn) -> bool:
    return any(isinstance(p, (Boxes, Points)) or (isinstance(p, Text) and p.text.strip()) for p in turn.parts)


def _openai_turns(messages: Any, where: str, roots: Sequence[Path]) -> list[Turn]:
    if not isinstance(messages, list) or not messages:
        raise VlmtuneError(f"{where}: 'messages' must be a list with at least one message.")
    turns = []
    for number, message in enumerate(messages, 1):
        place = f"{where}: message {number}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise VlmtuneError(f"{place} needs 'role' and 'content'.")
        content = message["content"]
        if isinstance(content, str):
            parts: list[Part] = [Text(content)]
        elif isinstance(content, list):
            parts = [_openai_part(part, place, roots) for part in content]
        else:
            raise VlmtuneError(f"{place}: 'content' is text or a list of parts, this is {type(content).__name__}.")
        turns.append(Turn(_role(message["role"], place), tuple(parts), _train_flag(message, place)))
    return turns


def _openai_part(part: Any, place: str, roots: Sequence[Path]) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    if kind == "image" and isinstance(part.get("image") or part.get("path") or part.get("url"), str):
        return ImageRef(
            resolve_image(part.get("image") or part.get("path") or part["url"], place, roots), part.get("id")
        )
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if isinstance(url, str):
            return ImageRef(resolve_image(url, place, roots), part.get("id"))
    if kind == "box" and isinstance(part.get("boxes"), list):
        region, image = part.get("region", False), part.get("image", 0)
        if not isinstance(region, bool) or type(image) is not int or image < 0:
            raise VlmtuneError(f"{place}: a box's 'region' is true or false, its 'image' an image number from 0.")
        return Boxes(_boxes(part["boxes"], place), region, image)
    if kind == "point" and isinstance(part.get("points"), list):
        click, image = part.get("click", False), part.get("image", 0)
        if not isinstance(click, bool) or type(image) is not int or image < 0:
            raise VlmtuneError(f"{place}: a point's 'click' is true or false, its 'image' an image number from 0.")
        return Points(_points(part["points"], place), click, image)
    raise VlmtuneError(f"{place}: part {json.dumps(part)[:80]} is not text, image, image_url, box or point.")


def _boxes(values: list, place: str) -> tuple:
    boxes = []
    for value in values:
        if not _are_numbers(value, 4) or value[0] > value[2] or value[1] > value[3]:
            raise VlmtuneError(f"{place}: box {value} is not [x1, y1, x2, y2] in pixels with x1 <= x2 and y1 <= y2.")
        boxes.append(tuple(float(v) for v in value))
    return tuple(boxes)


def _points(values: list, place: str) -> tuple:
    for value in values:
        if not _are_numbers(value, 2):
            raise VlmtuneError(f"{place}: point {value} is not [x, y] in pixels.")
    return tuple((float(x), float(y)) for x, y in values)


def _are_numbers(value: Any, count: int) -> bool:
    """Whether this is a list of so many finite numbers; JSON's integers may be too long for a float."""
    is_list = isinstance(value, list) and len(value) == count and all(type(v) in (int, float) for v in value)
    return is_list and all(abs(v) < LARGEST_COORDINATE for v in value)


def _sharegpt_turns(row: dict, where: str, roots: Sequence[Path]) -> list[Turn]:
    """LLaVA (`image`: one path) and ShareGPT (`images`: a list). `<image>` marks the place of an image."""
    names = row.get("images", row.get("image", []))
    names = [names] if isinstance(names, str) else names or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise VlmtuneError(f"{where}: 'image' is one path and 'images' a list of paths, not {json.dumps(names)[:80]}.")
    conversation = row["conversations"]
    if not isinstance(conversation, list) or not conversation:
        raise VlmtuneError(f"{where}: 'conversations' must be a list with at least one message.")
    messages = []
    for number, message in enumerate(conversation, 1):
        place = f"{where}: message {number}"
        speaker = message.get("from", message.get("role")) if isinstance(message, dict) else None
        value = message.get("value", message.get("content")) if isinstance(message, dict) else None
        if speaker is None or not isinstance(value, str):
            raise VlmtuneError(f"{place} needs 'from' and a text 'value'.")
        messages.append((_role(speaker, place), value, _train_flag(message, place)))
    marks = sum(value.count(PLACEHOLDER) for role, value, _ in messages if role == "user")
    if marks != len(names):
        raise VlmtuneError(
            f"{where}: {marks} {PLACEHOLDER} marks in user text, but {len(names)} images; make them equal."
        )
    images = iter(names)
    turns = []
    for number, (role, value, train) in enumerate(messages, 1):
        parts: list[Part] = []
        for n, piece in enumerate(value.split(PLACEHOLDER) if role == "user" else [value]):
            if n:
                parts.append(ImageRef(resolve_image(next(images), f"{where}: message {number}", roots)))
                piece = piece.removeprefix("\n")  # LLaVA writes "<image>\n"; line breaks there are the template's
            if piece:
                parts.append(Text(piece))
        turns.append(Turn(role, tuple(parts), train))
    return turns


def _role(name: Any, place: str):
    if not isinstance(name, str) or name not in ROLE_NAMES:
        raise VlmtuneError(f"{place}: unknown role {name!r}; known: {', '.join(ROLE_NAMES)}.")
    return ROLE_NAMES[name]


def _train_flag(message: dict, place: str) -> bool:
    train = message.get("train", True)
    if not isinstance(train, bool):
        raise VlmtuneError(f"{place}: 'train' is true or false, not {train!r}.")
    return train


def resolve_image(name: str, place: str, roots: Sequence[Path]) -> Path | bytes:
    """A path (relative to the roots, or absolute), a file:// URL, or a data: URL.

    Raises VlmtuneError showing every place tried. Relative paths may not climb out of their root.
    """
    if name.startswith("data:"):
        try:
            return base64.b64decode(name.partition(",")[2], validate=True)
        except ValueError as error:
            raise VlmtuneError(f"{place}: the data: URL of an image is not valid base64 ({error}).") from error
    if name.startswith(("http://", "https://")):
        raise VlmtuneError(f"{place}: {name} is on the network; download it and name the file.")
    if "\0" in name or len(name) > LONGEST_PATH:
        raise VlmtuneError(
            f"{place}: image {name[:40]!r}… is not a path; write encoded bytes as data:image/png;base64,… ."
        )
    path = Path(unquote(urlparse(name).path)) if name.startswith("file://") else Path(name)
    tried = [path] if path.is_absolute() else [root / path for root in roots]
    if not path.is_absolute() and os.path.normpath(path).split(os.sep)[0] == "..":
        raise VlmtuneError(
            f"{place}: image path {name} leaves its folder {roots[0]}; name the right image_root instead."
        )
    for candidate in tried:
        if os.path.isfile(candidate):
            return candidate
    raise VlmtuneError(
        f"{place}: image {name} not found; tried {', '.join(str(t) for t in tried)}; correct the path or image_root."
    )
