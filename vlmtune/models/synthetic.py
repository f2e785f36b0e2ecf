"""A model and a batch of given sizes from config.json alone: no weights, no processor, no tokenizer.

Used to predict memory (`adapt.memory`): what matters of a batch is its shapes and where its image tokens are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from vlmtune.models.anatomy import require_supported
from vlmtune.types import Batch, Kind, VlmtuneError


@dataclass(frozen=True)
class BatchShape:
    """A micro-batch: `samples` rows of `tokens` tokens (image tokens included), `supervised` of which carry loss.

    images: of each sample; width, height: pixels of one image as the model gets it, that is after its resize.
    """

    samples: int = 1
    tokens: int = 1024
    images: int = 1
    width: int = 672
    height: int = 672
    supervised: int = 256

    def __post_init__(self) -> None:
        for name in ("samples", "tokens", "width", "height", "supervised"):
            if getattr(self, name) < 1:
                raise VlmtuneError(f"{name} of a batch is {getattr(self, name)}; give a number of at least 1.")
        if self.images < 0:
            raise VlmtuneError(f"images of a sample are {self.images}; give 0 or more.")
        if self.supervised >= self.tokens:
            raise VlmtuneError(
                f"{self.supervised} of {self.tokens} tokens are to carry loss; the first token of a sample never does."
            )


def build_without_data(config: PreTrainedConfig, attention: str = "sdpa") -> PreTrainedModel:
    """The model of a config, in eval mode, its weights neither drawn nor read.

    Meant for inside `torch.device("meta")` or `adapt.ledger.Ledger`; elsewhere it allocates memory.
    Raises VlmtuneError for a family without anatomy, and for sizes that contradict each other.
    """
    require_supported(config.model_type, "the config")
    try:
        with no_init_weights():
            model = AutoModelForImageTextToText.from_config(copy.deepcopy(config), attn_implementation=attention)
    except (ValueError, RuntimeError, ZeroDivisionError, AssertionError, TypeError) as error:
        raise VlmtuneError(
            f"no {config.model_type} model can be built from this config.json "
            f"({str(error).strip().splitlines()[0].rstrip('.')}): take the file of the published model."
        ) from error
    model.tie_weights()
    return model.eval()


@dataclass(frozen=True)
class _Images:
    """What the images of one micro-batch are to a family.

    tokens: of one image in the text, frames included; marked: how many of them are image placeholders; inputs: keyword
    arguments of forward for n samples of m images; frame: ids before and after the placeholders of an image.
    """

    tokens: int
    marked: int
    inputs: Callable[[int, int], dict[str, Tensor]]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def synthetic_batch(config: PreTrainedConfig, shape: BatchShape) -> Batch:
    """A micro-batch of this shape. Floats are ones that take no memory (expanded), integers are real.

    Raises VlmtuneError when the images alone have more tokens than a sample, and for a family without images here.
    """
    images = _images(config, shape)
    room = shape.tokens - shape.supervised
    if shape.images * images.tokens > room:
        raise VlmtuneError(
            f"{shape.images} image(s) of {shape.width}x{shape.height} pixels are {shape.images * images.tokens} tokens "
            f"of {config.model_type}, but only {room} of {shape.tokens} tokens carry no loss; allow more tokens, "
            "or make images fewer or smaller."
        )
    placeholder = _image_token(config)
    one = [*images.before, *[placeholder] * images.marked, *images.after]
    vocabulary = config.get_text_config().vocab_size
    filler = next(n for n in range(vocabulary) if n not in {*one, placeholder, *_other_media(config)} and n > 3)
    ids = torch.full((shape.samples, shape.tokens), filler)
    ids[:, : shape.images * len(one)] = torch.tensor(one * shape.images, dtype=torch.int64)
    kinds = torch.full((shape.samples, shape.tokens), int(Kind.INSTRUCTION), dtype=torch.int8)
    kinds[:, : shape.images * len(one)] = int(Kind.IMAGE)
    kinds[:, shape.tokens - shape.supervised :] = int(Kind.RESPONSE)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    is_image = (ids == placeholder).long()
    if config.model_type.startswith("qwen"):
        inputs["mm_token_type_ids"] = is_image
    if config.model_type in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = is_image if config.model_type == "gemma3" else (kinds == Kind.RESPONSE).long()
    if shape.images:
        inputs |= images.inputs(shape.samples, shape.images)
    names = [str(n) for n in range(shape.samples)]
    return Batch(inputs, kinds, ["default"] * shape.samples, names)


def tokens_per_image(config: PreTrainedConfig, width: int, height: int) -> int:
    """Tokens that an image of so many pixels takes in the text, the frame around it included."""
    return _images(config, BatchShape(width=width, height=height)).tokens


def image_tokens(config: PreTrainedConfig, batch: Batch) -> int:
    """Image placeholders in a micro-batch."""
    return int((batch.inputs["input_ids"] == _image_token(config)).sum())


def _ones(*shape: int) -> Tensor:
    return torch.ones(()).expand(*shape)


def _image_token(config: PreTrainedConfig) -> int:
    token = getattr(config, "image_token_id", None)
    return config.image_token_index if token is None else token


def _other_media(config: PreTrainedConfig) -> set[int]:
    names = ("video_token_id", "vision_start_token_id", "vision_end_token_id", "boi_token_index", "eoi_token_index")
    return {value for name in names if isinstance(value := getattr(config, name, None), int)}


def _pair(value: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _images(config: PreTrainedConfig, shape: BatchShape) -> _Images:
    vision = config.vision_config
    kind = config.model_type
    if kind.startswith("qwen"):
        return _qwen_images(config, vision, shape)
    if kind in ("smolvlm", "idefics3"):
        size, patch = vision.image_size, vision.patch_size
        rows, columns = math.ceil(shape.height / size), math.ceil(shape.width / size)
        crops = rows * columns + (1 if rows * columns > 1 else 0)
        marked = crops * (size // patch) ** 2 // config.scale_factor**2

        def tiles(samples: int, images: int) -> dict[str, Tensor]:
            total = (samples, images * crops)
            mask = torch.ones((), dtype=torch.bool).expand(*total, size, size)
            return {"pixel_values": _ones(*total, 3, size, size), "pixel_attention_mask": mask}

        return _Images(marked, marked, tiles)
    if kind == "internvl":
        size, patch = _pair(vision.image_size), _pair(vision.patch_size)
        tiles = max(1, round(shape.height / size[0]) * round(shape.width / size[1]))
        tiles += 1 if tiles > 1 else 0
        marked = tiles * int(size[0] // patch[0] * (size[1] // patch[1]) * config.downsample_ratio**2)
        return _Images(marked, marked, lambda b, n: {"pixel_values": _ones(b * n * tiles, 3, *size)})
    size, patch = _pair(vision.image_size), _pair(vision.patch_size)
    patches = size[0] // patch[0] * (size[1] // patch[1])
    marked = config.mm_tokens_per_image if kind == "gemma3" else patches
    if kind in ("llava", "llava_resampler"):
        marked = _llava_tokens(config, patches)
    if kind == "llava_next":
        raise VlmtuneError(
            "the memory of llava_next cannot be predicted from config.json: its tiles depend on the processor; "
            "use --data with a config, or another family."
        )
    return _Images(marked, marked, lambda b, n: {"pixel_values": _ones(b * n, 3, *size)})


def _llava_tokens(config: Any, patches: int) -> int:
    """A class token is there in CLIP's towers only; "default" drops the first token, whatever it is."""
    if not hasattr(config.vision_config, "num_hidden_layers"):  # no transformer: the config says what comes out of it
        return config.image_seq_length
    has_class_token = config.vision_config.model_type == "clip_vision_model"
    return patches + has_class_token - (config.vision_feature_select_strategy == "default")


def _qwen_images(config: Any, vision: Any, shape: BatchShape) -> _Images:
    merge, patch = vision.spatial_merge_size, vision.patch_size
    unit = merge * patch
    rows, columns = max(1, round(shape.height / unit)) * merge, max(1, round(shape.width / unit)) * merge
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
    values = channels * vision.temporal_patch_size * patch * patch
    marked = rows * columns // merge**2

    def patches(samples: int, images: int) -> dict[str, Tensor]:
        count = samples * images
        grid = torch.tensor([[1, rows, columns]] * count, dtype=torch.int64)
        return {"pixel_values": _ones(count * rows * columns, values), "image_grid_thw": grid}

    return _Images(
        marked + 2, marked, patches, (config.vision_start_token_id,), (config.vision_end_token_id,)
    )  # fmt: skip


def with_depth(config: PreTrainedConfig, vision: int, language: int) -> PreTrainedConfig:
    """A copy with so many blocks in the tower and in the language model, every kind of block still there.

    Windowed blocks of Qwen2.5-VL become global ones: they keep as many bytes, and windows take time to go through.
    """
    config = copy.deepcopy(config)
    tower, text = config.vision_config, config.get_text_config()
    before, _ = depths(config)
    if before:
        setattr(tower, _depth_field(config), vision)
    if config.model_type == "qwen2_5_vl":
        tower.fullatt_block_indexes = list(range(vision))
    if config.model_type == "qwen3_vl":
        tower.deepstack_visual_indexes = list(range(len(tower.deepstack_visual_indexes)))
    chosen = getattr(config, "vision_feature_layer", None)
    if isinstance(chosen, int) and chosen >= 0:
        config.vision_feature_layer = chosen - (before + 1)
    elif isinstance(chosen, (list, tuple)):
        config.vision_feature_layer = [n if n < 0 else n - (before + 1) for n in chosen]
    text.num_hidden_layers = language
    if getattr(text, "layer_types", None):
        text.layer_types = _some_of_each(text.layer_types, language)
    return config


def _some_of_each(kinds: list[str], count: int) -> list[str]:
    """The first `count` - 1 and the last, with every kind in it: each kind of attention has a mask and tables that are
    made once. Above the number there are, the last is repeated."""
    kinds = kinds + kinds[-1:] * (count - len(kinds))
    few = [*kinds[: count - 1], kinds[-1]]
    for place, missing in enumerate(kind for kind in dict.fromkeys(kinds) if kind not in few):
        few[1 + place] = missing
    return few


def depths(config: PreTrainedConfig) -> tuple[int, int]:
    """Blocks of the tower and of the language model. 0: a tower whose depth is no number in its config (the embedded
    model's), which is counted as it is."""
    return getattr(config.vision_config, _depth_field(config), 0), config.get_text_config().num_hidden_layers


def least_depths(config: PreTrainedConfig) -> tuple[int, int]:
    """The fewest blocks with which first, second, last but one and last are what they are in the whole model."""
    stacked = len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())
    chosen = getattr(config, "vision_feature_layer", None)
    behind = 0 if chosen is None else -min([chosen] if isinstance(chosen, int) else list(chosen))
    return max(3, stacked + 1, behind + 2), max(3, stacked + 1)


def _depth_field(config: PreTrainedConfig) -> str:
    return "depth" if hasattr(config.vision_config, "depth") else "num_hidden_layers"
