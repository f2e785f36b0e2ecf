"""A new vision-language model from an encoder and a language model (SPEC E): LLaVA's layout, a fresh projector.

The encoder and the language model keep their weights bit for bit, the tokenizer gains one placeholder, and the language
model's own chat template is kept; in front of it stand a few lines that write images as the placeholder.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    SiglipVisionModel,
)

from vlmtune.models.efficientnet import STRIDE, EfficientNetLiteConfig, EfficientNetLiteModel, imagenet_state_dict
from vlmtune.models.initialise import draw_anew
from vlmtune.models.load import load_processor
from vlmtune.models.resampler import LlavaResamplerConfig, LlavaResamplerForConditionalGeneration
from vlmtune.paths import new_folder
from vlmtune.types import VlmtuneError

IMAGE = "<image>"
EFFICIENTNET = "efficientnet-lite0"
TOWERS = {
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "efficientnet_lite": EfficientNetLiteModel,
}
"""model_type -> class of a tower that LLaVA can hold."""

# the language model's template sees strings alone, as it was written for; what it does with them is its own affair
IMAGES_AS_TEXT = """{%- set composed = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}{%- set words = message['content'] -%}
{%- else -%}
{%- set words -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endset -%}
{%- endif -%}
{%- set composed.messages = composed.messages + [dict(message, content=words)] -%}
{%- endfor -%}
{%- set messages = composed.messages %}
"""
# (no "-" at its end: white space that the template begins with is its own)


@dataclass(frozen=True)
class Vision:
    """A tower, its image processor, how LLaVA reads it. prefix: tokens in front of the grid (CLIP's class token)."""

    tower: PreTrainedModel
    image_processor: Any
    image_size: int
    patch_size: int
    layer: int
    prefix: int

    @property
    def grid(self) -> int:
        """Tokens of one image, without the prefix."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class Composed:
    """What was made: parameters by part, placeholders per image, what the tokenizer gained."""

    parameters: dict[str, int]
    image_tokens: int
    added: str | None


def compose(
    vision: str,
    language: str,
    folder: Path,
    projector: Literal["mlp", "resampler"] = "mlp",
    queries: int = 64,
    image_size: int | None = None,
    seed: int = 0,
) -> Composed:
    """Write a complete model folder.

    vision: folder or hub name of a CLIP or SigLIP model, or "efficientnet-lite0"; language: folder or hub name of a
    causal language model with a chat template, or a .gguf file; queries: image tokens of a resampler, a square;
    image_size: pixels along a side, of a tower that takes several. Raises VlmtuneError for anything that does not fit,
    with nothing written.
    """
    if folder.exists():
        raise VlmtuneError(f"{folder} exists; compose writes a new folder.")
    if math.isqrt(queries) ** 2 != queries:
        raise VlmtuneError(f"--queries {queries}: image tokens form a square grid; write a square such as 64 or 144.")
    eye = _load_vision(vision, image_size)
    model, tokenizer, added = _load_language(language)
    dtype = torch.promote_types(eye.tower.dtype, model.dtype)  # neither is rounded
    config = _config(eye, model, tokenizer, projector, queries)
    config.text_config.dtype = config.vision_config.dtype = dtype
    kind = LlavaForConditionalGeneration if projector == "mlp" else LlavaResamplerForConditionalGeneration
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        whole = kind(config).float()
    whole.model.vision_tower.load_state_dict(eye.tower.state_dict())
    whole.model.language_model.load_state_dict(model.get_decoder().state_dict())
    whole.lm_head.load_state_dict(model.get_output_embeddings().state_dict())
    _require_same_answers(whole, model.float(), language)
    bridge = whole.model.multi_modal_projector
    draw_anew({f"projector.{name}": p for name, p in bridge.named_parameters() if name != "queries"}, seed)
    whole.generation_config = _generation(model, tokenizer)
    tokens = queries if projector == "resampler" else eye.grid
    _write(folder, whole.to(dtype), _processor(eye, tokenizer, projector, queries), eye.image_size, tokens)
    parts = {"vision": whole.model.vision_tower, "projector": bridge, "language": whole.model.language_model}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return Composed(sizes, tokens, added)


def _load_vision(name: str, image_size: int | None) -> Vision:
    if name == EFFICIENTNET:
        size = image_size or 192
        if size % STRIDE:
            raise VlmtuneError(f"--image-size {size}: {name} takes multiples of {STRIDE}.")
        tower = EfficientNetLiteModel(EfficientNetLiteConfig(size))
        tower.load_state_dict(imagenet_state_dict())
        side = {"height": size, "width": size}
        images = CLIPImageProcessorPil(
            size=side, crop_size=side, do_center_crop=False, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3
        )
        return Vision(tower, images, size, STRIDE, -1, 0)
    try:
        config = AutoConfig.from_pretrained(name)
        kind = TOWERS.get(config.model_type)
        if kind is None:
            raise VlmtuneError(
                f"vision {name!r} is a {config.model_type}, which LLaVA cannot hold; name a CLIP or SigLIP model, or "
                f"{EFFICIENTNET}."
            )
        tower = kind.from_pretrained(name, dtype="auto")
        images = AutoImageProcessor.from_pretrained(name, backend="pil")
    except (OSError, ValueError) as error:
        raise VlmtuneError(f"vision {name!r} cannot be loaded ({_first_line(error)}).") from error
    if image_size not in (None, tower.config.image_size):
        raise VlmtuneError(f"--image-size {image_size}: {name!r} takes {tower.config.image_size} only; leave it out.")
    is_clip = config.model_type.startswith("clip")
    # LLaVA reads CLIP before its last layer, which was trained for the class token alone
    layer, prefix = (-2, 1) if is_clip else (-1, 0)
    return Vision(tower, images, tower.config.image_size, tower.config.patch_size, layer, prefix)


def _load_language(name: str) -> tuple[PreTrainedModel, Any, str | None]:
    """(model with a row for the placeholder, tokenizer with the placeholder, the placeholder if it is new)."""
    path, how = Path(name), {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise VlmtuneError(f"language {name} does not exist.")
        name, how = str(path.parent), {"gguf_file": path.name}
    try:
        own = AutoTokenizer.from_pretrained(name, **how)
        known = IMAGE in own.get_vocab()
        tokenizer = AutoTokenizer.from_pretrained(name, extra_special_tokens={"image_token": IMAGE}, **how)
        tokenizer.add_special_tokens({"extra_special_tokens": own.extra_special_tokens})  # the line above drops them
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32 if how else "auto", **how)
    except ImportError as error:
        raise VlmtuneError(
            f"language {name!r}: {_first_line(error)} (.gguf needs `pip install 'vlmtune[gguf]'`)."
        ) from error
    except (OSError, ValueError) as error:
        raise VlmtuneError(f"language {name!r} cannot be loaded ({_first_line(error)}).") from error
    if not tokenizer.chat_template:
        raise VlmtuneError(
            f"language {name!r} has no chat template; take an instruction-tuned model, or write chat_template.jinja."
        )
    head = model.get_output_embeddings()
    if not hasattr(model.get_decoder(), "embed_tokens") or head is None or head.bias is not None:
        raise _not_held(name, model, "its embedding or its head is built otherwise")
    if how:  # it is read from 4 bits into float32, and transformers would refuse to save it as what it is now
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
    _give_row(model, tokenizer.convert_tokens_to_ids(IMAGE), known)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = IMAGES_AS_TEXT + tokenizer.chat_template
    return model, tokenizer, None if known else IMAGE


def _not_held(name: str, model: PreTrainedModel, why: str) -> VlmtuneError:
    return VlmtuneError(
        f"language {name!r} is a {model.config.model_type}, which LLaVA cannot hold ({why}); take one such as Llama, "
        "Qwen2 or Mistral."
    )


@torch.no_grad()
def _require_same_answers(whole: PreTrainedModel, model: PreTrainedModel, name: str) -> None:
    """LLaVA puts a plain head on the decoder; what a language model does besides (a scale, a cap) would be lost."""
    ids = torch.arange(min(16, model.get_input_embeddings().num_embeddings))[None]
    found, expected = (each.eval()(input_ids=ids).logits for each in (whole, model))
    # the same operations on the same float32 numbers; the tolerance is for kernels of other architectures
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
        raise _not_held(name, model, "its logits are not its head's alone, and would change")


@torch.no_grad()
def _give_row(model: PreTrainedModel, token: int, known: bool) -> None:
    """A row for the placeholder: the mean of the old ones (SPEC D6). It is never looked up, but a row of noise would
    count as a token in the softmax."""
    old = model.get_input_embeddings().num_embeddings
    if token >= old:
        model.resize_token_embeddings(token + 1, mean_resizing=False)
    if not known:
        for table in {id(t.weight): t for t in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
            table.weight[token] = table.weight[: min(old, token)].float().mean(dim=0).to(table.weight.dtype)


def _config(eye: Vision, model: PreTrainedModel, tokenizer: Any, projector: str, queries: int) -> LlavaConfig:
    common = {
        "text_config": model.config.to_dict(),
        "vision_config": eye.tower.config.to_dict(),
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE),
        "image_seq_length": eye.grid if projector == "mlp" else queries,
        "vision_feature_layer": eye.layer,
        "vision_feature_select_strategy": "default" if eye.prefix else "full",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": bool(model.config.tie_word_embeddings),
    }
    return LlavaConfig(**common) if projector == "mlp" else LlavaResamplerConfig(num_queries=queries, **common)


def _processor(eye: Vision, tokenizer: Any, projector: str, queries: int) -> LlavaProcessor:
    """LLaVA's processor writes (side / patch_size)^2 placeholders; for a resampler the patch gives that number."""
    side = math.isqrt(queries)
    if projector == "resampler" and eye.image_size % side:
        raise VlmtuneError(
            f"--queries {queries}: {side} x {side} tokens do not divide an image of {eye.image_size} pixels; choose a "
            "square whose side does."
        )
    return LlavaProcessor(
        image_processor=eye.image_processor,
        tokenizer=tokenizer,
        patch_size=eye.patch_size if projector == "mlp" else eye.image_size // side,
        # a resampler has no class token, whatever the tower has: its processor counts the grid alone
        vision_feature_select_strategy="default" if eye.prefix and projector == "mlp" else "full",
        num_additional_image_tokens=eye.prefix if projector == "mlp" else 0,
        chat_template=tokenizer.chat_template,
    )


def _generation(model: PreTrainedModel, tokenizer: Any) -> GenerationConfig:
    own = model.generation_config
    return GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[tokenizer.convert_tokens_to_ids(IMAGE)],  # in a reply it would break the next forward
        max_new_tokens=64,
    )


def _write(folder: Path, model: nn.Module, processor: LlavaProcessor, image_size: int, tokens: int) -> None:
    """Whole or not at all, and only if the processor, read again, writes as many placeholders as there are features."""
    with new_folder(folder) as draft:
        model.save_pretrained(draft)
        processor.save_pretrained(draft)
        described = json.loads((draft / "config.json").read_text())
        described.pop("quantization_config", None)
        (draft / "config.json").write_text(json.dumps(described, indent=2))
        wide = Image.new("RGB", (2 * image_size, image_size))  # the tower takes squares alone: this must become one
        written = load_processor(str(draft))(images=wide, text=IMAGE)
        found = written["input_ids"][0].count(model.config.image_token_id)
        if found != tokens:
            raise VlmtuneError(
                f"{folder}: the processor writes {found} placeholders for {tokens} features; nothing was written."
            )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
