"""Bytes as people write them, both ways."""

from __future__ import annotations

import pytest

from vlmtune.sizes import bytes_text, parse_bytes
from vlmtune.types import VlmtuneError


def test_sizes():
    assert parse_bytes("24GB") == parse_bytes("24 gib") == 24 * 2**30
    assert parse_bytes("1.5g") == 3 * 2**29 and parse_bytes("500MB") == 500 * 2**20 and parse_bytes("2TB") == 2**41


@pytest.mark.parametrize(("text", "said"), [("", "is not a size"), ("24", "is not a size"), ("0GB", "is nothing")])
def test_what_is_no_size_is_named(text, said):
    with pytest.raises(VlmtuneError, match=f"--memory {text!r} {said}"):
        parse_bytes(text, "--memory")


def test_text_of_sizes():
    assert [bytes_text(n) for n in (0, 5000, 3.4 * 2**20, 2**31)] == ["0 KiB", "5 KiB", "3.4 MiB", "2.0 GiB"]
