"""Folders that datasets' save_to_disk writes, and Parquet files, give the records in them, or one clear line."""

import json
import os
import sys

import numpy as np
import pytest

from backbone.tokenizer import load_tokenizer
from runtime.entry import run_entry
from trainer.data.conversations import load_conversations
from trainer.data.inspect import main
from trainer.data.parquet import read_rows
from trainer.data.tokens import load_data

pyarrow = pytest.importorskip("pyarrow", exc_type=ImportError)
parquet = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
CHATS = [{"conversations": TURNS, "id": str(number), "source": "x"} for number in range(5)]
TEXTS = [{"text": text} for text in ("One.", "", "Two, 語.", None, "Three.")]


def write_stream(path, records, batch=2):
    table = pyarrow.Table.from_pylist(records)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)


def write_dataset(folder, *shards):
    """What Dataset.save_to_disk writes: an Arrow stream for each shard, and their names in order."""
    folder.mkdir(parents=True)
    names = [f"data-{index:05}-of-{len(shards):05}.arrow" for index in range(len(shards))]
    for name, records in zip(names, shards, strict=True):
        write_stream(folder / name, records)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def write_splits(folder, **splits):
    """What DatasetDict.save_to_disk writes: a folder for each split, and their names."""
    folder.mkdir()
    for name, records in splits.items():
        write_dataset(folder / name, records)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder


def values(path, column="conversations"):
    return [record[column] for _, record in read_rows(path)]


# Reading


def test_shards_come_in_order_with_their_rows_counted(tmp_path):
    folder = write_dataset(
        tmp_path / "set", *([{**chat, "text": "a text"} for chat in part] for part in (CHATS[:3], CHATS[3:]))
    )
    found = list(read_rows(folder))
    assert [row for row, _ in found] == [0, 1, 2, 3, 4]
    assert [record["id"] for _, record in found] == ["0", "1", "2", "3", "4"]
    assert found[0][1] == {"conversations": TURNS, "text": "a text", "id": "0"}  # the column source is not read
    talks, report = load_conversations(folder)
    assert report.as_dict()["unread_fields"] == {"source": 5, "text": 5}
    assert [talk.id for talk in talks] == ["0", "1", "2", "3", "4"] and (report.read, report.kept) == (5, 5)
    assert values(folder / "data-00001-of-00002.arrow") == [TURNS] * 2


def test_the_state_decides_which_files_are_read(tmp_path):
    folder = write_dataset(tmp_path / "set", CHATS[:3], CHATS[3:])
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_data_files": state["_data_files"][::-1]}))
    write_stream(folder / "data-00000-of-00001.arrow", CHATS)  # left over from an earlier save
    assert [record["id"] for _, record in read_rows(folder)] == ["3", "4", "0", "1", "2"]


def test_train_is_the_split_that_is_taken_unless_another_is_named(tmp_path):
    both = write_splits(tmp_path / "both", test=CHATS[:1], train=CHATS[:2])
    lone = write_splits(tmp_path / "lone", validation=CHATS[:3])
    lengths = {path: len(values(path)) for path in (both, f"{both}:test", f"{both}:train", lone, f"{lone}:validation")}
    assert list(lengths.values()) == [2, 1, 2, 3, 3]
    odd = write_dataset(tmp_path / "a:b", CHATS[:4])  # a path that exists is taken as it is
    assert len(values(odd)) == 4 and len(values(write_splits(tmp_path / "c:d", test=CHATS[:1]))) == 1


def test_turns_stored_as_columns_are_turns(tmp_path):
    stored = {"from": ["human", "gpt"], "value": ["Hi", "Hello"]}
    parquet.write_table(pyarrow.Table.from_pylist([{"conversations": stored}]), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == [TURNS]
    uneven = {"from": ["human", "gpt"], "value": ["Hi"]}
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": uneven}]), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"an object instead of a list of turns \(1, first in b\.parquet row 0\)"):
        load_conversations(tmp_path / "b.parquet")


@pytest.mark.parametrize("name", ["set", "texts.parquet"])
def test_tables_become_the_tokens_that_json_lines_become(tmp_path, name):
    tokenizer, options = load_tokenizer(), {"max_length": 64, "block_size": 8}
    for number, records in enumerate((CHATS, TEXTS)):
        path = tmp_path / f"{number}-{name}"
        if name == "set":
            write_dataset(path, records)
        else:
            parquet.write_table(pyarrow.Table.from_pylist(records), path)
        lines = tmp_path / f"{number}.jsonl"
        lines.write_text("\n".join(map(json.dumps, records)))
        (found, report), (expected, other) = (load_data([p], tokenizer, **options) for p in (path, lines))
        assert np.array_equal(found.token_ids, expected.token_ids) and np.array_equal(found.mask, expected.mask)
        assert found.offsets.tolist() == expected.offsets.tolist()
        assert report.left_out.reasons == other.left_out.reasons
        changes = {"files": [], "left_out": {}}
        assert {**report.as_dict(), **changes} == {**other.as_dict(), **changes}
        assert report.as_dict()["files"] == [path.name]


# Mistakes


def broken_stream(path):
    write_stream(path / "data.arrow", CHATS)
    content = (path / "data.arrow").read_bytes()
    (path / "data.arrow").write_bytes(content[: len(content) // 2])
    return path / "data.arrow"


def broken_parquet(path):
    parquet.write_table(pyarrow.Table.from_pylist(CHATS), path / "a.parquet")
    (path / "a.parquet").write_bytes((path / "a.parquet").read_bytes()[:-20])
    return path / "a.parquet"


def not_utf8(path):
    text = pyarrow.array([b"good", b"bad \xff"]).cast(pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, text.buffers())
    parquet.write_table(pyarrow.table({"text": text}), path / "a.parquet")
    return path / "a.parquet"


def no_rows(path):
    schema = pyarrow.schema([("text", pyarrow.string())])
    parquet.write_table(schema.empty_table(), path / "a.parquet")
    return path / "a.parquet"


def incomplete(path):
    folder = write_dataset(path / "set", CHATS[:3], CHATS[3:])
    (folder / "data-00001-of-00002.arrow").unlink()
    return folder


def state(content):
    def make(path):
        folder = write_dataset(path / "set", CHATS)
        (folder / "state.json").write_text(content)
        return folder

    return make


def splits(split, **folders):
    return lambda path: f"{write_splits(path / 'set', **folders)}{split}"


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (broken_stream, r"data\.arrow cannot be read: "),
        (broken_parquet, r"a\.parquet cannot be read: "),
        (not_utf8, r"a\.parquet is not UTF-8 text after row 0: "),
        (no_rows, r"a\.parquet is empty; expected records"),
        (lambda path: path / "none.parquet", r"none\.parquet cannot be read: "),
        (lambda path: path, "is a folder without state.json or dataset_dict.json; expected one that Dataset.save_to"),
        (incomplete, "set is incomplete: state.json names data-00001-of-00002.arrow; copy all"),
        (state('{"data_files": []}'), r"state\.json has no list '_data_files'"),
        (state("{"), r"state\.json line 1: not valid JSON"),
        (splits(":dev", train=CHATS), "set has no split 'dev'; expected .*set:SPLIT with one of train"),
        (
            splits("", test=CHATS, dev=CHATS),
            "set has 2 splits and none is train; expected .*set:SPLIT with one of test, dev",
        ),
        (
            lambda path: f"{write_dataset(path / 'set', CHATS)}:train",
            "set has no splits .* got 'train'; pass .*set alone",
        ),
        (
            lambda path: write_dataset(path / "set", [{"words": "a", "n": 1}]),
            "has the columns words, n; expected one of",
        ),
        (
            lambda path: write_dataset(path / "set", [{"text": 3}]),
            r"a number instead of a text \(1, .*set row 0",
        ),
        (lambda path: write_dataset(path / "set", [{"messages": None}]), "neither conversations nor messages among"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_in_one_line_by_name(tmp_path, capsys, make, complaint):
    path = make(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        load_data([path], load_tokenizer(), max_length=64, block_size=8)
    assert run_entry(main, ["--inspect", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    folder = write_dataset(tmp_path / "set", CHATS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"set is read with pyarrow, which is not .*: pip install pyarrow==25\.0\.1$"):
        load_data([folder], load_tokenizer(), max_length=64, block_size=8)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_pipe_is_refused_without_waiting(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a pipe, expected a regular file"):
        list(read_rows(tmp_path / name))
