"""Tiny encoders and language models on disk, to compose."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


def write_vision(folder: Path, kind: str) -> Path:
    """A tiny CLIP or SigLIP tower of 4 x 4 patches with its image processor."""
    side = {"height": 56, "width": 56}
    options = {**SIZES, "num_hidden_layers": 3, "image_size": 56, "patch_size": 14}
    torch.manual_seed(1)
    if kind == "clip":
        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**options))
        images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=side)
    else:
        tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**options, vision_use_head=False))
        images = transformers.SiglipImageProcessorPil(size=side)
    tower.save_pretrained(folder)
    images.save_pretrained(folder)
    return folder


def write_language(folder: Path, kind: str, template: str | None = TEMPLATE) -> Path:
    """A tiny Llama (tied head) or Qwen2 (its own head, more rows than tokens), and a tokenizer with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["a red square", "system user assistant", "what is in the picture"] * 9, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)
    options = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 2,
               "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(2)
    if kind == "llama":
        config = transformers.LlamaConfig(vocab_size=len(fast), tie_word_embeddings=True, **options)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    else:
        config = transformers.Qwen2Config(vocab_size=len(fast) + 9, tie_word_embeddings=False, **options)
        transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder
