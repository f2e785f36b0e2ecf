"""What the model sees of a sample: the resized image with its boxes and every token with its kind and loss weight.

SPEC A3, PAINS 40. One `TokenView` per sample, made from the encoding that training uses; two ways to look at it, a page
and a terminal table. Runs of the same image token are one entry, "image × 36".
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from PIL import Image
from rich.table import Table
from rich.text import Text

from vlmtune.observe.charts import number_text
from vlmtune.observe.histogram import Histogram
from vlmtune.observe.html import render_html, write_html
from vlmtune.observe.pictures import boxes_as_rectangles
from vlmtune.types import Box, Kind

# Terminal colours; the page has the same kinds in its own style sheet.
_COLOURS = {
    "special": "bright_black",
    "instruction": "blue",
    "image": "magenta",
    "response": "green",
    "box": "yellow",
    "entity": "cyan",
    "untrained": "red",
    "padding": "bright_black",
}


@dataclass(frozen=True)
class TokenView:
    """One encoded sample, token by token.

    pieces, ids, kinds (names of `types.Kind`, any case), turns (-1 = written by the template) and weights (loss weight,
    0 = no loss) have one entry per token. images: PNG data URIs as the model sees them, that is resized; boxes: per
    image, in pixels of that PNG. notes: what the reader must know, such as parts that were cut.
    ValueError: lists of different lengths.
    """

    sample_id: str
    task: str
    pieces: list[str]
    ids: list[int]
    kinds: list[str]
    turns: list[int]
    weights: list[float]
    images: list[str] = field(default_factory=list)
    boxes: list[list[Box]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("pieces", "ids", "kinds", "turns", "weights")}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"a token view needs one entry per token in each list, got {lengths}")
        if len(self.boxes) > len(self.images):
            raise ValueError(f"boxes for {len(self.boxes)} images, but there are {len(self.images)}")


@dataclass(frozen=True)
class Chip:
    """One token, or `count` equal image tokens in a row; `position` is that of the first."""

    position: int
    count: int
    piece: str
    id: int
    kind: str
    turn: int
    weight: float

    @property
    def shown(self) -> str:
        return f"image × {self.count}" if self.count > 1 else visible(self.piece) or "∅"

    @property
    def weight_text(self) -> str:
        return number_text(self.weight)

    @property
    def breaks(self) -> int:
        """How many lines the piece itself ends or contains: the page breaks its own line there."""
        return 0 if self.count > 1 else self.piece.count("\n")


def chips(view: TokenView) -> list[Chip]:
    """The tokens of a view in order, runs of one and the same image token collapsed."""
    tokens = [
        Chip(position, 1, piece, id_, _kind_name(kind), turn, float(weight))
        for position, (piece, id_, kind, turn, weight) in enumerate(
            zip(view.pieces, view.ids, view.kinds, view.turns, view.weights, strict=True)
        )
    ]
    collapsed = []
    for key, run in groupby(tokens, key=lambda chip: (chip.id, chip.kind, chip.turn, chip.weight)):
        run = list(run)
        if key[1] == "image" and len(run) > 1:
            first = run[0]
            run = [Chip(first.position, len(run), first.piece, first.id, "image", first.turn, first.weight)]
        collapsed.extend(run)
    return collapsed


def visible(piece: str) -> str:
    """The piece with line ends as "↵" and anything else that would not print as an escape such as "\\x1b"."""
    return "".join(
        "↵" if letter == "\n" else letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in piece
    )


def write_token_view(path: Path, views: Sequence[TokenView], histograms: Sequence[Histogram] = ()) -> Path:
    """Write one self-contained page with all views, and return its path. No scripts, no requests, all data escaped.

    histograms: lengths of the samples of each source, above the views.
    """
    samples = []
    for view in views:
        rows = chips(view)
        boxes = [*view.boxes, *([[]] * (len(view.images) - len(view.boxes)))]
        samples.append(
            {
                "view": view,
                "chips": rows,
                "images": [_drawn(uri, image_boxes) for uri, image_boxes in zip(view.images, boxes, strict=True)],
                "counts": _counts(view),
                "tokens": len(view.ids),
                "supervised": sum(weight > 0 for weight in view.weights),
                "heaviest": max(view.weights, default=0.0) or 1.0,
            }
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_html(path, render_html("token_view.html.jinja", samples=samples, histograms=histograms))


def terminal_table(view: TokenView) -> Table:
    """The view as a table for the terminal: id, piece, kind, weight, turn. Nothing in a piece is read as markup."""
    supervised = sum(weight > 0 for weight in view.weights)
    table = Table(
        title=Text(f"{visible(view.sample_id)} · {visible(view.task)}"),
        caption=Text(f"{len(view.ids)} tokens, {supervised} with loss"),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("id", justify="right")
    table.add_column("piece", overflow="fold")
    table.add_column("kind")
    table.add_column("weight", justify="right")
    table.add_column("turn", justify="right")
    for chip in chips(view):
        colour = _COLOURS.get(chip.kind, "")
        weight = Text(chip.weight_text, style="bold" if chip.weight else "dim")
        turn = "template" if chip.turn < 0 else str(chip.turn)
        table.add_row(str(chip.id), Text(chip.shown, style=colour), Text(chip.kind, style=colour), weight, turn)
    return table


def _kind_name(kind: str) -> str:
    """The name the style sheet knows; whatever else comes is shown without a colour of its own."""
    lowered = kind.lower()
    return lowered if lowered.upper() in Kind.__members__ else "unknown"


def _counts(view: TokenView) -> list[tuple[str, int]]:
    """(kind, tokens) in the order in which the kinds first appear."""
    return list(Counter(_kind_name(kind) for kind in view.kinds).items())


def _drawn(uri: str, boxes: list[Box]) -> dict:
    width, height = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size
    return {"uri": uri, "width": width, "height": height, "rectangles": boxes_as_rectangles(boxes)}
