"""Published models by name: their config without the network, so that memory can be predicted before a download.

Only what decides sizes is here, from the config.json files the authors published; `tests/unit/models/test_shapes.py`
builds every one without weights and compares the number of parameters with the published one.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from vlmtune.models.anatomy import require_supported
from vlmtune.types import VlmtuneError


@dataclass(frozen=True)
class Shape:
    """name: on the Hugging Face Hub; aliases: short names; parameters: as published, a tied head once; rounded
    to a million where the exact number was not at hand."""

    name: str
    aliases: tuple[str, ...]
    parameters: int
    config: Callable[[], PreTrainedConfig]


def _text(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocabulary, **more,
    }  # fmt: skip


_QWEN_IDS = {
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_MROPE3 = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}


def _qwen2(text: dict[str, Any], tied: bool) -> PreTrainedConfig:
    tower = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": text["hidden_size"]}
    return transformers.Qwen2VLConfig(
        text_config=text | {"rope_parameters": _MROPE, "tie_word_embeddings": tied}, vision_config=tower,
        tie_word_embeddings=tied, **_QWEN_IDS,
    )  # fmt: skip


def _qwen25(text: dict[str, Any], tower_inner: int, tied: bool) -> PreTrainedConfig:
    tower = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": tower_inner, "num_heads": 16, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": text["hidden_size"],
    }  # fmt: skip
    return transformers.Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": _MROPE, "tie_word_embeddings": tied}, vision_config=tower,
        tie_word_embeddings=tied, **_QWEN_IDS,
    )  # fmt: skip


def _qwen3(text: dict[str, Any], large_tower: bool, tied: bool) -> PreTrainedConfig:
    tower = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
    if large_tower:
        tower = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
    tower |= {"num_heads": 16, "patch_size": 16, "num_position_embeddings": 2304,
              "out_hidden_size": text["hidden_size"]}  # fmt: skip
    return transformers.Qwen3VLConfig(
        text_config=text | {"head_dim": 128, "rope_parameters": _MROPE3, "tie_word_embeddings": tied},
        vision_config=tower, tie_word_embeddings=tied, **_QWEN_IDS,
    )  # fmt: skip


def _llava(text: dict[str, Any]) -> PreTrainedConfig:
    tower = {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
    }  # fmt: skip
    return transformers.LlavaConfig(
        text_config=text | {"model_type": "llama", "max_position_embeddings": 4096}, vision_config=tower,
        image_token_id=32000, image_seq_length=576, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip


def _internvl(text: dict[str, Any]) -> PreTrainedConfig:
    tower = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True, "use_qk_norm": False,
    }  # fmt: skip
    return transformers.InternVLConfig(
        text_config=text | {"model_type": "qwen2", "tie_word_embeddings": False}, vision_config=tower,
        image_token_id=151667, image_seq_length=256, downsample_ratio=0.5, tie_word_embeddings=False,
    )  # fmt: skip


def _smolvlm(text: dict[str, Any], large_tower: bool) -> PreTrainedConfig:
    tower = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
             "image_size": 512, "patch_size": 16}  # fmt: skip
    if large_tower:
        tower = _SO400M | {"image_size": 384}
        tower.pop("model_type")
    return transformers.SmolVLMConfig(
        text_config=text | {"model_type": "llama", "tie_word_embeddings": False, "pad_token_id": 2},
        vision_config=tower, scale_factor=3 if large_tower else 4, image_token_id=49190, tie_word_embeddings=False,
        pad_token_id=2,
    )  # fmt: skip


_SO400M = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "patch_size": 14,
}  # fmt: skip


def _gemma3(text: dict[str, Any]) -> PreTrainedConfig:
    return transformers.Gemma3Config(
        text_config=text | {"sliding_window": 1024},
        vision_config=_SO400M | {"image_size": 896, "vision_use_head": False}, mm_tokens_per_image=256,
        boi_token_index=255999, eoi_token_index=256000, image_token_index=262144,
    )  # fmt: skip


def _paligemma(size: int) -> PreTrainedConfig:
    text = _text(2048, 16384, 18, 8, 1, 257216, head_dim=256, model_type="gemma")
    return transformers.PaliGemmaConfig(
        text_config=text, vision_config=_SO400M | {"image_size": size, "vision_use_head": False},
        image_token_index=257152, projection_dim=2048,
    )  # fmt: skip


_QWEN_7B = _text(3584, 18944, 28, 28, 4, 152064)
_QWEN_72B = _text(8192, 29568, 80, 64, 8, 152064)

SHAPES: tuple[Shape, ...] = (
    Shape("Qwen/Qwen2-VL-2B-Instruct", ("qwen2-vl-2b",), 2_208_985_600,
          lambda: _qwen2(_text(1536, 8960, 28, 12, 2, 151936), tied=True)),
    Shape("Qwen/Qwen2-VL-7B-Instruct", ("qwen2-vl-7b",), 8_291_375_616, lambda: _qwen2(_QWEN_7B, tied=False)),
    Shape("Qwen/Qwen2-VL-72B-Instruct", ("qwen2-vl-72b",), 73_405_560_320, lambda: _qwen2(_QWEN_72B, tied=False)),
    Shape("Qwen/Qwen2.5-VL-3B-Instruct", ("qwen2.5-vl-3b",), 3_754_622_976,
          lambda: _qwen25(_text(2048, 11008, 36, 16, 2, 151936), 3420, tied=True)),
    Shape("Qwen/Qwen2.5-VL-7B-Instruct", ("qwen2.5-vl-7b",), 8_292_166_656,
          lambda: _qwen25(_QWEN_7B, 3420, tied=False)),
    Shape("Qwen/Qwen2.5-VL-32B-Instruct", ("qwen2.5-vl-32b",), 33_452_718_336,
          lambda: _qwen25(_text(5120, 27648, 64, 40, 8, 152064), 3456, tied=False)),
    Shape("Qwen/Qwen2.5-VL-72B-Instruct", ("qwen2.5-vl-72b",), 73_410_777_344,
          lambda: _qwen25(_QWEN_72B, 3456, tied=False)),
    Shape("Qwen/Qwen3-VL-2B-Instruct", ("qwen3-vl-2b",), 2_127_532_032,
          lambda: _qwen3(_text(2048, 6144, 28, 16, 8, 151936), large_tower=False, tied=True)),
    Shape("Qwen/Qwen3-VL-4B-Instruct", ("qwen3-vl-4b",), 4_437_815_808,
          lambda: _qwen3(_text(2560, 9728, 36, 32, 8, 151936), large_tower=False, tied=True)),
    Shape("Qwen/Qwen3-VL-8B-Instruct", ("qwen3-vl-8b",), 8_767_123_696,
          lambda: _qwen3(_text(4096, 12288, 36, 32, 8, 151936), large_tower=True, tied=False)),
    Shape("Qwen/Qwen3-VL-32B-Instruct", ("qwen3-vl-32b",), 33_357_000_000,
          lambda: _qwen3(_text(5120, 25600, 64, 64, 8, 151936), large_tower=True, tied=False)),
    Shape("llava-hf/llava-1.5-7b-hf", ("llava-1.5-7b",), 7_063_427_072,
          lambda: _llava(_text(4096, 11008, 32, 32, 32, 32064))),
    Shape("llava-hf/llava-1.5-13b-hf", ("llava-1.5-13b",), 13_351_000_000,
          lambda: _llava(_text(5120, 13824, 40, 40, 40, 32064))),
    Shape("OpenGVLab/InternVL3-1B-hf", ("internvl3-1b",), 938_000_000,
          lambda: _internvl(_text(896, 4864, 24, 14, 2, 151674))),
    Shape("OpenGVLab/InternVL3-2B-hf", ("internvl3-2b",), 2_088_957_440,
          lambda: _internvl(_text(1536, 8960, 28, 12, 2, 151674))),
    Shape("OpenGVLab/InternVL3-8B-hf", ("internvl3-8b",), 7_944_373_760,
          lambda: _internvl(_text(3584, 18944, 28, 28, 4, 151674))),
    Shape("HuggingFaceTB/SmolVLM2-256M-Video-Instruct", ("smolvlm2-256m", "smolvlm-256m"), 256_484_928,
          lambda: _smolvlm(_text(576, 1536, 30, 9, 3, 49280), large_tower=False)),
    Shape("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", ("smolvlm2-500m", "smolvlm-500m"), 507_482_304,
          lambda: _smolvlm(_text(960, 2560, 32, 15, 5, 49280), large_tower=False)),
    Shape("HuggingFaceTB/SmolVLM2-2.2B-Instruct", ("smolvlm2-2.2b", "smolvlm-2.2b"), 2_246_784_880,
          lambda: _smolvlm(_text(2048, 8192, 24, 32, 32, 49280), large_tower=True)),
    Shape("google/gemma-3-4b-it", ("gemma-3-4b", "gemma3-4b"), 4_300_079_472,
          lambda: _gemma3(_text(2560, 10240, 34, 8, 4, 262208, head_dim=256))),
    Shape("google/gemma-3-12b-it", ("gemma-3-12b", "gemma3-12b"), 12_187_325_040,
          lambda: _gemma3(_text(3840, 15360, 48, 16, 8, 262208, head_dim=256))),
    Shape("google/gemma-3-27b-it", ("gemma-3-27b", "gemma3-27b"), 27_432_406_640,
          lambda: _gemma3(_text(5376, 21504, 62, 32, 16, 262208, head_dim=128))),
    Shape("google/paligemma-3b-pt-224", ("paligemma-3b",), 2_923_466_480, lambda: _paligemma(224)),
)  # fmt: skip


def resolve_shape(name_or_path: str) -> tuple[str, PreTrainedConfig]:
    """(name to print, config) of a folder or file with config.json, or of a published model by name or alias.

    Raises VlmtuneError for a name that is neither, with the nearest names, and for a file that holds no config of a
    supported family.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise VlmtuneError(f"{name_or_path} holds no config.json: pass the folder that save_pretrained wrote.")
    if path.is_file():
        return name_or_path, _read_config(path)
    names = {alias.lower(): shape for shape in SHAPES for alias in (shape.name, *_short(shape))}
    wish = name_or_path.strip().lower()
    if wish not in names:
        near = difflib.get_close_matches(wish, names, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(s.aliases[0] for s in SHAPES)}."
        raise VlmtuneError(
            f"{name_or_path!r} is neither a folder or file with a config.json nor a model whose shape ships: {hint}"
        )
    return names[wish].name, names[wish].config()


def _short(shape: Shape) -> list[str]:
    """The aliases, and the hub name without its owner, with and without its ending."""
    own = shape.name.split("/")[1]
    return [*shape.aliases, own, re.sub(r"-(instruct|hf|it)$", "", own, flags=re.IGNORECASE)]


def _read_config(path: Path) -> PreTrainedConfig:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise VlmtuneError(f"{path} is not a config.json ({error}): pass the one of the model.") from error
    if not isinstance(tree, dict):
        raise VlmtuneError(f"{path} is not a config.json: it holds no mapping; pass the one of the model.")
    require_supported(tree.get("model_type"), str(path))
    try:
        return AutoConfig.from_pretrained(str(path))
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise VlmtuneError(f"{path} cannot be used ({first}): pass the one of the published model.") from error
