"""A tiny LLaVA with one block in the tower and one in the language model: a whole `vlmtune check` takes two seconds."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors.torch import load_file, save_file

from vlmtune.models.tiny import write_tiny


def write_short(folder: Path) -> Path:
    """A model folder (seed 0)."""
    write_tiny("llava", folder)
    config = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["num_hidden_layers"] = 1
        config[part].pop("layer_types", None)
    config["vision_feature_layer"] = -1
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tensors = load_file(folder / "model.safetensors")
    first = {name: tensor for name, tensor in tensors.items() if not re.search(r"layers\.[1-9]", name)}
    save_file(first, folder / "model.safetensors", {"format": "pt"})
    return folder
