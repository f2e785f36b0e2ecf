"""Fingerprints of data files."""

from __future__ import annotations

import hashlib

import pytest

import vlmtune.data.fingerprint as module
from vlmtune.data.fingerprint import fingerprint
from vlmtune.types import VlmtuneError


def test_of_one_file_it_is_what_sha256sum_says(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"one\ntwo\n")
    found = fingerprint([tmp_path / "a.jsonl"])
    assert found.sha256 == hashlib.sha256(b"one\ntwo\n").hexdigest()
    assert (found.files, found.bytes, found.whole) == (1, 8, True)


def test_of_several_it_does_not_depend_on_their_order(tmp_path):
    paths = [tmp_path / name for name in ("b", "a")]
    for path in paths:
        path.write_text(path.name)
    found = fingerprint(paths)
    assert found == fingerprint(paths[::-1]) and found.files == 2
    paths[0].write_text("B")
    assert fingerprint(paths).sha256 != found.sha256


@pytest.mark.parametrize("at", [0, 5000, 9999])
def test_of_a_large_file_parts_are_read_its_ends_among_them(tmp_path, monkeypatch, at):
    monkeypatch.setattr(module, "WHOLE", 1000)
    monkeypatch.setattr(module, "BLOCK", 100)
    monkeypatch.setattr(module, "BLOCKS", 101)  # every 99 bytes of 10,000: blocks of 100 cover all of it
    path = tmp_path / "large"
    content = bytearray(10_000)
    path.write_bytes(content)
    before = fingerprint([path])
    assert not before.whole and before.bytes == 10_000
    content[at] = 1
    path.write_bytes(content)
    assert fingerprint([path]).sha256 != before.sha256
    path.write_bytes(bytes(10_001))
    assert fingerprint([path]).sha256 != before.sha256


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(VlmtuneError, match="gone.jsonl cannot be read"):
        fingerprint([tmp_path / "gone.jsonl"])
