"""How well the frozen tower's tokens name an object, by image size: a linear probe (the figures of decision 0001).

    python benchmarks/embedded/probe.py

Training scenes give the probe its examples, held-out scenes its score: one object, the mean of the tokens its box
touches, one of 96 names. One seed, about 22 views of each concept; the interval is the binomial one (95%).
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from vlmtune.data.scenes import SceneRecipe, concept_names
from vlmtune.models.efficientnet import STRIDE, EfficientNetLiteConfig, EfficientNetLiteModel, imagenet_state_dict

SCENES = {"train": 900, "val": 300}
NAMES = concept_names("all")


def examples(tower: EfficientNetLiteModel, size: int, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(features float32[N, hidden_size], names int64[N]) of every object in the scenes of a split."""
    recipe = SceneRecipe("all")
    features, names = [], []
    for index in range(SCENES[split]):
        sample = recipe.sample("caption", index, split)
        picture = Image.open(io.BytesIO(sample.images[0].source))
        scale = size / picture.width / STRIDE  # pixels of the scene -> cells
        pixels = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = tower((torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] - 127) / 128).last_hidden_state
        grid = tokens[0].float().reshape(size // STRIDE, size // STRIDE, -1)
        for thing in sample.meta["objects"]:
            x1, y1, x2, y2 = (edge * scale for edge in thing["box"])
            cells = grid[int(y1) : max(int(y1) + 1, math.ceil(y2)), int(x1) : max(int(x1) + 1, math.ceil(x2))]
            features.append(cells.mean((0, 1)))
            names.append(NAMES.index(thing["name"]))
    return torch.stack(features), torch.tensor(names)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tower = EfficientNetLiteModel(EfficientNetLiteConfig()).eval()
    tower.load_state_dict(imagenet_state_dict())
    for size in (128, 192):
        (x, y), (x_val, y_val) = (examples(tower, size, split) for split in ("train", "val"))
        mean, spread = x.mean(0), x.std(0) + 1e-3
        probe = torch.nn.Linear(x.shape[1], len(NAMES))
        optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3, weight_decay=0.1)
        for _ in range(250):
            loss = F.cross_entropy(probe((x - mean) / spread), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right = (probe((x_val - mean) / spread).argmax(1) == y_val).float().mean().item()
        interval = 1.96 * math.sqrt(right * (1 - right) / len(y_val))
        tokens = (size // STRIDE) ** 2
        print(f"{size} px, {tokens} tokens: {right:.3f} +- {interval:.3f} of {len(y_val)} ({len(y)} to learn from)")


if __name__ == "__main__":
    main()
