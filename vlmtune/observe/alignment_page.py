"""The alignment matrix as one HTML file: figures with intervals, readings, questions, pictures (SPEC A7)."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmtune.data.images import load_image
from vlmtune.observe.html import render_html, write_html
from vlmtune.observe.pictures import boxes_as_rectangles

LARGEST = 360  # pixels along the longer side of a picture


def write_alignment_page(path: Path, record: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]]) -> Path:
    """record: what align.json holds; pictures: of `align.pictures`. Returns `path`."""
    rows = list(next(iter(record["levels"].values()))["rows"])
    page = render_html(
        "alignment.html.jinja",
        record=record,
        rows=[{"name": row, "cells": [_cell(record, level, row) for level in record["levels"]]} for row in rows],
        pictures=[_drawn(picture) for picture in pictures],
    )
    return write_html(path, page)


def _cell(record: Mapping[str, Any], level: str, row: str) -> dict[str, Any]:
    """Figures of one cell; positions are 0 to 100."""
    found = record["levels"][level]["rows"][row]
    change = found["change"]
    verdict = "better" if change["low"] > 0 else "worse" if change["high"] < 0 else "same"
    return {
        "value": f"{found['after']['value']:.2f}",
        "interval": f"{found['after']['low']:.2f} to {found['after']['high']:.2f}",
        "change": "" if row in record["frozen"] else f"{change['value']:+.2f}".replace("-", "−"),
        "verdict": verdict,
        "low": 100 * found["after"]["low"], "high": 100 * found["after"]["high"], "at": 100 * found["after"]["value"],
        "before": 100 * found["before"]["value"], "frozen": row in record["frozen"],
        "prior": 100 * record["levels"][level]["without_looking"]["value"],
    }  # fmt: skip


def _drawn(picture: Mapping[str, Any]) -> dict[str, Any]:
    image = load_image(picture["image"], picture["origin"])
    width, height = image.size
    image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {
        **picture, "uri": uri, "width": width, "height": height, "rectangles": boxes_as_rectangles(picture["boxes"])
    }  # fmt: skip
