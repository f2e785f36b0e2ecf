"""Safetensors files that several processes write together, each the rows it holds (`shards`), at their place in the
file: nobody gathers a tensor, and what lies on the disk does not say how many there were. Level 0."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vlmtune.shards import is_in_parts, own_rows, rows_of

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Of number formats, as safetensors writes them."""


def lay_out(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file with room for these tensors, in parts or whole. Raises OSError where it cannot be written."""
    header, places = _layout(tensors)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(_bytes(tensors[name]) for name in places))


def pieces_of(tensors: Mapping[str, Tensor], whole: bool) -> list[tuple[int, Tensor]]:
    """(place in the file, numbers) of what this process writes: its rows, sharing memory with the tensors. whole:
    tensors that are not in parts too; all processes have them, one writes them."""
    header, places = _layout(tensors)
    pieces = []
    for name, place in places.items():
        tensor = tensors[name]
        if is_in_parts(tensor):
            row = _bytes(tensor) // max(1, tensor.shape[0])
            pieces.append((len(header) + place + rows_of(tensor).start * row, own_rows(tensor)))
        elif whole:
            pieces.append((len(header) + place, own_rows(tensor)))
    return pieces


def fill_in(path: Path, pieces: Iterable[tuple[int, Tensor]]) -> None:
    """Write them into a file of `lay_out`. Raises OSError where the disk is full."""
    with path.open("r+b") as file:
        for place, tensor in pieces:
            file.seek(place)
            file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def read_tensors(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of a file; of those that are in parts in `like`, the rows of this process.

    Raises OSError or SafetensorError for a file that is missing or damaged, ValueError for another shape.
    """
    found = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  no iterator
            parts = like.get(name)
            if parts is None or not is_in_parts(parts):
                found[name] = file.get_tensor(name)
                continue
            stored = file.get_slice(name)
            if tuple(stored.get_shape()) != tuple(parts.shape):
                raise ValueError(f"{name} has shape {tuple(stored.get_shape())}, not {tuple(parts.shape)}")
            found[name] = stored[rows_of(parts)]
    return found


def _layout(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """(header, name -> first byte behind it). A function of names, formats and shapes: all processes find the same."""
    described: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):  # every number is aligned
        tensor = tensors[name]
        places[name] = end
        end += _bytes(tensor)
        described[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [places[name], end],
        }  # fmt: skip
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
