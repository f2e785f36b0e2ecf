"""Inputs nobody trained on: a model answers them, or refuses them in one sentence (SPEC H3)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from PIL import Image

from vlmtune.data.batch import collate
from vlmtune.data.encode import Encoder
from vlmtune.evaluate.generate import generation_config
from vlmtune.models.merging import model_inputs
from vlmtune.optim.precision import Precision, autocast
from vlmtune.types import ImageRef, Sample, Text, Turn, VlmtuneError

NEW_TOKENS = 8  # of a reply: whether it answers, not what
MANY_IMAGES = 8
SENTENCE = "The quick brown fox jumps over the lazy dog. "
SCRIPTS = "这是什么？ ما هذا؟ Что это? これは何ですか？ यह क्या है? זה מה? 👩‍👩‍👧‍👦 e\u0301\u200b\u202e"
"""A question in six scripts, a joined emoji, a combining accent, a zero-width space, a right-to-left override."""


@dataclass(frozen=True)
class Case:
    """name: for people; sample: a prompt without a reply."""

    name: str
    sample: Sample


@dataclass(frozen=True)
class Outcome:
    """said: the reply, the sentence of the refusal, or the error; tokens: of the prompt, where there was one."""

    name: str
    how: Literal["answered", "refused", "not finite", "broke"]
    said: str
    tokens: int = 0


def edge_cases(encoder: Encoder, context: int | None, markers: Sequence[str]) -> list[Case]:
    """context: tokens of a prompt that the model was trained for (None: no limit was set, and none is tried);
    markers: control tokens of the tokenizer, written as a user could."""
    photo = _png(_gradient(320, 240))
    cases = [
        _case("a black image", [_png(Image.new("RGB", (224, 224)))]),
        _case("a white image", [_png(Image.new("RGB", (224, 224), (255, 255, 255)))]),
        _case("an image of one pixel", [_png(Image.new("RGB", (1, 1), (200, 30, 30)))]),
        _case("a huge image, 4096 x 3072", [_png(_gradient(4096, 3072))]),
        _case("a very wide image, 2000 x 12", [_png(_gradient(2000, 12))]),
        _case("a very tall image, 12 x 2000", [_png(_gradient(12, 2000))]),
        _case("a transparent palette image", [_png(Image.new("RGBA", (64, 64), (0, 0, 0, 0)).convert("P"))]),
        _case("an image and no text", [photo], ""),
        _case("text and no image", [], "What is the capital of France?"),
        _case("no text and no image", [], ""),
        _case("text in six scripts", [photo], SCRIPTS),
        _case("text that looks like markers", [photo], "<image> </s> [INST] " + " ".join(markers) + " what is this?"),
        _many_images(encoder, photo, context),
    ]
    if context is not None:
        cases.append(_long_text(encoder, photo, context))
    return cases


def run_case(model: torch.nn.Module, encoder: Encoder, case: Case, precision: Precision) -> Outcome:
    """Ask it. Whatever goes wrong is the outcome: finding that out is what this is for."""
    device = next(model.parameters()).device
    try:
        prompt = encoder.encode_prompt(case.sample)
        batch = collate([prompt], encoder.pad_token_id, side="left").to(device)
        config = generation_config(encoder, NEW_TOKENS, output_logits=True, return_dict_in_generate=True)
        with torch.inference_mode(), autocast(precision, device):
            out = model.generate(**model_inputs(model, batch), generation_config=config)
    except VlmtuneError as error:
        return Outcome(case.name, "refused", str(error))
    except Exception as error:  # transformers, Pillow and torch raise whatever the input leads to
        first = (str(error).strip().splitlines() or [""])[0]
        return Outcome(case.name, "broke", f"{type(error).__name__}: {first[:200]}")
    # the image placeholders that are suppressed are -inf in the scores, not in the logits
    if not all(bool(torch.isfinite(logits).all()) for logits in out.logits):
        return Outcome(case.name, "not finite", "logits that are not finite", len(prompt))
    ids = out.sequences[0, batch.inputs["input_ids"].shape[1] :].tolist()
    return Outcome(case.name, "answered", encoder.decode(ids), len(prompt))


def _case(name: str, images: list[bytes], text: str = "What is in the picture?") -> Case:
    parts = (*(ImageRef(data) for data in images), *([Text(text)] if text else []))
    return Case(name, Sample(name, (Turn("user", parts),), origin="edge case"))


def _many_images(encoder: Encoder, photo: bytes, context: int | None) -> Case:
    """As many as fit, up to MANY_IMAGES."""
    count = MANY_IMAGES
    while context is not None and count > 1 and _length(encoder, _case("", [photo] * count)) + NEW_TOKENS > context:
        count -= 1
    return _case(f"{count} image{'s' * (count > 1)}", [photo] * count)


def _long_text(encoder: Encoder, photo: bytes, context: int) -> Case:
    """A prompt that fills the context, up to one sentence."""
    empty = _case("", [photo])
    each = max(1, encoder.text_length(SENTENCE * 20) // 20)
    room = context - NEW_TOKENS - _length(encoder, empty)
    text = SENTENCE * max(1, room // (each + 1))
    case = _case("", [photo], text + "What is in the picture?")
    return replace(case, name=f"a prompt of {_length(encoder, case):,} tokens")


def _length(encoder: Encoder, case: Case) -> int:
    return len(encoder.encode_prompt(case.sample))


def _gradient(width: int, height: int) -> Image.Image:
    """Something to see that costs no time to draw."""
    across = Image.linear_gradient("L").rotate(90).resize((width, height))
    down = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (across, down, Image.new("L", (width, height), 96)))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
