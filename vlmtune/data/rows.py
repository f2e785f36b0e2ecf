"""One row of any known format -> one `Sample`. Readers bring rows; only this module knows what they look like.

messages                     OpenAI: text, or typed parts; bare {"type": "image"} parts take from `images`
conversations                LLaVA, ShareGPT (`<image>` marks), Qwen-VL (`<img>path</img>` in the text)
question, answer | boxes     one question about the row's images
caption                      what the row's images show, without a question
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from vlmtune.data.entities import entity_pattern, mark_entities
from vlmtune.data.strict_json import excerpt, loads
from vlmtune.types import Boxes, ImageName, ImageRef, Part, Points, Role, Sample, Text, Turn, VlmtuneError

ROLE_NAMES: dict[str, Role] = {
    "human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system",
}  # fmt: skip
IMAGE_ID = re.compile(r"[\w.-]{1,64}")
LONGEST_PATH = 4096  # bytes a Linux kernel takes; longer "paths" are image bytes somebody pasted
LARGEST = 1e9  # pixels; no picture is so wide
PLACEHOLDER = "<image>"  # where the row's images go: markup by definition of the formats with an image field, else text
QWEN_IMAGE = re.compile(r"<img>(.*?)</img>", re.DOTALL)

CONTENT = ("messages", "conversations", "question", "caption")  # what tells the formats apart, the first one present
FIELDS = (*CONTENT, "answer", "boxes", "image", "images", "system", "entities", "id", "task", "meta")
REFUSED = {  # fields whose name promises an effect that they do not have
    "weight": "there are no weights of samples; give the source a weight",
    "video": "videos are not read; write frames as images",
    "videos": "videos are not read; write frames as images",
    "audio": "sound is not read",
    "audios": "sound is not read",
}


@dataclass(frozen=True)
class Row:
    """What a reader hands over.

    value: the row itself; origin: where it stands ("train.jsonl:17"); id: for a row that names none; attached: images
    that lie beside the row in an archive, name -> encoded bytes.
    """

    value: Any
    origin: str
    id: str
    attached: Mapping[str, bytes] = field(default_factory=dict)


def parse_row(row: Row, roots: Sequence[Path], task: str) -> Sample:
    """The sample a row describes. Raises VlmtuneError naming the row's origin and what is wrong with it.

    roots: folders that relative image paths start from; task: for rows without one. An absent field and null are the
    same thing: tables have no other way to leave a field out.
    """
    value, origin = row.value, row.origin
    if not isinstance(value, dict):
        raise VlmtuneError(f"{origin}: a row is a JSON object, this is {type(value).__name__}.")
    value = {name: entry for name, entry in value.items() if entry is not None}
    sample_id = _name(value.get("id", row.id), "id", origin)
    where = f"{origin} (sample {sample_id})"
    for name, remedy in REFUSED.items():
        if value.get(name) not in (None, [], ""):
            raise VlmtuneError(f"{where}: field {name!r}: {remedy}, and remove the field.")
    images = RowImages(value, where, roots, row.attached)
    if "messages" in value:
        turns = _openai_turns(value, where, images)
    elif "conversations" in value:
        turns = _sharegpt_turns(value, where, images)
    elif "question" in value:
        turns = _question_turns(value, where)
    elif "caption" in value:
        turns = _caption_turns(value, where, images)
    else:
        raise VlmtuneError(
            f"{where}: a row needs 'messages' (OpenAI) or 'conversations' (LLaVA, ShareGPT, Qwen-VL) or 'question' and "
            f"'answer' or 'caption'; this one has {', '.join(map(str, value)) or 'nothing'}."
        )
    turns = images.place(turns, marks_are_markup="conversations" in value and "messages" not in value)
    turns = _with_system(value, turns, where)
    if not isinstance(value.get("meta", {}), dict):
        raise VlmtuneError(f"{where}: 'meta' is an object, not {type(value['meta']).__name__}.")
    task = _name(value.get("task", task), "task", where)
    sample = Sample(sample_id, tuple(turns), task, origin, dict(value.get("meta", {})))
    _check_turns(sample, where)
    _check_places(sample, where)
    if "entities" in value:
        entities = _entities(value["entities"], sample, where)
        sample = replace(sample, turns=mark_entities(sample.turns, entities))
    return sample


def format_of(row: Row) -> str:
    """The name of a row's format, for people; the complaints about a row that has none come from `parse_row`."""
    value = row.value if isinstance(row.value, dict) else {}
    kind = next((name for name in CONTENT if value.get(name) is not None), None)
    pictures = value.get("images") or value.get("image") or row.attached
    if kind == "messages":
        return "OpenAI messages with an image field" if pictures else "OpenAI messages"
    if kind == "conversations":
        qwen = not pictures and QWEN_IMAGE.search(str(value["conversations"]))
        return "Qwen-VL conversations" if qwen else "LLaVA / ShareGPT conversations"
    return {"question": "questions and answers", "caption": "captions", None: "unknown rows"}[kind]


# ---- images of a row --------------------------------------------------------------------------------------------


class RowImages:
    """The images a row brings in its `image` or `images` field, or attached, until each has found its place."""

    def __init__(self, row: dict, where: str, roots: Sequence[Path], attached: Mapping[str, bytes]):
        self._where, self._roots = where, roots
        given = {name: row[name] for name in ("image", "images") if row.get(name) not in (None, "", [])}
        if len(given) > 1:
            raise VlmtuneError(f"{where}: has both 'image' and 'images'; keep one.")
        self.in_field = bool(given)
        images = next(iter(given.values()), [])
        if isinstance(images, str) and "images" in given and images.startswith("["):
            images = loads(images, f"{where}: 'images'")
        images = images if isinstance(images, list) else [images]
        if not all(_is_image(image) for image in images):
            raise VlmtuneError(
                f"{where}: 'image' is one path and 'images' a list of paths, or of {{bytes, path}} in tables, not "
                f"{excerpt(next(iter(given.values())))}."
            )
        self._attached = [{"bytes": data, "path": name} for name, data in attached.items()]
        self._brought = images or self._attached
        self._placed: set[int] = set()

    def __len__(self) -> int:
        return len(self._brought)

    def named(self, name: str, place: str) -> Path | bytes:
        """The image that a part names: one the row brings, or a file."""
        matches = [n for n, image in enumerate(self._brought) if _is_called(image, name)]
        if matches:  # a part may name an image again
            self._placed.add(next((n for n in matches if n not in self._placed), matches[0]))
        return self._find(name, place)

    def next(self, place: str, number: int | None = None) -> ImageRef:
        """The first image that has no place yet, or image `number` (from 0)."""
        if number is None:
            number = next((n for n in range(len(self)) if n not in self._placed), len(self))
        if type(number) is not int or not 0 <= number < len(self):
            raise VlmtuneError(
                f"{place}: asks for image {number} (from 0) of {len(self)} in 'images'; add it or remove the part."
            )
        self._placed.add(number)
        image = self._brought[number]
        if isinstance(image, dict):
            image = image["path"] if image.get("bytes") is None else image["bytes"]
        return ImageRef(image if isinstance(image, bytes) else self._find(image, place))

    def masks(self, names: Any, boxes: int, place: str) -> tuple[Path | bytes, ...]:
        """The mask of every box of a part, from files or attached; none where the part names none."""
        names = names or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise VlmtuneError(f"{place}: 'masks' is a list of paths, not {excerpt(names)}.")
        if names and len(names) != boxes:
            raise VlmtuneError(f"{place}: {len(names)} masks for {boxes} boxes; give every box its own, or none.")
        return tuple(self._find(name, place) for name in names)

    def _find(self, name: str, place: str) -> Path | bytes:
        for image in (*self._brought, *self._attached):
            if isinstance(image, dict) and image.get("bytes") is not None and _is_called(image, name):
                return image["bytes"]
        return resolve_image(name, place, self._roots)

    def place(self, turns: list[Turn], marks_are_markup: bool) -> list[Turn]:
        """Put images where user text says `<image>`; without any mark they stand first in the first user turn.

        Nothing is to do for a row whose parts took the images themselves. marks_are_markup: `<image>` is a mark in a
        row without images too, and then one too many; else it is text there.
        """
        if self._placed:
            if len(self._placed) < len(self):
                raise VlmtuneError(
                    f"{self._where}: {len(self)} images, but the messages use {len(self._placed)}; make them equal."
                )
            return turns
        texts = [part.text for turn in turns if turn.role == "user" for part in turn.parts if isinstance(part, Text)]
        marks = sum(text.count(PLACEHOLDER) for text in texts)
        if not len(self) and not marks_are_markup:
            return turns
        if marks and marks != len(self):
            raise VlmtuneError(
                f"{self._where}: {marks} {PLACEHOLDER} marks in user text, but {len(self)} images; make them equal."
            )
        placed, waiting = [], len(self) > 0 and not marks
        for number, turn in enumerate(turns, 1):
            place = f"{self._where}: message {number}"
            parts: list[Part] = []
            if turn.role == "user" and waiting:
                parts, waiting = [self.next(place) for _ in range(len(self))], False
            for part in turn.parts:
                marked = turn.role == "user" and isinstance(part, Text) and marks
                parts += self._at_marks(part.text, place) if marked else [part]
            placed.append(replace(turn, parts=tuple(parts)))
        if waiting:
            raise VlmtuneError(f"{self._where}: {len(self)} images, but no user message to put them into; add one.")
        return placed

    def _at_marks(self, text: str, place: str) -> list[Part]:
        parts: list[Part] = []
        for n, piece in enumerate(text.split(PLACEHOLDER)):
            if n:
                parts.append(self.next(place))
                piece = piece.removeprefix("\n")  # LLaVA writes "<image>\n"; line breaks there are the template's
            if piece:
                parts.append(Text(piece))
        return parts


def _is_called(image: Any, name: str) -> bool:
    path = image.get("path") if isinstance(image, dict) else image
    return isinstance(path, str) and name in (path, os.path.basename(path))


def _is_image(value: Any) -> bool:
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        return isinstance(data, bytes) or (data is None and isinstance(path, str))
    return isinstance(value, (str, bytes))


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
    if not path.is_absolute() and not roots:
        raise VlmtuneError(f"{place}: image path {name} has no folder to start from; set image_root of the source.")
    tried = [path] if path.is_absolute() else [root / path for root in roots]
    if not path.is_absolute() and os.path.normpath(path).split(os.sep)[0] == "..":
        raise VlmtuneError(
            f"{place}: image path {name} leaves its folder {roots[0]}; name the right image_root instead."
        )
    for candidate in tried:
        if os.path.isfile(candidate):
            return candidate
    raise VlmtuneError(
        f"{place}: image {name} not found; tried {', '.join(str(t) for t in tried)}; correct the path or image_root.",
        code="image_missing",
    )


# ---- the formats ------------------------------------------------------------------------------------------------


def _openai_turns(row: dict, where: str, images: RowImages) -> list[Turn]:
    turns = []
    ids: list[str | None] = []  # of the images so far
    for number, message in enumerate(_messages(row, "messages", where), 1):
        place = f"{where}: message {number}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise VlmtuneError(f"{place} needs 'role' and 'content'.")
        content = message["content"]
        if isinstance(content, str):
            parts: list[Part] = [Text(content)]
        elif isinstance(content, list):
            parts = []
            for part in content:
                parts.append(_openai_part(part, place, images, ids))
                if isinstance(parts[-1], ImageRef):
                    ids.append(parts[-1].id)
        else:
            raise VlmtuneError(f"{place}: 'content' is text or a list of parts, this is {type(content).__name__}.")
        turns.append(Turn(_role(message["role"], place), tuple(parts), _train_flag(message, place)))
    return turns


def _openai_part(part: Any, place: str, images: RowImages, ids: list[str | None]) -> Part:
    """ids: of the images before this part, None for one without."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"], _flag(part, "entity", place))
    if kind == "image":
        source = part.get("image") or part.get("path") or part.get("url")
        if isinstance(source, str):
            return ImageRef(images.named(source, place), _new_id(part, place, ids))
        if source is None and len(images):
            return replace(images.next(place, part.get("index")), id=_new_id(part, place, ids))
    if kind == "image_ref" and "id" in part:
        return ImageName(_known_id(part["id"], place, ids))
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if isinstance(url, str):
            return ImageRef(images.named(url, place), _new_id(part, place, ids))
    if kind == "box" and isinstance(part.get("boxes"), list):
        boxes = _boxes(part["boxes"], place)
        masks = images.masks(part.get("masks"), len(boxes), place)
        return Boxes(boxes, _flag(part, "region", place), _image_number(part, "box", place, ids), masks)
    if kind == "point" and isinstance(part.get("points"), list):
        return Points(
            _points(part["points"], place), _flag(part, "click", place), _image_number(part, "point", place, ids)
        )
    raise VlmtuneError(f"{place}: part {excerpt(part)} is not text, image, image_url, image_ref, box or point.")


def _flag(part: dict, name: str, place: str) -> bool:
    value = part.get(name) or False
    if not isinstance(value, bool):
        raise VlmtuneError(f"{place}: a {part['type']}'s {name!r} is true or false, not {excerpt(value)}.")
    return value


def _new_id(part: dict, place: str, ids: list[str | None]) -> str | None:
    """The id under which later parts refer to this image."""
    id = part.get("id")
    if id is None:
        return None
    if not isinstance(id, str) or not IMAGE_ID.fullmatch(id):
        raise VlmtuneError(f"{place}: the image id {excerpt(id)} is not a word of letters, digits, '_', '-' or '.'.")
    if id in ids:
        raise VlmtuneError(f"{place}: a second image has the id {id!r}; give each its own.")
    return id


def _known_id(id: Any, place: str, ids: list[str | None]) -> str:
    if id is None or id not in ids:
        known = ", ".join(name for name in ids if name) or "none has an id"
        raise VlmtuneError(f"{place}: no image before it has the id {excerpt(id)} ({known}); correct it.")
    return id


def _image_number(part: dict, what: str, place: str, ids: list[str | None]) -> int:
    """Which image a box or point is in: a number from 0, or the id of an image before it."""
    image = part.get("image") or 0
    if isinstance(image, str):
        return ids.index(_known_id(image, place, ids))
    if type(image) is not int or image < 0:
        raise VlmtuneError(
            f"{place}: the 'image' of a {what} is an image number from 0 or an id, not {excerpt(image)}."
        )
    return image


def _boxes(values: list, place: str) -> tuple:
    for value in values:
        if not _are_numbers(value, 4):
            raise VlmtuneError(
                f"{place}: box {str(value)[:80]} is not [x1, y1, x2, y2] in pixels with x1 <= x2 and y1 <= y2."
            )
        if value[0] > value[2] or value[1] > value[3]:
            raise VlmtuneError(
                f"{place}: box {str(value)[:80]} is not [x1, y1, x2, y2] in pixels with x1 <= x2 and y1 <= y2; if it "
                "is x, y, width, height, as in COCO, add x and y to the last two.",
                code="box_order",
            )
    return tuple(tuple(float(v) for v in value) for value in values)


def _points(values: list, place: str) -> tuple:
    for value in values:
        if not _are_numbers(value, 2):
            raise VlmtuneError(f"{place}: point {str(value)[:80]} is not [x, y] in pixels.")
    return tuple((float(x), float(y)) for x, y in values)


def _are_numbers(value: Any, count: int) -> bool:
    """Is this a list of so many finite numbers? NaN is below nothing; JSON's integers may not fit a float."""
    is_list = isinstance(value, list) and len(value) == count and all(type(v) in (int, float) for v in value)
    return is_list and all(abs(v) < LARGEST for v in value)


def _sharegpt_turns(row: dict, where: str, images: RowImages) -> list[Turn]:
    """LLaVA (`image`: one path), ShareGPT (`images`: a list) and Qwen-VL (paths in the text, no such field)."""
    turns = []
    for number, message in enumerate(_messages(row, "conversations", where), 1):
        place = f"{where}: message {number}"
        message = message if isinstance(message, dict) else {}
        speaker = next((message[name] for name in ("from", "role") if message.get(name) is not None), None)
        text = next((message[name] for name in ("value", "content") if message.get(name) is not None), None)
        if speaker is None or not isinstance(text, str):
            raise VlmtuneError(f"{place} needs 'from' and a text 'value'.")
        role = _role(speaker, place)
        parts = _qwen_parts(text, place, images) if role == "user" and not images.in_field else [Text(text)]
        turns.append(Turn(role, tuple(parts), _train_flag(message, place)))
    return turns


def _qwen_parts(text: str, place: str, images: RowImages) -> list[Part]:
    """ "Picture 1: <img>a.jpg</img>\\n…": the image stands for the path, and every other character stays."""
    parts: list[Part] = []
    pieces = QWEN_IMAGE.split(text)
    if any(mark in piece for piece in pieces for mark in ("<img>", "</img>")):
        raise VlmtuneError(f"{place}: <img> and </img> do not come in pairs; write <img>path</img>.")
    for n, piece in enumerate(pieces):
        if n % 2:
            parts.append(ImageRef(images.named(piece.strip(), place)))
        elif piece:
            parts.append(Text(piece))
    return parts or [Text(text)]


def _question_turns(row: dict, where: str) -> list[Turn]:
    """`question`, and as the reply `answer`, `boxes`, or the one and then the other."""
    for name in ("question", "answer"):
        if not isinstance(row.get(name, ""), str):
            raise VlmtuneError(f"{where}: {name!r} is a text, not {type(row[name]).__name__}.")
    boxes = row.get("boxes", [])
    boxes = loads(boxes, f"{where}: 'boxes'", "write [[x1, y1, x2, y2], …]") if isinstance(boxes, str) else boxes
    if not isinstance(boxes, list):
        raise VlmtuneError(f"{where}: 'boxes' is a list of [x1, y1, x2, y2], not {excerpt(boxes)}.")
    reply: list[Part] = [Text(row["answer"])] if row.get("answer") else []
    if boxes:
        reply.append(Boxes(_boxes(boxes, where)))
    if not row["question"].strip():
        raise VlmtuneError(f"{where}: 'question' is empty; fill it, or name the column of the reply 'caption'.")
    return [Turn("user", (Text(row["question"]),)), Turn("assistant", tuple(reply))]


def _caption_turns(row: dict, where: str, images: RowImages) -> list[Turn]:
    if not isinstance(row["caption"], str):
        raise VlmtuneError(f"{where}: 'caption' is a text, not {type(row['caption']).__name__}.")
    if not len(images):
        raise VlmtuneError(f"{where}: a caption without an image; add 'image', or a 'question'.")
    return [Turn("user", ()), Turn("assistant", (Text(row["caption"]),))]


# ---- fields -----------------------------------------------------------------------------------------------------


def _messages(row: dict, name: str, where: str) -> list:
    """The list of messages; a table may hold it as JSON text, which spares it a type for every part."""
    messages = row[name]
    messages = (
        loads(messages, f"{where}: {name!r}", "it is a list of messages") if isinstance(messages, str) else messages
    )
    if not isinstance(messages, list) or not messages:
        raise VlmtuneError(f"{where}: {name!r} must be a list with at least one message.")
    if row.get("boxes") not in (None, []):
        raise VlmtuneError(
            f"{where}: 'boxes' of a conversation have no place in it; write parts of type box in 'messages'."
        )
    return messages


def _with_system(row: dict, turns: list[Turn], where: str) -> list[Turn]:
    """ShareGPT's `system` field as the first turn."""
    system = row.get("system")
    if not system:
        return turns
    if not isinstance(system, str) or turns[0].role == "system":
        raise VlmtuneError(f"{where}: 'system' is a text, for a conversation without a system message of its own.")
    return [Turn("system", (Text(system),)), *turns]


def _entities(values: Any, sample: Sample, where: str) -> list[str]:
    """Strings whose tokens are key entities of the reply: each must occur in a reply that trains."""
    values = loads(values, f"{where}: 'entities'", "write a list of texts") if isinstance(values, str) else values
    if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
        raise VlmtuneError(f"{where}: 'entities' is a list of texts, not {excerpt(values)}.")
    trained = [turn for turn in sample.turns if turn.role == "assistant" and turn.train]
    replies = [part.text for turn in trained for part in turn.parts if isinstance(part, Text)]
    for value in values:
        if not any(entity_pattern([value]).search(reply) for reply in replies):
            raise VlmtuneError(
                f"{where}: entity {value[:80]!r} occurs in no reply as a whole word; write it as the reply does."
            )
    return values


def _name(value: Any, field_name: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise VlmtuneError(f"{where}: {field_name!r} is a text, not {excerpt(value)}.")
    return str(value)


def _role(name: Any, place: str) -> Role:
    if not isinstance(name, str) or name not in ROLE_NAMES:
        raise VlmtuneError(f"{place}: unknown role {name!r}; known: {', '.join(ROLE_NAMES)}.", code="role_unknown")
    return ROLE_NAMES[name]


def _train_flag(message: dict, place: str) -> bool:
    train = True if message.get("train") is None else message["train"]
    if not isinstance(train, bool):
        raise VlmtuneError(f"{place}: 'train' is true or false, not {train!r}.")
    return train


def _check_turns(sample: Sample, where: str) -> None:
    if not any(t.role == "assistant" and not t.is_empty for t in sample.turns):
        raise VlmtuneError(
            f"{where}: no assistant text to learn from; add a reply or remove the row.", code="reply_empty"
        )
    for number, turn in enumerate(sample.turns, 1):
        if turn.role == "assistant" and turn.train and turn.is_empty:
            raise VlmtuneError(
                f"{where}: the assistant reply in message {number} is empty; fill it or set train: false.",
                code="reply_empty",
            )
        if turn.role == "assistant" and any(isinstance(p, ImageRef) for p in turn.parts):
            raise VlmtuneError(
                f"{where}: message {number} puts an image into an assistant reply; move it to the user, or exchange "
                "the roles if they are the wrong way round.",
                code="image_in_reply",
            )


def _check_places(sample: Sample, where: str) -> None:
    count = len(sample.images)
    for part in (part for turn in sample.turns for part in turn.parts if isinstance(part, (Boxes, Points))):
        if part.image >= count:
            what = "box" if isinstance(part, Boxes) else "point"
            raise VlmtuneError(
                f"{where}: a {what} refers to image {part.image} (from 0) of {count}; correct its 'image'."
            )
