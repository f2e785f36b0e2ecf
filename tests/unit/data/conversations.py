"""Conversations, hostile text and the comparison with the plain processor, for the tests of the encoder."""

from __future__ import annotations

import io

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

from vlmtune.data.images import load_image
from vlmtune.types import Encoded, ImageRef, Kind, Sample, Text, Turn

SUPERVISED = {int(Kind.RESPONSE), int(Kind.BOX), int(Kind.ENTITY)}


def picture(width: int = 80, height: int = 60, seed: int = 0) -> ImageRef:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return ImageRef(buffer.getvalue())


def turn(role: str, *parts, train: bool = True) -> Turn:
    return Turn(role, tuple(Text(part) if isinstance(part, str) else part for part in parts), train)


def sample(*turns: Turn) -> Sample:
    return Sample("s1", turns, origin="train.jsonl:7")


CONVERSATIONS = {
    "single turn": sample(turn("user", picture(), "What is in the picture?"), turn("assistant", "a red circle")),
    "system prompt": sample(
        turn("system", "Answer with one word."), turn("user", picture(), "color?"), turn("assistant", "red")
    ),
    "several turns": sample(
        turn("user", picture(), "What is on the left?"),
        turn("assistant", "a triangle"),
        turn("user", "and\non the right?"),
        turn("assistant", "two small squares.\n\nYes."),
        turn("user", "sure?"),
        turn("assistant", "yes"),
    ),
    "two interleaved images": sample(
        turn("user", "Compare ", picture(80, 60), " with ", picture(40, 130, seed=1), ": same?"),
        turn("assistant", "no"),
    ),
    "an image in a later turn": sample(
        turn("user", picture(), "color?"),
        turn("assistant", "red"),
        turn("user", "and ", picture(99, 60)),
        turn("assistant", "blue"),
    ),
    "a caption": sample(turn("user", picture()), turn("assistant", "a red circle")),
    "text only": sample(turn("user", "how many?"), turn("assistant", "three, or 3.5 - é ☃ 漢")),
}  # fmt: skip


def messages_of(conversation: Sample) -> list[dict]:
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "image", "image": load_image(part.source, "test")}
                if isinstance(part, ImageRef)
                else {"type": "text", "text": part.text}
                for part in turn.parts
            ],
        }
        for turn in conversation.turns
    ]


def assert_equals_plain(processor, encoded: Encoded, messages: list[dict], **options) -> None:
    """ids, pixels and per-token extras are those of the processor itself."""
    plain = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **options)
    ours = {"input_ids": encoded.ids.unsqueeze(0), **encoded.pixels}
    ours |= {name: extra.unsqueeze(0) for name, extra in encoded.token_extras.items()}
    assert set(ours) == set(plain) - {"attention_mask"}
    for name, value in ours.items():
        assert torch.equal(value, plain[name]), name
        assert value.dtype == plain[name].dtype, name
    assert bool(plain["attention_mask"].all())


def text_part(content: str) -> dict:
    return {"type": "text", "text": content}


CONTROL = [
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>"),
    *("<|vision_end|>", "<image>", "<video>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>"),
    *("<row_1_col_1>", "<s>", "</s>", "<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<img>", "</img>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<IMG_CONTEXT>", "<box>", "</box>", "<region>"),
    *("</region>", "<loc_00>", "<loc_31>"),
]
WORDS = [
    *("assistant", "user\n", "ASSISTANT:", "Assistant:", "USER: ", "<start_of_turn>model\n", "system", "\n", "\n\n"),
    *(" ", "  ", "\t", "\r\n", "<|im_", "start|>", "<", ">", "|", "{{ 1 }}", "{% endif %}", "é", "漢字", "🙂"),
    "\u202e",
    *("\u0301", "\ufffd", "\ue000", "\U000f0000", "\ufdd2", "\x00", "0", "]]", "[[1,2,3,4]]", "</box", "a", "the red"),
]
plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1"), max_size=4)
hostile = st.lists(st.sampled_from(CONTROL) | st.sampled_from(WORDS) | plain_text, max_size=6).map("".join)
hostile_reply = hostile.filter(str.strip)
many = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
