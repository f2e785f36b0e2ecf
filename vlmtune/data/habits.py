"""What the rows of one source have in common, where that can hardly be meant: boxes in another system of coordinates,
replies that are all alike, roles that are exchanged (SPEC H1).

One row proves nothing here, many do. Every rule says how many rows it wants, and stays silent below.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlmtune.data.images import is_quarter_turned
from vlmtune.types import Boxes, ImageRef, Sample, Text, Turn

SLACK = 1.0  # pixels: boxes are rounded
FEW_OUTSIDE = 0.1  # of the boxes: fewer are slips of single rows, each of which has its own finding
BOXES, CORNER_BOXES = 5, 30  # so many speak for a system of coordinates; for one that leaves nothing outside
CORNER = 0.6  # of width and height: pixels of boxes of real pictures reach further sooner or later
ALIKE = 0.25  # relative: a picture is scaled by one factor in both directions
THOUSANDTHS = (800.0, 1000.0)  # where the largest number of many boxes lies, if they are thousandths
FRAME = 0.98  # of the boxes must fit into a frame that explains them

ROWS = 20  # before replies are compared
SAME = 0.95  # of the replies
ROLES_ROWS, ASKING, NOT_ASKING = 10, 0.5, 0.1  # rows; replies that end in a question mark, and questions that do
VARIED = 0.3  # of the user's texts differ: who wants questions written asks for them in a few phrases
TOLD, TOLD_WORDS = 0.5, 4  # of the rows; words of a reply that stands in its own question by no accident
SHORT = 3  # words: there is one right answer to a question that is answered so; longer ones may be worded in many ways


@dataclass(frozen=True)
class Traits:
    """What one row adds. boxes: x1, y1, x2, y2, width, height and whether the picture was turned, of each box;
    reply, user: digests of texts, None where there is none; reply_asks, user_asks: whether they end in a question mark;
    is_told: whether the user says the reply already."""

    task: str
    boxes: tuple[tuple[float, ...], ...]
    reply: bytes | None
    user: bytes | None
    reply_asks: bool
    user_asks: bool
    is_told: bool


def traits_of(sample: Sample, sizes: list[tuple[int, int]]) -> Traits:
    """sizes: (width, height) of the images, upright."""
    replies = [turn for turn in sample.turns if turn.role == "assistant" and turn.train]
    user = " ".join(_text(turn) for turn in sample.turns if turn.role == "user").strip()
    reply = " ".join(map(_text, replies)).strip()
    return Traits(
        sample.task,
        tuple(_boxes(sample, sizes)),
        _digest(reply) if reply else None,
        _digest(user) if user else None,
        reply.endswith("?"),
        user.endswith("?"),
        _is_told(user, reply),
    )


def asked_digests(sample: Sample, pixels: list[bytes]) -> bytes | None:
    """Digest of all that comes before a short reply, and of that reply; None for other rows. pixels: of its images."""
    *before, last = sample.turns
    if last.role != "assistant" or not last.train or any(turn.role == "assistant" for turn in before):
        return None
    reply, question = _text(last), " ".join(map(_text, before)).strip()
    if not question or not 0 < len(reply.split()) <= SHORT or any(isinstance(part, Boxes) for part in last.parts):
        return None
    regions = repr([part for turn in before for part in turn.parts if isinstance(part, Boxes)])
    return _digest(question + regions, *pixels) + _digest(" ".join(reply.lower().split()).rstrip("."))


def _text(turn: Turn) -> str:
    return "".join(part.text for part in turn.parts if isinstance(part, Text)).strip()


def _digest(text: str, *more: bytes) -> bytes:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16)
    for part in more:
        digest.update(part)
    return digest.digest()


def _boxes(sample: Sample, sizes: list[tuple[int, int]]) -> Iterator[tuple[float, ...]]:
    images = [part for turn in sample.turns for part in turn.parts if isinstance(part, ImageRef)]
    turned: dict[int, bool] = {}
    for part in (part for turn in sample.turns for part in turn.parts if isinstance(part, Boxes)):
        if part.image < len(sizes):
            if part.image not in turned:
                turned[part.image] = is_quarter_turned(images[part.image].source)
            for box in part.boxes:
                yield (*box, *map(float, sizes[part.image]), float(turned[part.image]))


def _is_told(user: str, reply: str) -> bool:
    """Whether a question holds its own reply. An option of a list is none: it stands behind its letter, or alone on its
    line."""
    if len(reply.split()) < TOLD_WORDS or reply not in user:
        return False
    before = user[: user.index(reply)]
    return not before.rstrip(" \t").endswith(("\n", ".", ")", ":", "-", "*", ",", ";"))


@dataclass(frozen=True)
class Habit:
    """code: of `check.CODES`; row: an example; says: what was seen, and what to do."""

    code: str
    row: int
    says: str


class Habits:
    """Collects the traits of all rows of a source, and then tells what they have in common."""

    def __init__(self) -> None:
        self._boxes, self._box_rows = array("d"), array("q")
        self._replies: Counter[bytes] = Counter()
        self._first_row: dict[bytes, int] = {}
        self._users: set[bytes] = set()
        self._tasks: set[str] = set()
        self._rows = self._reply_asks = self._user_asks = self._told = 0
        self._told_row = self._asking_row = 0

    def add(self, row: int, traits: Traits) -> None:
        self._tasks.add(traits.task)
        for box in traits.boxes:
            self._boxes.extend(box)
            self._box_rows.append(row)
        if traits.reply is None:
            return
        self._rows += 1
        self._replies[traits.reply] += 1
        self._first_row.setdefault(traits.reply, row)
        if traits.user is not None:
            self._users.add(traits.user)
        if traits.reply_asks and not self._reply_asks:
            self._asking_row = row
        if traits.is_told and not self._told:
            self._told_row = row
        self._reply_asks += traits.reply_asks
        self._user_asks += traits.user_asks
        self._told += traits.is_told

    def findings(self, left_out: Sequence[str] = ()) -> Iterator[Habit]:
        """left_out: the tasks of rows of the file that are behind the limit of the source."""
        yield from self._of_limit(left_out)
        yield from self._of_boxes()
        yield from self._of_roles()
        yield from self._of_replies()

    def _of_limit(self, left_out: Sequence[str]) -> Iterator[Habit]:
        missing = sorted(set(left_out) - self._tasks)
        if missing and self._tasks:
            count = sum(task in missing for task in left_out)
            yield Habit(
                "limit_of_sorted", 0,
                f"limit leaves out every row of {', '.join(missing)}, the task of {count:,} of {len(left_out):,} rows "
                "looked at behind it: the file is sorted; shuffle it, or leave limit out",
            )  # fmt: skip

    def _of_roles(self) -> Iterator[Habit]:
        rows = self._rows
        if rows < ROLES_ROWS or self._reply_asks < ASKING * rows or self._user_asks > NOT_ASKING * rows:
            return
        if len(self._users) >= VARIED * rows:
            yield Habit(
                "roles_swapped", self._asking_row,
                f"{self._reply_asks:,} of {rows:,} replies are questions, and {self._user_asks:,} of what users say: "
                "user and assistant seem to be exchanged; exchange them, or this is what will be learned",
            )  # fmt: skip

    def _of_replies(self) -> Iterator[Habit]:
        rows = self._rows
        if self._replies and rows >= ROWS:
            reply, count = self._replies.most_common(1)[0]
            if count >= SAME * rows:
                yield Habit(
                    "replies_alike", self._first_row[reply],
                    f"{count:,} of {rows:,} replies are the same: that one is learned whatever the picture; balance "
                    "them, or look whether the column of the reply is the right one",
                )  # fmt: skip
        if rows >= ROLES_ROWS and self._told >= TOLD * rows:
            yield Habit(
                "reply_told", self._told_row,
                f"{self._told:,} of {rows:,} questions hold their own reply word by word: nothing is learned but to "
                "repeat it; remove it from the question",
            )  # fmt: skip

    # ---- boxes

    def _of_boxes(self) -> Iterator[Habit]:
        table = np.frombuffer(self._boxes, dtype=np.float64).reshape(-1, 7)
        if len(table) < BOXES:
            return
        boxes, sizes, turned = table[:, :4], table[:, 4:6], table[:, 6] > 0
        outside = ~_fits(boxes, sizes)
        share = f"{int(outside.sum()):,} of {len(boxes):,} boxes are not inside their pictures"
        if outside.sum() < max(3, FEW_OUTSIDE * len(boxes)):
            yield from self._in_a_corner(boxes, sizes)
            return
        example = int(self._box_rows[int(np.flatnonzero(outside)[0])])
        reach = _reach(boxes, sizes)
        if turned[outside].all() and _fits(boxes[turned], sizes[turned][:, ::-1]).mean() >= FRAME:
            yield Habit(
                "boxes_turned", example,
                f"{share}, all of pictures that EXIF turns by 90 degrees: they are those of the picture before that; "
                "turn them too",
            )  # fmt: skip
        elif _fits(boxes[:, [1, 0, 3, 2]], sizes).mean() >= FRAME:
            yield Habit(
                "boxes_swapped", example,
                f"{share}, and all with x and y exchanged; write x1, y1, x2, y2",
            )  # fmt: skip
        elif THOUSANDTHS[0] <= boxes.max() <= THOUSANDTHS[1] and boxes.min() >= 0:
            yield Habit(
                "boxes_thousandths", example,
                f"{share}, and no number is above 1000: they seem to be thousandths; write pixels of the file, the "
                "model's own convention is applied to them",
            )  # fmt: skip
        elif min(reach) > 1 and abs(reach[0] / reach[1] - 1) < ALIKE:
            yield Habit(
                "boxes_scaled", example,
                f"{share}: they reach {reach[0]:.2f} times its width and {reach[1]:.2f} times its height, as boxes of "
                "a larger copy do; scale them to the file",
            )  # fmt: skip

    def _in_a_corner(self, boxes: np.ndarray, sizes: np.ndarray) -> Iterator[Habit]:
        reach = _reach(boxes, sizes)
        if len(boxes) >= CORNER_BOXES and max(reach) < CORNER:
            yield Habit(
                "boxes_corner", int(self._box_rows[0]),
                f"no box of {len(boxes):,} reaches beyond {reach[0]:.0%} of the width or {reach[1]:.0%} of the height: "
                "they seem to be those of a smaller copy, or thousandths of large pictures; scale them to the file",
            )  # fmt: skip


def _fits(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """bool[n]. boxes float[n, 4]; sizes float[n, 2]: width, height."""
    return (boxes[:, :2] >= -SLACK).all(1) & (boxes[:, 2:] <= sizes + SLACK).all(1)


def _reach(boxes: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """How far the boxes go to the right and down, in widths and heights; single slips left out where there are many."""
    far = np.percentile(boxes[:, 2:] / sizes, 100 if len(boxes) < 100 else 99, axis=0)
    return float(far[0]), float(far[1])
