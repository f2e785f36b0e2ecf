from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlmtune.models.load import load_model, load_processor
from vlmtune.models.tiny import FAMILIES, write_tiny
from vlmtune.types import VlmtuneError

SYSTEM = {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
USER = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is there?"}]}
REPLY = {"role": "assistant", "content": [{"type": "text", "text": "a red circle"}]}

QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def chatml(image: str, system: str | None) -> str:
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    user = f"<|im_start|>user\n{image}what is there?<|im_end|>\n"
    return f"{head}{user}<|im_start|>assistant\na red circle<|im_end|>\n"


# What the published templates render for the conversation above: (with system message, without).
RENDERED = {
    "qwen2_5_vl": (chatml(QWEN_IMAGE, "be brief"), chatml(QWEN_IMAGE, "You are a helpful assistant.")),
    "qwen3_vl": (chatml(QWEN_IMAGE, "be brief"), chatml(QWEN_IMAGE, None)),
    "internvl": (chatml("<IMG_CONTEXT>\n", "be brief"), chatml("<IMG_CONTEXT>\n", None)),
    "smolvlm": (
        "<|im_start|>System: be brief<end_of_utterance>\nUser:<image>what is there?<end_of_utterance>\n"
        "Assistant: a red circle<end_of_utterance>\n",
        "<|im_start|>User:<image>what is there?<end_of_utterance>\nAssistant: a red circle<end_of_utterance>\n",
    ),
    "llava": (
        "be brief USER: <image>\nwhat is there? ASSISTANT: a red circle</s>",
        "USER: <image>\nwhat is there? ASSISTANT: a red circle</s>",
    ),
    "gemma3": (
        "<bos><start_of_turn>user\nbe brief\n\n<start_of_image>what is there?<end_of_turn>\n"
        "<start_of_turn>model\na red circle<end_of_turn>\n",
        "<bos><start_of_turn>user\n<start_of_image>what is there?<end_of_turn>\n"
        "<start_of_turn>model\na red circle<end_of_turn>\n",
    ),
}


def with_image(turn: dict) -> dict:
    image = Image.linear_gradient("L").convert("RGB").resize((128, 96))
    return {
        **turn,
        "content": [{**part, "image": image} if part["type"] == "image" else part for part in turn["content"]],
    }


def encode(processor, turns: list[dict], **more):
    turns = [with_image(turn) for turn in turns]
    return processor.apply_chat_template([turns], tokenize=True, return_dict=True, return_tensors="pt", **more)


def test_every_family_has_a_golden_rendering():
    assert set(RENDERED) == set(FAMILIES)


def test_template_renders_what_the_published_one_does(family, tiny_folder):
    processor = load_processor(str(tiny_folder(family)))
    with_system, without = RENDERED[family]
    assert processor.apply_chat_template([SYSTEM, USER, REPLY], tokenize=False) == with_system
    assert processor.apply_chat_template([USER, REPLY], tokenize=False) == without


def test_plain_strings_render_like_lists_of_one_text(family, tiny_folder):
    processor = load_processor(str(tiny_folder(family)))
    strings = [{"role": role, "content": text} for role, text in (("system", "s"), ("user", "u"), ("assistant", "a"))]
    lists = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in strings]
    rendered = [processor.apply_chat_template(turns, tokenize=False) for turns in (strings, lists)]
    assert rendered[0] == rendered[1]


def test_generation_prompt_is_a_prefix_of_the_conversation(family, tiny_folder):
    processor = load_processor(str(tiny_folder(family)))
    for turns in ([USER, REPLY], [SYSTEM, USER, REPLY], [USER, REPLY, USER, REPLY]):
        prompt = processor.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
        full = processor.apply_chat_template(turns, tokenize=False)
        assert full.startswith(prompt)
        assert "a red circle" in full.removeprefix(prompt)


def test_generation_marks_hold_the_reply_and_its_end_marker(family, tiny_folder):
    processor = load_processor(str(tiny_folder(family)))
    batch = encode(processor, [USER, REPLY], return_assistant_tokens_mask=True)
    mask = torch.as_tensor(batch["assistant_masks"][0]).bool()
    marked = batch["input_ids"][0][mask]
    assert processor.tokenizer.decode(marked).strip() == "a red circle" + processor.tokenizer.eos_token
    assert int(marked[-1]) == processor.tokenizer.eos_token_id


def test_forward_backward_and_generate(family, tiny_folder):
    folder = str(tiny_folder(family))
    model, processor = load_model(folder), load_processor(folder)
    batch = encode(processor, [SYSTEM, USER, REPLY], return_assistant_tokens_mask=True)
    mask = torch.as_tensor(batch.pop("assistant_masks")).bool()
    loss = model(**batch, labels=batch["input_ids"].masked_fill(~mask, -100)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0

    prompt = encode(processor, [USER], add_generation_prompt=True)
    image_token = model.config.image_token_id
    ids = model.generate(**prompt, max_new_tokens=4, do_sample=False, suppress_tokens=[image_token])
    assert prompt["input_ids"].shape[1] < ids.shape[1] <= prompt["input_ids"].shape[1] + 4


def test_size_and_vocabulary(family, tiny_folder):
    folder = str(tiny_folder(family))
    model, processor = load_model(folder), load_processor(folder)
    tokenizer = processor.tokenizer
    assert 200_000 < sum(parameter.numel() for parameter in model.parameters()) < 400_000
    assert model.config.get_text_config().vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_special_tokens_are_single_special_tokens(family, tiny_folder):
    tokenizer = load_processor(str(tiny_folder(family))).tokenizer
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    assert tokenizer.eos_token in added and len(added) >= 4
    for content, token in added.items():
        assert token.special
        assert tokenizer(content, add_special_tokens=False)["input_ids"] == [tokenizer.convert_tokens_to_ids(content)]


def test_first_token_appears_once(family, tiny_folder):
    """llava's and gemma3's tokenizers put it there, gemma3's template too: the processor must not double it."""
    processor = load_processor(str(tiny_folder(family)))
    ids = encode(processor, [USER, REPLY])["input_ids"][0].tolist()
    bos = processor.tokenizer.bos_token_id
    if bos is not None:
        assert ids[0] == bos and ids.count(bos) == 1


def test_same_seed_same_bytes_and_global_random_state_untouched(family, tmp_path):
    state = torch.get_rng_state()
    folders = [write_tiny(family, tmp_path / str(number), seed) for number, seed in enumerate((3, 3, 4))]
    assert torch.equal(torch.get_rng_state(), state)
    weights = [digest(folder / "model.safetensors") for folder in folders]
    assert weights[0] == weights[1] != weights[2]
    for name in ("tokenizer.json", "chat_template.jinja", "processor_config.json", "config.json"):
        assert digest(folders[0] / name) == digest(folders[1] / name)


def test_video_section_is_written_where_the_family_has_one(family, tiny_folder):
    config = json.loads((tiny_folder(family) / "processor_config.json").read_text())
    assert ("video_processor" in config) == (family not in ("llava", "gemma3"))


def test_unknown_family_is_refused(tmp_path):
    with pytest.raises(VlmtuneError, match="no tiny model of family 'nonsense'.*gemma3"):
        write_tiny("nonsense", tmp_path)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
