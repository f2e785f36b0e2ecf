"""LLaVA with a resampler: a fixed number of image tokens, whatever the tower makes of an image.

Learned queries look at the features of the tower in one cross-attention, as in Qwen-VL (Bai et al. 2023, section 2.1;
after Flamingo's perceiver, Alayrac et al. 2022). Keys carry two-dimensional sine positions of their place in the grid,
queries those of theirs. A folder of such a model loads with plain `from_pretrained` after importing this module.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

HEAD_WIDTH = 64


class LlavaResamplerConfig(LlavaConfig):
    model_type = "llava_resampler"

    def __init__(self, num_queries: int = 64, **kwargs):
        self.num_queries = num_queries
        super().__init__(**kwargs)


class Resampler(nn.Module):
    """Features float[B, N, D_vision] of a square grid -> float[B, num_queries, D_text]."""

    def __init__(self, config: LlavaResamplerConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.queries = nn.Parameter(torch.empty(config.num_queries, width))
        self.input = nn.Linear(config.vision_config.hidden_size, width, bias=False)
        self.input_norm, self.query_norm, self.output_norm = (nn.LayerNorm(width) for _ in range(3))
        self.heads = max(count for count in range(1, max(1, width // HEAD_WIDTH) + 1) if width % count == 0)
        # not nn.MultiheadAttention: no adapter and no quantisation reaches the matrices in there
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))
        self.output = nn.Linear(width, width, bias=False)
        nn.init.trunc_normal_(self.queries, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        places = grid_positions(features.shape[1], self.queries.shape[1], features.device).to(features.dtype)
        own = grid_positions(*self.queries.shape, features.device).to(features.dtype)
        values = self.input_norm(self.input(features))
        queries = self.query_norm(self.queries + own).to(values.dtype).expand(len(features), -1, -1)
        parts = self.query(queries), self.key(values + places), self.value(values)
        found = F.scaled_dot_product_attention(*(part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts))
        return self.output(self.output_norm(self.mix(found.transpose(1, 2).flatten(2))))


def grid_positions(count: int, width: int, device: torch.device) -> Tensor:
    """float32[count, width]: sines and cosines of row and column of each cell of a square grid, in fractions of it, so
    that grids of different sizes agree about places; zero for what no quarter of the width is left for."""
    side = math.isqrt(count)
    quarter = width // 4
    frequencies = math.pi * 2.0 ** torch.linspace(0, 6, quarter, device=device)
    centre = (torch.arange(side, device=device) + 0.5) / side
    row, column = torch.meshgrid(centre, centre, indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (row, column)]
    found = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return F.pad(found, (0, width - found.shape[1]))


class LlavaResamplerForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = LlavaResamplerConfig

    def __init__(self, config: LlavaResamplerConfig):
        super().__init__(config)
        self.model.multi_modal_projector = Resampler(config)
        self.post_init()


AutoConfig.register("llava_resampler", LlavaResamplerConfig, exist_ok=True)
AutoModelForImageTextToText.register(LlavaResamplerConfig, LlavaResamplerForConditionalGeneration, exist_ok=True)
