"""What is put into a store is what comes out of it, in this process and in others; nothing half-written is seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vlmtune.data import feature_store
from vlmtune.data.feature_store import FeatureStore, image_key
from vlmtune.types import ImageRef, VlmtuneError


def features(seed: int, rows: int = 4) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "features": torch.randn(rows, 8, generator=draw),
        "image_grid_thw": torch.tensor([[1, rows, seed]]),
        "deepstack_0": torch.randn(rows, 8, generator=draw).bfloat16(),
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["put", "flush", "other"])), max_size=30))
def test_two_writers_of_one_folder(tmp_path_factory, moves):
    """Whatever is put by whom and when: each sees all that is written, and its own."""
    folder = tmp_path_factory.mktemp("store") / "of" / "one"
    stores = FeatureStore(folder, 2**30), FeatureStore(folder, 2**30)
    written: set[int] = set()
    waiting: tuple[set[int], set[int]] = (set(), set())
    for number, move in moves:
        who = int(move == "other")
        if move == "flush":
            for store, own in zip(stores, waiting, strict=True):
                store.flush()
                written |= own
                own.clear()
        elif number not in written:
            stores[who].put(str(number), features(number))
            waiting[who].add(number)
        for store, own in zip(stores, waiting, strict=True):
            for key in range(10):
                found = store.get(str(key))
                assert (found is not None) == (key in written | own) == (str(key) in store)
                assert found is None or same(found, features(key))
            assert len(store) == len(written | own)
    assert not list(folder.parent.rglob("*.tmp"))


def test_shards_grow_with_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "FIRST_SHARD", 2**10)
    monkeypatch.setattr(feature_store, "SHARDS", 4)
    store = FeatureStore(tmp_path, 2**30)
    for number in range(400):
        store.put(str(number), features(number, rows=16))
    store.flush()
    sizes = sorted(path.stat().st_size for path in tmp_path.iterdir())
    assert len(sizes) < 30 and sizes[-1] > 10 * sizes[0], "a new file for every few would be hundreds"
    again = FeatureStore(tmp_path, 2**30)
    assert len(again) == 400 and all(same(again.get(str(n)), features(n, rows=16)) for n in range(400))
    assert again.size == sum(sizes)


def test_a_limit_counts_what_waits(tmp_path):
    store = FeatureStore(tmp_path / "s", 600)
    for number in range(3):
        store.put(str(number), features(number))
    assert [str(n) in store for n in range(3)] == [True, True, False] and "is full" in store.problem
    store.flush()
    assert store.get("0") is not None and store.get("2") is None


def test_a_draft_and_a_damaged_file(tmp_path):
    save_file({"1/features": torch.ones(1)}, tmp_path / "half.tmp")
    assert len(FeatureStore(tmp_path, 2**30)) == 0, "a draft is nothing yet"
    (tmp_path / "x.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(VlmtuneError, match=r"x\.safetensors is damaged .*delete it"):
        FeatureStore(tmp_path, 2**30)


def test_an_image_is_its_bytes_and_its_settings(tmp_path):
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "b.png").write_bytes(b"one")
    keys = [image_key(ImageRef(tmp_path / name), None, "x") for name in ("a.png", "b.png")]
    assert keys[0] == keys[1] == image_key(ImageRef(b"one"), None, "x")
    assert image_key(ImageRef(b"one"), 4096, "x") != keys[0] != image_key(ImageRef(b"two"), None, "x")
    assert image_key(ImageRef(b"one", id="left"), None, "x") == keys[0], "its name in the conversation is no matter"
    with pytest.raises(VlmtuneError, match=r"t.jsonl:3: image .*none.png cannot be read \(No such file") as caught:
        image_key(ImageRef(Path(tmp_path / "none.png")), None, "t.jsonl:3")
    assert caught.value.code == "image_missing"
