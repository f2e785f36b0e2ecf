"""The models the equivalence classes run on: every tiny family, and the embedded architecture (untrained)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from training_setup import encode_all, encoder_of, write_data

from vlmtune.data.grounding import coordinates
from vlmtune.models.embedded import write_untrained

EMBEDDED = "embedded"


@pytest.fixture(scope="session")
def model_folder(tiny_folder, tmp_path_factory) -> Callable[[str], Path]:
    """`model_folder(name)`: a tiny family, or "embedded": EfficientNet tower (BatchNorm), random projector and text."""
    written: list[Path] = []

    def folder_of(name: str) -> Path:
        if name != EMBEDDED:
            return tiny_folder(name)
        if not written:
            corpus = ["what is there in the picture red blue green yellow circle square triangle how many"]
            written.append(write_untrained(tmp_path_factory.mktemp(EMBEDDED), corpus, coordinates("bins").tokens()))
        return written[0]

    return folder_of


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """8 conversations of unequal length, one without an image, some with two turns."""
    return write_data(tmp_path_factory.mktemp("data"), 8)


@pytest.fixture(scope="session")
def encoded(model_folder, data) -> Callable[[str], tuple]:
    """`encoded(name)`: (encoder, the 8 encoded samples) for a model."""
    kept: dict[str, tuple] = {}

    def of(name: str) -> tuple:
        if name not in kept:
            encoder = encoder_of(model_folder(name))
            kept[name] = encoder, encode_all(encoder, data)
        return kept[name]

    return of
