"""Rows of Hugging Face ``datasets`` folders and of Parquet files, read with pyarrow alone.

``Dataset.save_to_disk`` writes a folder with ``state.json``, which names the ``data-*.arrow`` files in order, each an
Arrow stream. ``DatasetDict.save_to_disk`` writes ``dataset_dict.json`` and such a folder for every split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from runtime.files.documents import read_json
from runtime.files.regular import open_regular

# pyarrow 26 needs NumPy 2, Jittor 1.3.11 NumPy 1; 25.0.1 is the newest that works with both.
INSTALL = "pip install pyarrow==25.0.1"
COLUMNS = ("conversations", "messages", "text")  # a table has one of these
FURTHER = ("system", "system_prompt", "tools", "id", "category")
ROWS = 1024  # of a Parquet file, turned into Python objects at a time
STATE, SPLITS = "state.json", "dataset_dict.json"


def is_table(path: str | Path) -> bool:
    """Whether a path names a folder, a split of one (``FOLDER:split``), a Parquet file or an Arrow stream."""
    return Path(path).suffix in (".parquet", ".arrow") or _folder_and_split(path)[0].is_dir()


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, record) of a table, rows counted from 0. A record has the columns of ``COLUMNS`` and ``FURTHER``.

    Turns that are stored as columns, {"from": [..], "value": [..]}, are returned as a list. One batch is in memory at a
    time. Raises ValueError naming the file that is broken, missing, or has none of the columns; the available splits,
    where the wanted one does not exist; and what to install, where pyarrow is missing.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"{path} is read with pyarrow, which is not usable here ({error}): {INSTALL}") from error
    row = 0
    for file in table_files(path):
        try:
            open_regular(file).close()  # pyarrow would wait for a pipe
            for records in _parquet(file) if file.suffix == ".parquet" else _stream(file):
                yield from enumerate(map(_turn_columns, records), start=row)
                row += len(records)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text after row {row}: {error.reason}") from error
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def unread_columns(path: str | Path) -> list[str]:
    """The columns of a readable table that ``read_rows`` leaves out."""
    import pyarrow
    from pyarrow import parquet

    file = table_files(path)[0]
    if file.suffix == ".parquet":
        names = parquet.read_schema(file).names
    else:
        with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
            names = stream.schema.names
    return [name for name in names if name not in (*COLUMNS, *FURTHER)]


def _folder_and_split(path: str | Path) -> tuple[Path, str | None]:
    """The parts of ``FOLDER:split``; a path that exists has no split."""
    folder, colon, split = str(path).rpartition(":")
    return (Path(folder), split) if colon and folder and not Path(path).exists() else (Path(path), None)


def table_files(path: str | Path) -> list[Path]:
    """The files that hold a table, in order."""
    folder, split = _folder_and_split(path)
    if not folder.is_dir():
        return [folder]
    if (folder / SPLITS).exists():
        splits = _list(folder / SPLITS, "splits", str)
        if split is None:
            split = "train" if "train" in splits else splits[0] if len(splits) == 1 else None
        if split not in splits:
            found = f"no split {split!r}" if split else f"{len(splits)} splits and none is train"
            raise ValueError(
                f"{folder} has {found}; expected {folder}:SPLIT with one of {', '.join(splits) or '(none)'}"
            )
        folder = folder / split
    elif split is not None:
        raise ValueError(f"{folder} has no splits (no {SPLITS}), got {split!r}; pass {folder} alone")
    if not (folder / STATE).exists():
        raise ValueError(
            f"{folder} is a folder without {STATE} or {SPLITS}; expected one that Dataset.save_to_disk wrote, or name "
            "the files in it"
        )
    names = [entry.get("filename") for entry in _list(folder / STATE, "_data_files", dict)]
    missing = [str(name) for name in names if not isinstance(name, str) or not (folder / name).is_file()]
    if missing or not names:
        raise ValueError(f"{folder} is incomplete: {STATE} names {', '.join(missing) or 'no file'}; copy all of it")
    return [folder / name for name in names]


def _list(path: Path, key: str, kind: type) -> list:
    """A list of a JSON file. Raises ValueError naming the file where it is missing."""
    content = read_json(path)
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(item, kind) for item in found):
        raise ValueError(f"{path} has no list {key!r}; expected what datasets' save_to_disk writes")
    return found


def _parquet(file: Path) -> Iterator[list[dict[str, Any]]]:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        columns = _columns(file, table.schema_arrow.names)
        yield from (batch.to_pylist() for batch in table.iter_batches(ROWS, columns=columns))


def _stream(file: Path) -> Iterator[list[dict[str, Any]]]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
        columns = _columns(file, stream.schema.names)
        yield from (batch.select(columns).to_pylist() for batch in stream)


def _columns(file: Path, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not set(COLUMNS) & set(names):
        raise ValueError(f"{file} has the columns {', '.join(names) or 'none'}; expected one of {', '.join(COLUMNS)}")
    return [name for name in (*COLUMNS, *FURTHER) if name in names]


def _turn_columns(record: dict[str, Any]) -> dict[str, Any]:
    """The record with turns stored as columns, {"from": [a, b], "value": [c, d]}, as a list of objects, {"from": a,
    "value": c} and {"from": b, "value": d}."""
    found = dict(record)
    for name, value in record.items():
        columns = value.values() if isinstance(value, dict) else [None]
        if all(isinstance(column, list) for column in columns) and len(set(map(len, columns))) == 1:
            found[name] = [dict(zip(value, values, strict=True)) for values in zip(*columns, strict=True)]
    return found
