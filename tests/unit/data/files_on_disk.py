"""Writers of every kind of data file, for the tests of readers."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

REPLY = {"role": "assistant", "content": "A red square."}


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def user(*content: Any) -> dict:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def text_row(number: int = 0) -> dict:
    return {"id": f"row-{number}", "messages": [user(f"Question {number}?"), REPLY]}


def picture_row(name: str = "a.png") -> dict:
    return {"messages": [user({"type": "image", "image": name}, {"type": "text", "text": "What?"}), REPLY]}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path: Path, rows: list[dict], **options: Any) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def write_hub_cache(cache: Path, repository: str, rows: list[dict], split: str = "train") -> None:
    """What `datasets` leaves in its cache after it has downloaded and prepared a data set of the hub."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    owner, name = repository.split("/")
    folder = cache / f"{owner}___{name}" / "default" / "0.0.0" / ("0123456789" * 4)
    folder.mkdir(parents=True)
    features = datasets.Dataset.from_list(rows).features
    writer = ArrowWriter(path=str(folder / f"{name}-{split}.arrow"), features=features)
    for row in rows:
        writer.write(row)
    writer.finalize()
    info = datasets.SplitInfo(split, num_examples=len(rows), dataset_name=name)
    datasets.DatasetInfo(
        features=features, builder_name="parquet", dataset_name=name, config_name="default", version="0.0.0",
        splits=datasets.SplitDict({split: info}),
    ).write_to_directory(str(folder))  # fmt: skip
