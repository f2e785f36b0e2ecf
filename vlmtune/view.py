"""What the model sees of a sample: the token view of `vlmtune inspect` and of a run's first batch (SPEC A3)."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image
from rich.console import Console

from vlmtune.build import (
    build_encoder,
    build_settings,
    build_source,
    build_steps,
    describe_sources,
    load_base,
)
from vlmtune.config import Config
from vlmtune.data.encode import Encoder
from vlmtune.data.images import load_image
from vlmtune.observe.token_view import TokenView, terminal_table, write_token_view
from vlmtune.types import Box, Boxes, ImageGeometry, Kind, Points, Sample, VlmtuneError

POINT_SIZE = 4  # pixels of the model's image: the square drawn around a point


def inspect_sample(config: Config, sample_id: str | None, page: Path, console: Console) -> Path:
    """Print and write the token view of one sample: the same encoder and data order as training."""
    base = load_base(config)
    encoder = build_encoder(base.path, base.model, config.data.coordinates, config.data.max_length, base.processor)
    sources = [build_source(source) for source in config.data.train]
    for line in describe_sources(sources, {}):
        console.print(f"data: {line}", highlight=False, markup=False)
    if sample_id is None:
        settings = build_settings(config, [s.size for s in sources], "fp32")
        steps = build_steps(config, sources, encoder, settings.total_steps)
        source, row = steps.mixture[0]
        sample = sources[source][row]
    else:
        sample = _find_sample(sources, sample_id)
    view = token_view(encoder, sample)
    console.print(terminal_table(view))
    write_token_view(page, [view])
    return page


def _find_sample(sources, sample_id: str) -> Sample:
    for source in sources:
        for index in range(source.size or 0):
            sample = source[index]
            if sample.id == sample_id:
                return sample
    raise VlmtuneError(f"no sample with id {sample_id!r} in the training files of this config.")


def token_view(encoder: Encoder, sample: Sample) -> TokenView:
    """Everything the token view shows of one sample."""
    encoded = encoder.encode(sample)
    carries = encoded.supervised().tolist()
    ids = encoded.ids.tolist()
    pages, boxes = [], []
    places = [part for turn in sample.turns for part in turn.parts if isinstance(part, (Boxes, Points))]
    for number, (ref, geometry) in enumerate(zip(sample.images, encoded.geometry, strict=True)):
        pages.append(_data_uri(_on_canvas(load_image(ref.source, sample.origin), geometry)))
        boxes.append([box for part in places if part.image == number for box in _rectangles(part, geometry)])
    return TokenView(
        sample_id=sample.id,
        task=sample.task,
        pieces=[encoder.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids],
        ids=ids,
        kinds=[Kind(k).name.lower() for k in encoded.kinds.tolist()],
        turns=encoded.turn.tolist(),
        weights=[1.0 if c else 0.0 for c in carries],
        images=pages,
        boxes=boxes,
    )


def _on_canvas(image: Image.Image, geometry: ImageGeometry) -> Image.Image:
    """The image as the model sees it: resized, and cropped or padded (black) as its geometry says."""
    width, height = geometry.resized_width, geometry.resized_height
    (u1, v1), (u2, v2) = geometry.to_canvas(*geometry.visible[:2]), geometry.to_canvas(*geometry.visible[2:])
    left, top, right, bottom = round(u1 * width), round(v1 * height), round(u2 * width), round(v2 * height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize((right - left, bottom - top), box=geometry.visible), (left, top))
    return canvas


def _rectangles(part: Boxes | Points, geometry: ImageGeometry) -> list[Box]:
    """What to draw, in canvas pixels: boxes, and points as small squares."""
    width, height = geometry.resized_width, geometry.resized_height
    if isinstance(part, Points):
        corners = [((x, y), (x, y), POINT_SIZE / 2) for x, y in part.points]
    else:
        corners = [((x1, y1), (x2, y2), 0.0) for x1, y1, x2, y2 in part.boxes]
    rectangles = []
    for first, last, margin in corners:
        (u1, v1), (u2, v2) = geometry.to_canvas(*first), geometry.to_canvas(*last)
        rectangles.append((u1 * width - margin, v1 * height - margin, u2 * width + margin, v2 * height + margin))
    return rectangles


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
