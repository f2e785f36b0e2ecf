"""System prompts: the library's lengths, what may be written in their place, and where they go."""

from __future__ import annotations

import json

import pytest
from training_setup import png

from vlmtune.config import Data, Source
from vlmtune.data.encode import Encoder
from vlmtune.data.grounding import coordinates
from vlmtune.data.prompts import PROMPTS, SystemPrompt, length_remark, system_prompt
from vlmtune.data.sources import FileSource, PromptedSource
from vlmtune.models.load import load_processor
from vlmtune.types import Kind, Text, VlmtuneError


@pytest.mark.parametrize("name", PROMPTS)
def test_a_named_prompt_has_the_usual_length(name):
    """No tokenizer of a large vocabulary is here: English has 1 to 1.5 tokens per word in all of them."""
    words = len(PROMPTS[name].split())
    assert words >= 100 and 1.5 * words <= 200
    assert PROMPTS[name] == " ".join(PROMPTS[name].split()) and PROMPTS[name].endswith(".")
    assert system_prompt(name) == SystemPrompt(name, PROMPTS[name])


def test_your_own_prompt_is_a_text_or_a_file(tmp_path):
    assert system_prompt("Be brief.") == SystemPrompt("text", "Be brief.")
    (tmp_path / "p.txt").write_text("Be\nvery brief.\n")
    assert system_prompt(f"file:{tmp_path}/p.txt") == SystemPrompt("p.txt", "Be\nvery brief.")


@pytest.mark.parametrize(
    ("wish", "complaint"),
    [
        ("orc", "system prompt 'orc' is none of assistant, ocr, grounding, vqa, caption; write one of these"),
        ("", "it is empty"),
        (" \n", "it is empty"),
        ("file:no/such.txt", "system prompt file:no/such.txt: cannot be read"),
    ],
)
def test_what_is_no_prompt_is_refused(wish, complaint):
    with pytest.raises(VlmtuneError) as caught:
        system_prompt(wish)
    assert complaint in str(caught.value)


def test_an_unusual_length_is_remarked_on():
    assert length_remark(SystemPrompt("vqa", ""), 100) is length_remark(SystemPrompt("vqa", ""), 200) is None
    assert length_remark(SystemPrompt("vqa", ""), 201) == "system prompt vqa has 201 tokens; 100 to 200 are usual"
    assert "99 tokens" in length_remark(SystemPrompt("vqa", ""), 99)


def test_it_goes_before_conversations_without_one(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    messages = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "a cat"}]
    own = [{"role": "system", "content": "own"}, *messages]
    rows = [{"messages": messages}, {"messages": own}, {"question": "what", "answer": "red", "image": "0.png"}]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = FileSource(path)
    prompted = PromptedSource(plain, SystemPrompt("text", "Be brief."))
    assert [prompted[n].turns[0].parts for n in range(3)] == [
        (Text("Be brief."),),
        (Text("own"),),
        (Text("Be brief."),),
    ]
    assert prompted[0].turns[1:] == plain[0].turns and prompted[1] == plain[1]
    assert (prompted.size, prompted.name) == (3, "t.jsonl") and prompted.format.endswith("rows, system prompt text")
    assert prompted.identity != PromptedSource(plain, SystemPrompt("text", "Be long.")).identity != plain.identity


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "llava", "gemma3"])
def test_the_encoder_says_whether_the_template_takes_one(family, tiny_folder):
    processor = load_processor(str(tiny_folder(family)))
    assert Encoder(processor, coordinates("norm1000")).takes_system
    processor.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}"
        + processor.image_token
        + "{% endif %}"
        "{% endfor %}{% if m.role == 'assistant' %}" + processor.tokenizer.eos_token + "{% endif %}{% endfor %}"
    )
    encoder = Encoder(processor, coordinates("norm1000"))
    assert not encoder.takes_system


def test_a_prompt_is_instruction_and_carries_no_loss(tiny_folder, tmp_path):
    encoder = Encoder(load_processor(str(tiny_folder("qwen2_5_vl"))), coordinates("norm1000"))
    (tmp_path / "t.jsonl").write_text('{"question": "what", "answer": "red"}\n{"question": "what", "answer": "red"}\n')
    encoded = encoder.encode(PromptedSource(FileSource(tmp_path / "t.jsonl"), system_prompt("vqa"))[0])
    ours = encoded.kinds[encoded.turn == 0]
    assert len(ours) == encoder.text_length(PROMPTS["vqa"]) and bool((ours == Kind.INSTRUCTION).all())


def test_a_source_takes_its_own_the_defaults_or_none():
    from vlmtune.build import build_source

    def first(system: dict, default: str | None) -> str:
        source = Source(scenes="base", task="vqa", limit=1, **system)
        turn = build_source(source, Data(train=[source], system=default))[0].turns[0]
        return turn.parts[0].text if turn.role == "system" else turn.role

    assert first({}, None) == "user"
    assert first({}, "vqa") == PROMPTS["vqa"]
    assert first({"system": "ocr"}, "vqa") == PROMPTS["ocr"]
    assert first({"system": None}, "vqa") == "user"
