"""What all tests share: one thread, no network, and a tiny model folder of every family."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: a test never reaches for the network

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `family` runs once for every tiny family, unless it lists the families it wants itself."""
    if "family" not in metafunc.fixturenames:
        return
    own = {name for mark in metafunc.definition.iter_markers("parametrize") for name in _names(mark.args[0])}
    if "family" not in own:
        from vlmtune.models.tiny import FAMILIES

        metafunc.parametrize("family", FAMILIES)


def _names(argument: str | list[str] | tuple[str, ...]) -> list[str]:
    return [name.strip() for name in argument.split(",")] if isinstance(argument, str) else list(argument)


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Indexes and assembled models go to a folder of this session, not to the user's cache."""
    os.environ["VLMTUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_folder(family)`: a complete model folder (`write_tiny`, seed 0), written once per session: never change it.

    Under pytest-xdist every worker has its own base directory, hence its own folders.
    """
    folders: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in folders:
            from vlmtune.models.tiny import write_tiny

            folders[family] = write_tiny(family, tmp_path_factory.mktemp(family, numbered=True))
        return folders[family]

    return folder_of


@pytest.fixture(scope="session")
def embedded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model before any training (its tokenizer learns from a few lines), written once per session."""
    from vlmtune.data.grounding import coordinates
    from vlmtune.models.embedded import write_untrained

    corpus = ["What is in the picture? A red square and two small circles.", "Find the dog. Where is it?"] * 20
    return write_untrained(tmp_path_factory.mktemp("embedded"), corpus, coordinates("bins").tokens())
