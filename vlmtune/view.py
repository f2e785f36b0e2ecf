"""What the model sees of a sample: the token view of `vlmtune inspect` and of a run's first batch (SPEC A3)."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image
from rich.console import Console

from vlmtune.build import (
    FittedData,
    build_encoder,
    build_steps,
    build_train,
    describe_sources,
    fit_data,
    load_base,
)
from vlmtune.build_course import build_settings
from vlmtune.config import Config
from vlmtune.data.encode import Encoder
from vlmtune.data.images import load_image
from vlmtune.data.survey import fitted_sample
from vlmtune.data.window import Fitted
from vlmtune.observe.histogram import Histogram, length_histogram
from vlmtune.observe.log import CountingBar
from vlmtune.observe.token_view import TokenView, terminal_table, write_token_view
from vlmtune.types import Box, Boxes, ImageGeometry, Kind, Points, VlmtuneError

CHANGED = {
    "turns": "Oldest turns dropped: {2}. {0} tokens became {1}.",
    "images": "Images shrunk: {2}. {0} tokens became {1}.",
    "reply": "Last reply {2}; its end-of-turn token carries no loss. {0} tokens became {1}.",
}
POINT_SIZE = 4  # pixels of the model's image: the square drawn around a point


def inspect_sample(config: Config, sample_id: str | None, page: Path, console: Console) -> Path:
    """Print and write the token view of one sample: the same encoder and data order as training."""
    base = load_base(config)
    encoder = build_encoder(base.processor, base.model, config.data)
    train_set = build_train(config.data)
    raw = [member.source for member in train_set]
    with CountingBar(console) as bar:
        fitted = fit_data(config, encoder, raw, {}, bar)
    sources = fitted.sources
    for line in describe_sources(sources, {}):
        console.print(f"data: {line}", highlight=False, markup=False)
    if sample_id is None:
        settings = build_settings(config, [s.size for s in sources], "fp32")
        steps = build_steps(config, sources, [member.weight for member in train_set], encoder, settings.total_steps)
        steps.order.decide(0)
        source, row = steps.order[0]
        found = fitted_sample(sources[source], row)
    else:
        found = _find_sample(config, fitted, sample_id)
    view = token_view(encoder, found)
    console.print(terminal_table(view))
    write_token_view(page, [view], histograms(config, fitted))
    return page


def _find_sample(config: Config, fitted: FittedData, sample_id: str) -> Fitted:
    for source in fitted.sources:
        for index in range(source.size or 0):
            found = fitted_sample(source, index)
            if found.sample.id == sample_id:
                return found
    for name, survey in fitted.surveys:
        for gone in survey.overlong:
            if gone.id == sample_id:
                raise VlmtuneError(
                    f"sample {sample_id!r} of {name} ({gone.origin}) is left out: it has {gone.tokens} tokens, and "
                    f"data.max_length is {config.data.max_length}."
                )
        for bad in survey.bad:
            if bad.id == sample_id:
                raise VlmtuneError(f"sample {sample_id!r} of {name} is left out: {bad.sentence}")
    raise VlmtuneError(f"no sample with id {sample_id!r} in the training files of this config.")


def histograms(config: Config, fitted: FittedData) -> list[Histogram]:
    """Lengths of every source that was counted."""
    limit = config.data.max_length
    return [length_histogram(name, s.sentence(limit), s.lengths, limit) for name, s in fitted.surveys]


def token_view(encoder: Encoder, fitted: Fitted) -> TokenView:
    """Everything the token view shows of one sample."""
    sample = fitted.sample
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
        notes=[
            *(CHANGED[change.action].format(*change.tokens, change.detail) for change in fitted.changes),
            *(
                f"Image {number}: complexity {budget.complexity:.3f} ({encoder.pictures.rule.measure}), so it gets "
                f"{budget.tokens} of {budget.without} image tokens."
                for number, budget in enumerate(encoder.budgets(sample), start=1)
            ),
        ],
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
