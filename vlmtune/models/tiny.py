"""A complete random model of every family, about 0.3 M parameters, for tests and dry runs.

`write_tiny` writes what a published model's folder holds: weights, processor, tokenizer with the family's own special
tokens, chat template and generation config; nothing is downloaded. The chat templates render what the published ones
render (whitespace, default system message, capitalised roles, `<bos>`), with `{% generation %}` around each reply and
its end marker. As in the originals, llava's and gemma3's tokenizers put their first token in front themselves, and
gemma3's template writes `<bos>` too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

import vlmtune.models.load  # noqa: F401  makes processors with a video slot usable without torchvision
from vlmtune.types import VlmtuneError

VOCABULARY = 512  # upper bound for the 256 bytes and the merges; the words below give 392 in all
WORDS = (
    "the a red blue green yellow circle square triangle on left right of picture what is there in image how many color "
    "shape are user assistant answer yes no box where one two three big small"
)


@dataclass(frozen=True)
class _Family:
    """What a family adds: its special tokens, chat template, processor and config, all built around one tokenizer."""

    template: str
    eos: str  # the end-of-turn marker
    pad: str
    bos: str | None  # the tokenizer puts it in front when `tokenizer_adds_bos`
    tokenizer_adds_bos: bool
    named: dict[str, str]  # tokenizer attribute -> special token
    special: tuple[str, ...]  # the other special tokens
    config: Callable[[PreTrainedTokenizerFast], PreTrainedConfig]
    image_processor: Callable[[], Any]
    processor: str
    processor_options: dict[str, Any]
    video_processor: dict[str, Any] | None = None


# Templates. Blocks end in `-%}`, so that only what `{{ }}` writes is rendered.

_CHATML = """
{%- for message in messages -%}
@@SYSTEM@@
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '@@IMAGE@@' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""".strip()

_QWEN25_SYSTEM = """
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
""".strip()

_SMOLVLM = """
{{- '<|im_start|>' -}}
{%- for message in messages -%}
{{- message['role'] | capitalize -}}
{%- if message['content'] is not string and message['content'] and message['content'][0]['type'] == 'image' -%}
{{- ':' -}}
{%- else -%}
{{- ':' if message['role'] == 'assistant' else ': ' -}}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{- ' ' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<end_of_utterance>' -}}
{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<end_of_utterance>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
""".strip()

# LLaVA-1.5 (Vicuna): the system message has no role in front, images stand before the text of their turn.
_LLAVA = """
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- 'ASSISTANT:' -}}
{%- generation -%}
{{- ' ' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '</s>' -}}
{%- endgeneration -%}
{%- else -%}
{%- if message['role'] != 'system' -%}{{- message['role'] | upper + ': ' -}}{%- endif -%}
{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- ' ' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
""".strip()

# Gemma 3: the system message goes in front of the first user turn, texts are stripped, roles must alternate.
_GEMMA3 = """
{{- bos_token -}}
{%- set first = namespace(prefix='') -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] -%}
{%- set first.prefix = (system if system is string else system[0]['text']) + '\\n\\n' -%}
{%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
{{- first.prefix if loop.first else '' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{%- if message['content'] is string -%}{{- message['content'] | trim -}}{%- else -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] | trim -}}{%- endfor -%}
{%- endif -%}
{{- '<end_of_turn>' -}}
{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{%- if message['content'] is string -%}{{- message['content'] | trim -}}{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<start_of_image>' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] | trim -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<end_of_turn>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
""".strip()


def _chatml(image: str, system: str = "") -> str:
    return _CHATML.replace("@@IMAGE@@", image).replace("@@SYSTEM@@\n", system + "\n" if system else "")


# Configs: text model 4 layers x 64, tower 2-3 blocks x 32. Only what differs from these is said below.


def _text(tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def _vision(**more: Any) -> dict[str, Any]:
    return {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, **more}


def _qwen_vision(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    return {**sizes, "spatial_merge_size": 2, "temporal_patch_size": 2, **more}


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    tokens = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def _rope(sections: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **more}


def _qwen2_5_vl(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return transformers.Qwen2_5_VLConfig(
        text_config=_text(tokenizer, rope_parameters=_rope([2, 3, 3]), tie_word_embeddings=False),
        vision_config=_qwen_vision(depth=2, patch_size=14, window_size=56, fullatt_block_indexes=[1]),
        tie_word_embeddings=False,
        **_qwen_ids(tokenizer),
    )


def _qwen3_vl(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    rope = _rope([4, 2, 2], mrope_interleaved=True)
    return transformers.Qwen3VLConfig(
        text_config=_text(tokenizer, head_dim=16, rope_parameters=rope),
        vision_config=_qwen_vision(
            depth=3, patch_size=16, num_position_embeddings=256, deepstack_visual_indexes=[0, 1]
        ),
        **_qwen_ids(tokenizer),
    )


def _smolvlm(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return transformers.SmolVLMConfig(
        text_config=_text(tokenizer, model_type="llama"),
        vision_config=_vision(image_size=64, patch_size=8),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )


def _llava(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return transformers.LlavaConfig(
        text_config=_text(tokenizer, model_type="llama"),
        vision_config=_vision(
            model_type="clip_vision_model", num_hidden_layers=3, image_size=56, patch_size=14, projection_dim=32
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _internvl(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return transformers.InternVLConfig(
        text_config=_text(tokenizer, model_type="qwen2"),
        vision_config=_vision(image_size=[56, 56], patch_size=[14, 14]),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )


def _gemma3(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    ids = tokenizer.convert_tokens_to_ids
    return transformers.Gemma3Config(
        # six layers: every sixth attends globally, the others within the sliding window
        text_config=_text(tokenizer, num_hidden_layers=6, head_dim=16, sliding_window=32),
        vision_config=_vision(image_size=56, patch_size=14, vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        image_token_index=ids("<image_soft_token>"),
        eos_token_id=tokenizer.eos_token_id,
    )


_QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_SQUARE = {"height": 56, "width": 56}

_FAMILIES: dict[str, _Family] = {
    "qwen2_5_vl": _Family(
        template=_chatml(_QWEN_IMAGE, _QWEN25_SYSTEM),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        bos=None,
        tokenizer_adds_bos=False,
        named=_QWEN_TOKENS,
        special=("<|im_start|>",),
        config=_qwen2_5_vl,
        image_processor=lambda: transformers.Qwen2VLImageProcessorPil(
            min_pixels=56 * 56, max_pixels=28 * 28 * 64, patch_size=14, merge_size=2, temporal_patch_size=2
        ),
        processor="Qwen2_5_VLProcessor",
        processor_options={},
        video_processor={"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 14, "merge_size": 2},
    ),
    "qwen3_vl": _Family(
        template=_chatml(_QWEN_IMAGE),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        bos=None,
        tokenizer_adds_bos=False,
        named=_QWEN_TOKENS,
        special=("<|im_start|>",),
        config=_qwen3_vl,
        image_processor=lambda: transformers.Qwen2VLImageProcessorPil(
            min_pixels=64 * 64, max_pixels=32 * 32 * 64, patch_size=16, merge_size=2, temporal_patch_size=2
        ),
        processor="Qwen3VLProcessor",
        processor_options={},
        video_processor={"video_processor_type": "Qwen3VLVideoProcessor", "patch_size": 16, "merge_size": 2},
    ),
    "smolvlm": _Family(
        template=_SMOLVLM,
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        bos="<|im_start|>",
        tokenizer_adds_bos=False,
        named={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
        special=("<video>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))),
        config=_smolvlm,
        image_processor=lambda: transformers.SmolVLMImageProcessorPil(
            size={"longest_edge": 128}, max_image_size={"longest_edge": 64}, do_image_splitting=True
        ),
        processor="SmolVLMProcessor",
        processor_options={"image_seq_len": 16},
        video_processor={"video_processor_type": "SmolVLMVideoProcessor"},
    ),
    "llava": _Family(
        template=_LLAVA,
        eos="</s>",
        pad="<pad>",
        bos="<s>",
        tokenizer_adds_bos=True,
        named={"image_token": "<image>"},
        special=(),
        config=_llava,
        image_processor=lambda: transformers.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=_SQUARE),
        processor="LlavaProcessor",
        processor_options={
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    "internvl": _Family(
        template=_chatml("<IMG_CONTEXT>\\n"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        bos=None,
        tokenizer_adds_bos=False,
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        special=("<|im_start|>",),
        config=_internvl,
        image_processor=lambda: transformers.GotOcr2ImageProcessorPil(
            size=_SQUARE, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        processor="InternVLProcessor",
        processor_options={"image_seq_length": 4},
        video_processor={"video_processor_type": "InternVLVideoProcessor", "size": _SQUARE},
    ),
    "gemma3": _Family(
        template=_GEMMA3,
        eos="<end_of_turn>",
        pad="<pad>",
        bos="<bos>",
        tokenizer_adds_bos=True,
        named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        special=("<start_of_turn>",),
        config=_gemma3,
        image_processor=lambda: transformers.Gemma3ImageProcessorPil(size=_SQUARE),
        processor="Gemma3Processor",
        processor_options={"image_seq_length": 4},
    ),
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)


def write_tiny(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a random model of `family` (one of FAMILIES) to `folder`; the same seed gives the same weights.

    The folder loads with plain `AutoModelForImageTextToText` and `AutoProcessor` (families with a video slot need
    torchvision for that, or `vlmtune.models.load` imported first). The global random state is left as it was.
    Returns `folder`. Raises VlmtuneError for an unknown family.
    """
    if family not in _FAMILIES:
        raise VlmtuneError(f"there is no tiny model of family {family!r}: choose one of {', '.join(FAMILIES)}.")
    spec = _FAMILIES[family]
    tokenizer = _train_tokenizer(spec)
    config = spec.config(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageTextToText.from_config(config)
        if family == "gemma3":  # transformers starts it at zero: no image would ever reach the logits
            torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.02)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    processor = getattr(transformers, spec.processor)(
        image_processor=spec.image_processor(),
        tokenizer=tokenizer,
        chat_template=spec.template,
        **spec.processor_options,
        **_video_processor(spec),
    )
    processor.save_pretrained(folder)
    if spec.video_processor is not None:
        path = folder / "processor_config.json"
        saved = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**saved, "video_processor": spec.video_processor}, indent=2), encoding="utf-8")
    return folder


def _video_processor(spec: _Family) -> dict[str, Any]:
    """What a processor with a video slot asks for where torchvision is installed; without it nobody can have one."""
    if spec.video_processor is None or not is_torchvision_available():
        return {}
    options = dict(spec.video_processor)
    return {"video_processor": getattr(transformers, options.pop("video_processor_type"))(**options)}


def _train_tokenizer(spec: _Family) -> PreTrainedTokenizerFast:
    """Byte-level BPE on random sentences of WORDS; what the family's text is made of are added special tokens."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    draw = random.Random(0)
    corpus = [" ".join(draw.choices(WORDS.split(), k=12)) for _ in range(500)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    leading = [spec.pad, *([spec.bos] if spec.bos else []), spec.eos]
    special = dict.fromkeys([*leading, *spec.special, *spec.named.values()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if spec.tokenizer_adds_bos:
        bos = (spec.bos, tokenizer.token_to_id(spec.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{spec.bos} $A", pair=f"{spec.bos} $A {spec.bos} $B", special_tokens=[bos]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=spec.bos,
        eos_token=spec.eos,
        pad_token=spec.pad,
        extra_special_tokens=spec.named,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
