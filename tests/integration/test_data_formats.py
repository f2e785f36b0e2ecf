"""Files of several kinds in one mixture, through the command line and worker processes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from training_setup import png

from vlmtune.build import build_source, source_names
from vlmtune.config import load_config
from vlmtune.data.mixture import Mixture
from vlmtune.observe.log import read_history
from vlmtune.run import train
from vlmtune.schedule import piecewise
from vlmtune.view import inspect_sample


@pytest.fixture
def sources(tmp_path: Path) -> list[dict]:
    """Two CSV files of one name, a tar and a parquet file; images beside the file, in it, and none."""
    import pyarrow as pa
    from pyarrow import parquet

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(0))
        (tmp_path / name / "t.csv").write_text(
            "image,question,answer\n0.png,what is there,a red circle\n,how many,two\n"
        )
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for number in range(3):
            for member, data in ((f"{number}.png", png(number)), (f"{number}.txt", b"a red circle")):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    rows = [
        {"question": "what is there", "answer": "a blue square", "image": {"bytes": png(n), "path": None}}
        for n in (1, 2)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    paths = ("one/t.csv", "two/t.csv", "s.tar", "p.parquet")
    return [{"path": str(tmp_path / path), "weight": weight} for path, weight in zip(paths, (1, 2, 3, 2), strict=True)]


def test_every_kind_of_file_trains_and_is_counted(sources, write_config, tmp_path):
    out = io.StringIO()
    config = load_config(str(write_config("run", 6, data={"train": sources, "workers": 2})))
    summary = train(config, Console(file=out, width=200))
    seen = [line.removeprefix("data: train ") for line in out.getvalue().splitlines() if line.startswith("data: ")]
    assert seen == [
        "t.csv: questions and answers, CSV, 2 rows",
        "t.csv (2): questions and answers, CSV, 2 rows",
        "s.tar: captions, WebDataset tar, 3 rows",
        "p.parquet: questions and answers, parquet, 2 rows",
    ]
    mixture = Mixture([2, 2, 3, 2], [piecewise(s["weight"]) for s in sources], 24, config.train.seed)
    names = source_names([build_source(source, config.data) for source in config.data.train])
    drawn = [mixture[k][0] for k in range(24)]
    for record in read_history(tmp_path / "run" / "history.jsonl"):
        assert record["sources"] == {n: drawn[: record["samples"]].count(i) for i, n in enumerate(names)}
    assert summary["sources"] == {name: drawn.count(i) for i, name in enumerate(names)}
    assert sum(summary["sources"].values()) == summary["samples"] == 24
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["sources"] == summary["sources"]


def test_inspect_says_what_it_read(sources, write_config, tmp_path):
    out = io.StringIO()
    config = load_config(str(write_config("run", 2, data={"train": sources[2:], "workers": 0})))
    page = inspect_sample(config, "s/1", tmp_path / "page.html", Console(file=out, width=200))
    assert "data: train s.tar: captions, WebDataset tar, 3 rows" in out.getvalue()
    assert "s/1" in page.read_text()


def test_indexes_lie_in_the_cache_folder(sources, write_config, tmp_path, monkeypatch):
    monkeypatch.setenv("VLMTUNE_CACHE", str(tmp_path / "cache"))
    config = load_config(str(write_config("run", 2, data={"train": sources, "workers": 0})))
    for source in config.data.train:
        build_source(source, config.data)
    assert len(list((tmp_path / "cache" / "indexes").iterdir())) == 3  # parquet brings its own


def test_the_split_of_a_source_reaches_its_reader(tmp_path, write_config):
    for split, reply in (("train", "a red circle"), ("test", "a blue square")):
        (tmp_path / f"{split}-0.csv").write_text(f"question,answer\nwhat,{reply}\n")
    tree = yaml.safe_load(write_config("run", 2).read_text())
    for split, reply in (("train", "a red circle"), ("test", "a blue square")):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        (tmp_path / f"{split}-0.csv").rename(folder / f"{split}-0.csv")
        tree["data"]["train"] = [{"path": str(folder), "split": split}]
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
        data = load_config(str(tmp_path / "c.yaml")).data
        source = build_source(data.train[0], data)
        assert source[0].turns[1].parts[0].text == reply
