"""Arrow tables: parquet files, folders that `datasets` saved, data sets of the Hugging Face hub.

The one door to pyarrow and datasets, which are an extra. A row becomes plain Python values without decoding images
(struct {bytes, path} or plain bytes), and no schema is inferred or asked for.
"""

from __future__ import annotations

import importlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from vlmtune.data.index import identity_of
from vlmtune.data.rows import CONTENT, FIELDS, REFUSED, Row
from vlmtune.data.strict_json import loads
from vlmtune.types import VlmtuneError

CACHED_BYTES = 1 << 28  # of decoded row groups kept by each process; the newest one always stays
LARGE_GROUP = 1 << 25  # bytes from which on reading one row reads too much of its neighbours
HUB_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:@([\w.-]+))?")


class Parquet:
    """Row groups are read whole and the last ones are kept: rows of a shuffled epoch cost a group each."""

    def __init__(self, path: Path):
        self.path, self.name, self.folder, self.identity = path, path.name, path.parent, identity_of(path)
        parquet = _library("pyarrow.parquet", str(path))
        try:
            described = parquet.read_metadata(path)
            schema = parquet.read_schema(path)
        except Exception as error:  # Arrow raises its own errors, OSError and more, whatever the damage leads to
            raise VlmtuneError(f"{path}: not a parquet file, or truncated ({_brief(error)}); copy it again.") from error
        self._columns = _known_columns(schema.names, str(path))
        self._json = _json_columns(schema.field(name) for name in self._columns)
        groups = [described.row_group(n) for n in range(described.num_row_groups)]
        self._ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        self.size = described.num_rows
        largest = max((group.total_byte_size for group in groups), default=0)
        self.container = "parquet" + (
            f" with row groups of up to {largest / 1e6:,.0f} MB (write smaller ones: each row reads its group)"
            if largest >= LARGE_GROUP
            else ""
        )
        self._open: tuple[int, Any] | None = None
        self._groups: OrderedDict[int, Any] = OrderedDict()

    def row(self, index: int) -> Row:
        number = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[number - 1]) if number else 0
        origin = f"{self.path}:{index + 1}"
        try:
            value = self._group(number).slice(index - before, 1).to_pylist()[0]
        except Exception as error:
            raise VlmtuneError(
                f"{origin}: row group {number} cannot be read ({_brief(error)}); the file is damaged, copy it again."
            ) from error
        return Row(_decode_json(value, self._json, origin), origin, f"{self.path.stem}/{index}")

    def _group(self, number: int) -> Any:
        """A decoded row group, from the cache if it is there."""
        if number in self._groups:
            self._groups.move_to_end(number)
            return self._groups[number]
        if self._open is None or self._open[0] != os.getpid():  # a handle must not be shared with a forked worker
            parquet = _library("pyarrow.parquet", str(self.path))
            self._open = (os.getpid(), parquet.ParquetFile(self.path, pre_buffer=False))
        # no threads of Arrow: workers are forked, and they are as many as the user asked for
        group = self._open[1].read_row_group(number, columns=self._columns, use_threads=False)
        self._groups[number] = group
        while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > CACHED_BYTES:
            self._groups.popitem(last=False)
        return group


class ArrowTable:
    """A `datasets.Dataset`, memory-mapped by Arrow."""

    def __init__(self, data: Any, name: str, place: str, container: str, folder: Path | None):
        self.name, self.container, self.folder, self._place = name, container, folder, place
        self.identity = f"{place} {data._fingerprint}"
        columns = _known_columns(data.column_names, place)
        self._data = data.select_columns(columns).with_format("arrow")
        self._json = _json_columns(data.features.arrow_schema.field(name) for name in columns)
        self.size = len(self._data)
        if not self.size:
            raise VlmtuneError(f"data set {place} holds no rows.")

    def row(self, index: int) -> Row:
        origin = f"{self._place}:{index + 1}"
        try:
            value = self._data[index].to_pylist()[0]
        except Exception as error:
            raise VlmtuneError(
                f"{origin}: cannot be read ({_brief(error)}); write or download the data again."
            ) from error
        return Row(_decode_json(value, self._json, origin), origin, f"{self.name}/{index}")


def open_saved(folder: Path, split: str) -> ArrowTable:
    """A folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    datasets = _library("datasets", str(folder))
    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise VlmtuneError(
            f"data folder {folder}: not from save_to_disk of datasets, or damaged ({_brief(error)}); save it again."
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise VlmtuneError(f"data folder {folder} has no split {split!r}; it has {', '.join(map(str, data))}.")
        return ArrowTable(data[split], f"{folder.name}/{split}", f"{folder}/{split}", "saved data set", folder)
    if split != "train":
        raise VlmtuneError(f"data folder {folder} has no split {split!r}; it is one data set without splits.")
    return ArrowTable(data, folder.name, str(folder), "saved data set", folder)


def open_hub(name: str, split: str) -> ArrowTable:
    """`hub:owner/name`, `hub:owner/name/config`, and either with `@revision`; offline from the cache of datasets."""
    found = HUB_NAME.fullmatch(name)
    if found is None:
        raise VlmtuneError(f"data set {name}: write hub:owner/name, hub:owner/name/config or hub:owner/name@revision.")
    datasets = _library("datasets", name)
    repository, config, revision = found.groups()
    try:
        data = datasets.load_dataset(repository, config, split=split, revision=revision)
    except Exception as error:
        raise VlmtuneError(
            f"data set {name}, split {split!r}: cannot be loaded ({_brief(error)}); check name, config, split "
            "and network, or download it and name the folder."
        ) from error
    return ArrowTable(data, f"{repository}/{split}", f"{name}/{split}", "hub data set", None)


def _known_columns(names: list[str], place: str) -> list[str]:
    """The columns that rows are read from; others, maybe large, stay on disk."""
    known = [name for name in names if name in FIELDS or name in REFUSED]
    if not set(known) & set(CONTENT):
        raise VlmtuneError(
            f"{place}: no column that holds a conversation ({', '.join(CONTENT)}) among {', '.join(names)[:200]}; "
            "rename one."
        )
    return known


def _json_columns(fields: Iterable[Any]) -> dict[str, Any]:
    """Column -> Arrow type, of columns that hold JSON texts somewhere: how datasets stores what has no one type."""
    return {field.name: field.type for field in fields if "arrow.json" in str(field.type)}


def _decode_json(row: dict, columns: Mapping[str, Any], origin: str) -> dict:
    return row | {name: _decoded(row[name], kind, f"{origin}: {name!r}") for name, kind in columns.items()}


def _decoded(value: Any, kind: Any, place: str) -> Any:
    """A value with the JSON texts in it read, by its Arrow type: only the type tells "a text" from a text in JSON."""
    if value is None:
        return None
    if getattr(kind, "extension_name", "") == "arrow.json":
        return loads(value, place)
    if isinstance(value, list):
        return [_decoded(item, kind.value_type, place) for item in value]
    if isinstance(value, dict):
        return {name: _decoded(item, kind.field(name).type, place) for name, item in value.items()}
    return value


def _library(name: str, place: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise VlmtuneError(f'{place}: reading this needs {package}; run: pip install "vlmtune[data]".') from error


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
