"""`vlmtune plan`: what to train a model with on so much memory, from its config.json alone (SPEC C7, C9)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from vlmtune.adapt.decision import Decision, Goal, decide
from vlmtune.build import build_encoder, build_train, cache_folder, resolve_model
from vlmtune.config import Config, load_config
from vlmtune.data.encode import Encoder
from vlmtune.data.sources import SampleSource
from vlmtune.data.survey import survey_source
from vlmtune.data.templates import set_template
from vlmtune.data.window import Window
from vlmtune.models.load import load_processor
from vlmtune.models.shapes import resolve_shape
from vlmtune.models.synthetic import BatchShape, build_without_data, tokens_per_image
from vlmtune.observe.log import CountingBar
from vlmtune.sizes import GIB, parse_bytes
from vlmtune.types import VlmtuneError

CONTEXT = 0.6 * GIB
"""Of a GPU: CUDA context and libraries. Assumed, not measured here."""
FRAGMENTED = 0.05
"""Share of a GPU's memory that the allocator cannot use. Assumed, not measured here."""
SIDE, TEXT, SUPERVISED = 672, 512, 256
"""Without data: pixels of a side of an image, tokens of text in a sample, tokens of them that carry loss."""
LOOKED_AT = 16  # samples of a source that are encoded to see their images and replies, beside the longest

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class DataShape:
    """The micro-batch that decides the peak, and where its sizes come from, one sentence."""

    batch: BatchShape
    origin: str


def plan_model(
    model: str,
    memory: str,
    console: Console,
    goal: Goal = "quality",
    data: str | None = None,
    tokens: int | None = None,
    images: int = 1,
    max_pixels: int | None = None,
    device: Device = "cuda",
    as_json: bool = False,
    processes: int = 1,
) -> dict[str, Any]:
    """Print (and return) the recommended plan of a model. model: folder, config.json, or a published name; processes:
    train together, with so much memory each.

    data: a config whose data is measured; tokens, images, max_pixels: of a sample, where there is none.
    Raises VlmtuneError for input that cannot be read, and when nothing fits.
    """
    limit = parse_bytes(memory, "--memory")
    name, config = resolve_shape(resolve_model(model) if model.startswith("embedded") else model)
    shape = _from_data(data, config, console) if data else _assumed(config, tokens, images, max_pixels)
    reserve = int(CONTEXT + FRAGMENTED * limit) if device == "cuda" else 0
    decision = decide(config, limit, goal, shape.batch, device, reserve=reserve, processes=processes)
    answer = _answer(model if model.startswith("embedded") else name, limit, reserve, device, goal, shape, decision)
    if as_json:
        console.print_json(json.dumps(answer))
    else:
        _show(answer, console)
    return answer


def _assumed(config: Any, tokens: int | None, images: int, max_pixels: int | None) -> DataShape:
    for option, value in (("--tokens", tokens), ("--max-pixels", max_pixels)):
        if value is not None and value < 1:
            raise VlmtuneError(f"{option} {value} is less than 1; leave it out, or give a positive number.")
    if images < 0:
        raise VlmtuneError(f"--images {images} is negative; give 0 or more.")
    side = SIDE if max_pixels is None else max(1, math.isqrt(max_pixels))
    seen = images * tokens_per_image(config, side, side)
    total = seen + TEXT if tokens is None else tokens
    supervised = min(SUPERVISED, max(1, (total - seen) // 2))
    batch = BatchShape(1, total, images, side, side, supervised)
    return DataShape(
        batch,
        f"assumed: {total} tokens a sample, {images} image(s) of {side}x{side} pixels ({seen} tokens), {supervised} "
        "tokens with loss; --data CONFIG measures yours",
    )


def _from_data(name: str, config: Any, console: Console) -> DataShape:
    """The longest sample of a config's training data decides the peak. Lengths are counted, nothing is trained."""
    wish = load_config(name)
    encoder = _encoder(wish)
    lengths: list[int] = []
    images, width, height, supervised = 0, 1, 1, 1
    with CountingBar(console) as bar:
        for member in build_train(wish.data):
            counted, rows = _lengths(member.source, encoder, wish, bar)
            lengths += counted
            for row in rows:
                encoded = encoder.encode(member.source[row])
                images = max(images, len(encoded.geometry))
                width = max([width, *(g.resized_width for g in encoded.geometry)])
                height = max([height, *(g.resized_height for g in encoded.geometry)])
                supervised = max(supervised, int(encoded.supervised().sum()))
    limit = wish.data.max_length
    longest = max(lengths) if limit is None else min(max(lengths), limit)
    seen = images * tokens_per_image(config, width, height) if images else 0
    longest = max(longest, seen + supervised + 1)
    middle, high = (int(np.quantile(lengths, q)) for q in (0.5, 0.95))
    return DataShape(
        BatchShape(1, longest, images, width, height, min(supervised, longest - seen - 1)),
        f"measured on {name}: {len(lengths):,} samples, half of them up to {middle} tokens, 95% up to {high}, longest "
        f"{longest}; up to {images} image(s) of {width}x{height} pixels ({seen} tokens), {supervised} tokens with loss",
    )


def _encoder(wish: Config) -> Encoder:
    """The encoder of a config without the weights of its model. Tokens that the config adds are not added here."""
    path = resolve_model(wish.model)
    processor = load_processor(path)
    set_template(processor, wish.data.template)
    _, config = resolve_shape(path)
    with torch.device("meta"):
        model = build_without_data(config)
    return build_encoder(processor, model, wish.data).without_limit()


def _lengths(source: SampleSource, encoder: Encoder, wish: Config, bar: CountingBar) -> tuple[list[int], list[int]]:
    """(tokens of every sample that can be counted, rows worth a look): scenes have no end, some of them are counted."""
    if source.identity is None:
        rows = list(range(LOOKED_AT if source.size is None else min(LOOKED_AT, source.size)))
        return [encoder.count(source[row]) for row in rows], rows
    limit = wish.data.max_length
    window = None if limit is None else Window(limit, wish.data.reply_reserve)
    survey = survey_source(
        source, encoder, window, cache_folder() / "lengths", wish.data.workers,
        lambda done: bar(source.name, done, source.size),
    )  # fmt: skip
    usable = np.where(survey.tokens <= (limit or survey.tokens.max()))[0]
    if not len(usable):
        raise VlmtuneError(f"{source.name}: every sample exceeds data.max_length {limit}; raise it.")
    order = usable[np.argsort(survey.tokens[usable])]
    return survey.lengths.tolist(), [int(row) for row in order[-LOOKED_AT:]]


def _answer(
    name: str, memory: int, reserve: int, device: Device, goal: Goal, shape: DataShape, decision: Decision
) -> dict[str, Any]:
    chosen = decision.chosen
    prediction = chosen.prediction
    place, peak = prediction.peak
    return {
        "model": name,
        "parameters": prediction.parameters,
        "trained": prediction.trained,
        "memory": memory,
        "reserve": reserve,
        "device": device,
        "goal": goal,
        "processes": decision.processes,
        "holders": chosen.holders,
        "data": shape.origin,
        "method": chosen.candidate.name,
        "micro_batch_size": chosen.micro_batch,
        "gradient_checkpointing": chosen.checkpointing,
        "total": prediction.total,
        "peak_in": place,
        "items": {item: size for item, size in peak.items.items() if size},
        "saved_by_forward": prediction.saved,
        "on_host": prediction.host,
        "image_share": prediction.image_share,
        "options": [
            {"method": option.name, "sent": option.sent(decision.processes), "bytes": option.needs,
             "is_lower_bound": option.prediction is None,
             "fits": option.needs <= decision.limit if option.prediction or option.needs > decision.limit else None,
             "chosen": option is chosen}
            for option in decision.options
        ],
        "reasons": list(decision.reasons),
        "config": decision.config,
    }  # fmt: skip


def _devices(answer: dict[str, Any]) -> str:
    return f"each of {answer['processes']} {answer['device']} devices" if answer["processes"] > 1 else answer["device"]


def _show(answer: dict[str, Any], console: Console) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    trained = f"{answer['trained'] / 1e6:.1f} million of them trained"
    say(f"{answer['model']}: {answer['parameters'] / 1e9:.2f} billion parameters, {trained}; "
        f"{answer['memory'] / GIB:.1f} GiB on {_devices(answer)}, goal {answer['goal']}")  # fmt: skip
    say(f"data {answer['data']}")
    table = Table(title=f"one optimizer step at its peak ({answer['peak_in']})", title_justify="left")
    table.add_column("item")
    table.add_column("GiB", justify="right")
    for item, size in sorted(answer["items"].items(), key=lambda pair: -pair[1]):
        table.add_row(item, f"{size / GIB:.3f}")
    table.add_section()
    table.add_row("all", f"{answer['total'] / GIB:.3f}")
    table.add_row("in reserve (context, fragmentation; assumed)", f"{answer['reserve'] / GIB:.3f}")
    table.add_row("left", f"{(answer['memory'] - answer['reserve'] - answer['total']) / GIB:.3f}")
    console.print(table)
    kept = ", ".join(f"{part} {size / GIB:.3f}" for part, size in answer["saved_by_forward"].items())
    say(f"kept by the forward for the backward, GiB: {kept}; {100 * answer['image_share']:.0f}% of tokens are image")
    if answer["on_host"]:
        say(f"optimizer state that may be paged to the host: {answer['on_host'] / GIB:.3f} GiB")
    options = Table(title="what was considered", title_justify="left")
    several = answer["processes"] > 1
    for column in ("plan", "GiB", *(["GiB sent a step"] if several else []), "fits"):
        options.add_column(column, justify="right" if column.startswith("GiB") else "left")
    for option in answer["options"]:
        bound = "≥ " if option["is_lower_bound"] else ""
        fits = {True: "yes", False: "no", None: "not tried"}[option["fits"]]
        sent = [f"{option['sent'] / GIB:.1f}"] if several else []
        options.add_row(option["method"], f"{bound}{option['bytes'] / GIB:.1f}", *sent,
                        "chosen" if option["chosen"] else fits)  # fmt: skip
    console.print(options)
    for reason in answer["reasons"]:
        say(f"- {reason}")
    say("\nfor the config:\n" + yaml.safe_dump(answer["config"], sort_keys=False, default_flow_style=None, width=120))
