"""Our named chat templates on every family: renderings, ids of the plain processor, hostile text (SPEC A1, A2)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conversations import (
    CONVERSATIONS,
    SUPERVISED,
    assert_equals_plain,
    hostile,
    hostile_reply,
    many,
    messages_of,
    picture,
    sample,
    turn,
)
from hypothesis import given

from vlmtune.data.encode import Encoder
from vlmtune.data.grounding import coordinates
from vlmtune.data.templates import CUE, FORMS, TEMPLATES, chat_template, set_template
from vlmtune.errors import VlmtuneError
from vlmtune.models.load import load_processor
from vlmtune.models.tiny import FAMILIES
from vlmtune.types import Kind

EVERY = (*FAMILIES, "embedded")
every_family = pytest.mark.parametrize("family", EVERY)
every_template = pytest.mark.parametrize("name", TEMPLATES)
ONE_TURN = ("single turn", "a caption", "two interleaved images", "text only")
EOS = "!eos!"
PICTURE = "!image!"


@pytest.fixture(scope="session")
def encoder_of(tiny_folder: Callable[[str], Path], embedded_folder: Path) -> Callable[[str, str], Encoder]:
    encoders: dict[tuple[str, str], Encoder] = {}

    def build(family: str, name: str) -> Encoder:
        if (family, name) not in encoders:
            processor = load_processor(str(embedded_folder if family == "embedded" else tiny_folder(family)))
            processor.chat_template = None  # a model without one
            assert set_template(processor, name) is None
            encoders[family, name] = Encoder(processor, coordinates("norm1000"))
        return encoders[family, name]

    return build


@pytest.fixture
def encoder(family: str, name: str, encoder_of) -> Encoder:
    return encoder_of(family, name)


def rendering(encoder: Encoder, conversation, prompt: bool = False) -> str:
    """What the template writes, with the tokenizer's eos and the image placeholder called by plain names."""
    messages = [
        {"role": t["role"], "content": [{"type": "image"} if p["type"] == "image" else p for p in t["content"]]}
        for t in messages_of(conversation)
    ]
    text = encoder.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    placeholder = encoder.processor.image_token
    if "<|vision_start|>" in encoder.tokenizer.get_vocab():
        placeholder = f"<|vision_start|>{placeholder}<|vision_end|>"
    return text.replace(encoder.tokenizer.eos_token, EOS).replace(placeholder, PICTURE)


EXPECTED = {
    ("single", "single turn"): f"User: {PICTURE}\nWhat is in the picture?\nAssistant: a red circle{EOS}\n",
    ("system", "system prompt"): f"Answer with one word.\nUser: {PICTURE}\ncolor?\nAssistant: red{EOS}\n",
    ("system", "several turns"): (
        f"User: {PICTURE}\nWhat is on the left?\nAssistant: a triangle{EOS}\nUser: and\non the right?\n"
        f"Assistant: two small squares.\n\nYes.{EOS}\nUser: sure?\nAssistant: yes{EOS}\n"
    ),
    ("interleaved", "two interleaved images"): (
        f"User: Compare Image 1: {PICTURE} with Image 2: {PICTURE}: same?\nAssistant: no{EOS}\n"
    ),
    ("interleaved", "an image in a later turn"): (
        f"User: Image 1: {PICTURE}\ncolor?\nAssistant: red{EOS}\nUser: and Image 2: {PICTURE}\nAssistant: blue{EOS}\n"
    ),
    ("comparison", "single turn"): f"User: Image 1: {PICTURE}\nWhat is in the picture?\nAssistant: a red circle{EOS}\n",
    ("comparison", "two interleaved images"): (
        f"User: Compare Image 1: {PICTURE} with Image 2: {PICTURE}: same?\n{CUE}\nAssistant: no{EOS}\n"
    ),
    ("comparison", "an image in a later turn"): (
        f"User: Image 1: {PICTURE}\ncolor?\nAssistant: red{EOS}\nUser: and Image 2: {PICTURE}\n{CUE}\n"
        f"Assistant: blue{EOS}\n"
    ),
}


@every_family
@pytest.mark.parametrize(("name", "kind"), EXPECTED)
def test_what_is_rendered(encoder, name, kind):
    assert rendering(encoder, CONVERSATIONS[kind]) == EXPECTED[name, kind]


@pytest.mark.parametrize("family", ["llava"])
@pytest.mark.parametrize("name", ["comparison"])
def test_the_guide_shows_what_is_rendered(encoder):
    page = (Path(__file__).parents[3] / "docs" / "guide" / "data.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```\n(Answer with one word.*?)```", page, re.DOTALL)
    conversation = sample(
        turn("system", "Answer with one word."),
        turn("user", "Compare ", picture(), " with ", picture(), ". Which has more windows?"),
        turn("assistant", "Image 1 has four windows and Image 2 has six, so the second."),
    )
    assert rendering(encoder, conversation).replace(EOS, "</s>").replace(PICTURE, "<image>") == shown
    for template, form in FORMS.items():
        assert f"| `{template}` | {form.summary}" in page


@every_family
@every_template
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_equals_the_plain_processor(encoder, name, kind):
    if name == "single" and kind not in ONE_TURN:
        with pytest.raises(VlmtuneError, match=r"s1\): .*single takes one question and one reply; set it to system"):
            encoder.encode(CONVERSATIONS[kind])
        return
    conversation = CONVERSATIONS[kind]
    assert_equals_plain(encoder.processor, encoder.encode(conversation), messages_of(conversation))
    prompt = messages_of(conversation)[:-1]
    assert_equals_plain(encoder.processor, encoder.encode_prompt(conversation), prompt, add_generation_prompt=True)


@every_family
@every_template
@many
@given(question=hostile, reply=hostile_reply)
def test_hostile_text_moves_no_span(encoder, question, reply):
    """Replies and their eos are supervised, nothing else is; the image features' places are the template's alone."""
    conversation = sample(turn("user", picture(), question), turn("assistant", reply))
    encoded = encoder.encode(conversation)
    supervised = [int(i) for i in encoded.ids[encoded.supervised()]]
    text = encoder.tokenizer.decode(supervised, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert text == f" {reply}{encoder.tokenizer.eos_token}"
    assert supervised[-1] == encoder.tokenizer.eos_token_id and supervised[-1] not in supervised[:-1]
    images = {i for i, kind in zip(encoded.ids.tolist(), encoded.kinds.tolist(), strict=True) if kind == Kind.IMAGE}
    benign = encoder.encode(sample(turn("user", picture(), "a"), turn("assistant", "b")))
    assert int((encoded.kinds == Kind.IMAGE).sum()) == int((benign.kinds == Kind.IMAGE).sum())
    outside = encoded.ids[(encoded.kinds != Kind.IMAGE) & (encoded.kinds != Kind.SPECIAL)].tolist()
    assert not (images & encoder.image_token_ids) & set(outside)


@every_family
@every_template
def test_the_prompt_is_the_beginning_of_the_sample(encoder):
    conversation = CONVERSATIONS["single turn"]
    whole, prompt = encoder.encode(conversation), encoder.encode_prompt(conversation)
    assert whole.ids[: len(prompt)].tolist() == prompt.ids.tolist()
    assert not any(int(kind) in SUPERVISED for kind in whole.kinds[: len(prompt)])
    assert encoder.end_of_reply == encoder.tokenizer.eos_token_id in encoder.stop_token_ids()
    assert encoder.takes_system == (encoder.processor.chat_template.find("takes one question") < 0)


@pytest.mark.parametrize("family", ["embedded"])
@pytest.mark.parametrize("name", ["system", "interleaved", "comparison"])
def test_a_system_turn_in_the_middle_is_named(encoder, name):
    conversation = sample(turn("user", "a"), turn("system", "b"), turn("assistant", "c"))
    with pytest.raises(VlmtuneError, match=rf"system turn at place 2; data.template {name} takes one system turn"):
        encoder.encode(conversation)


def test_the_models_own_is_the_default(embedded_folder):
    processor = load_processor(str(embedded_folder))
    own = processor.chat_template
    assert set_template(processor, "auto") is None and processor.chat_template == own
    assert "takes the place of the model's own" in set_template(processor, "interleaved")
    assert processor.chat_template == chat_template("interleaved", processor) != own
    assert set_template(processor, "interleaved") is None


def test_a_model_without_a_template_gets_a_remedy(embedded_folder):
    processor = load_processor(str(embedded_folder))
    processor.chat_template = None
    with pytest.raises(VlmtuneError, match=r"no chat template: .*data.template to one of ours \(single, system, "):
        set_template(processor, "auto")


def test_a_tokenizer_without_eos_is_refused(embedded_folder):
    processor = load_processor(str(embedded_folder))
    processor.tokenizer.eos_token = None
    with pytest.raises(VlmtuneError, match="data.template system: the model's tokenizer names no eos_token"):
        set_template(processor, "system")
