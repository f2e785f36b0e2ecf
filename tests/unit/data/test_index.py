"""The index of a file: memory-mapped, built once, never of other contents, bounded while it is built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from files_on_disk import text_row, write_jsonl

from vlmtune.data.files import JsonLines, open_reader
from vlmtune.errors import VlmtuneError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "a.jsonl", [text_row(n) for n in range(200)])


def test_the_index_is_a_memory_map(data, tmp_path):
    for cache in (None, tmp_path / "cache"):
        reader = JsonLines(data, cache)
        assert isinstance(reader._lines.base, np.memmap) or isinstance(reader._lines, np.memmap)
        assert not reader._lines.flags.writeable
        assert [reader.row(i).value["id"] for i in (199, 0, 7)] == ["row-199", "row-0", "row-7"]


def test_it_is_built_once_and_again_for_other_contents(data, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    built = []
    build = JsonLines._index
    monkeypatch.setattr(JsonLines, "_index", lambda self, writer: (built.append(1), build(self, writer))[1])
    JsonLines(data, cache)
    JsonLines(data, cache)
    assert len(built) == 1
    write_jsonl(data, [text_row(n) for n in range(300)])
    assert JsonLines(data, cache).size == 300 and len(built) == 2
    assert len(list(cache.iterdir())) == 1  # the index of the earlier contents is gone, and no draft is left
    os.utime(data, ns=(1, 1))  # the same size, written at another time
    JsonLines(data, cache)
    assert len(built) == 3


@pytest.mark.parametrize("damage", ["shorter column", "no column", "torn description"])
def test_a_damaged_index_is_built_again(data, tmp_path, damage):
    cache = tmp_path / "cache"
    JsonLines(data, cache)
    folder = next(cache.iterdir())
    if damage == "shorter column":
        (folder / "lines.bin").write_bytes((folder / "lines.bin").read_bytes()[:-8])
    elif damage == "no column":
        (folder / "lines.bin").unlink()
    else:
        (folder / "index.json").write_text('{"byt')
    reader = JsonLines(data, cache)
    assert reader.size == 200 and reader.row(199).value["id"] == "row-199"


def test_two_processes_may_build_the_same_index(data, tmp_path, monkeypatch):
    """The other one finishes while we are writing: its bytes are equal, and stay."""
    cache = tmp_path / "cache"
    build = JsonLines._index

    def slow(self, writer):
        monkeypatch.setattr(JsonLines, "_index", build)
        JsonLines(data, cache)  # the other process, start to end
        build(self, writer)

    monkeypatch.setattr(JsonLines, "_index", slow)
    assert JsonLines(data, cache).size == 200
    assert len(list(cache.iterdir())) == 1


def test_a_build_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "t.csv").write_text("question,answer\na,b,c\n")
    with pytest.raises(VlmtuneError, match="3 cells under a header of 2"):
        open_reader(tmp_path / "t.csv", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_that_changes_is_noticed(data, tmp_path, monkeypatch):
    reader = JsonLines(data)
    with data.open("a") as file:
        file.write("{}\n")
    with pytest.raises(VlmtuneError, match=f"{data} changed while it was in use; start again"):
        reader.row(0)
    data.unlink()
    with pytest.raises(VlmtuneError, match=f"{data} cannot be read any more"):
        reader.row(0)
    write_jsonl(data, [text_row()])
    build = JsonLines._index

    def grows(self, writer):
        build(self, writer)
        write_jsonl(data, [text_row(), text_row()])

    monkeypatch.setattr(JsonLines, "_index", grows)
    with pytest.raises(VlmtuneError, match="changed while it was indexed"):
        JsonLines(data, tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VlmtuneError, match=r"file/cache cannot be written .*set VLMTUNE_CACHE"):
        JsonLines(data, tmp_path / "file" / "cache")


def test_rows_are_not_held_while_indexing(tmp_path):
    """60 MB of rows in a process whose peak grows by a tenth of that (plus what NumPy and our modules take)."""
    path = tmp_path / "big.jsonl"
    row = b'{"messages": "' + b"x" * 6000 + b'"}\n'
    with path.open("wb") as file:
        for _ in range(10_000):
            file.write(row)
    script = (
        "import re, sys; from pathlib import Path; from vlmtune.data.files import JsonLines\n"
        # not ru_maxrss: that of a child begins with what its parent had
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak(); reader = JsonLines(Path(sys.argv[1])); print(reader.size, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    size, grown = map(int, done.stdout.split())
    assert size == 10_000 and grown < 6_000  # KB
