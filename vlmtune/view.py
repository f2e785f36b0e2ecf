"""What the model sees of a sample: the token view of `vlmtune inspect` and of a run's first batch (SPEC A3)."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from rich.console import Console

from vlmtune.build import (
    build_encoder,
    build_settings,
    build_source,
    build_steps,
    describe_sources,
    load_model,
    resolve_model,
)
from vlmtune.config import Config
from vlmtune.data.encode import Encoder
from vlmtune.data.images import load_image
from vlmtune.observe.token_view import TokenView, terminal_table, write_token_view
from vlmtune.types import Boxes, Kind, Sample, VlmtuneError


def inspect_sample(config: Config, sample_id: str | None, page: Path, console: Console) -> Path:
    """Print and write the token view of one sample: the same encoder and data order as training."""
    model_path = resolve_model(config.model)
    model = load_model(model_path)
    encoder = build_encoder(model_path, model, config.data.coordinates, config.data.max_length)
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
    places = [part for turn in sample.turns for part in turn.parts if isinstance(part, Boxes)]
    for number, (ref, geometry) in enumerate(zip(sample.images, encoded.geometry, strict=True)):
        image = load_image(ref.source, sample.origin).resize((geometry.resized_width, geometry.resized_height))
        pages.append(_data_uri(image))
        sx, sy = geometry.resized_width / geometry.width, geometry.resized_height / geometry.height
        boxes.append(
            [(x1 * sx, y1 * sy, x2 * sx, y2 * sy) for b in places if b.image == number for x1, y1, x2, y2 in b.boxes]
        )
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


def _data_uri(image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
