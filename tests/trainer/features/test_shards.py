"""Checksummed shards: read as written, described, verified, and written on a thread of their own."""

import hashlib
import json
import os
import subprocess
import threading

import numpy as np
import pytest

import trainer.features.shards
from runtime.atomic import HOST
from trainer.features.shards import ShardStore, ShardWriter, cut, to_float16

SHARD = 200  # tokens: four shards of the sequences below
DIM = 32
RANDOM = np.random.default_rng(0)
OFFSETS = np.append(0, np.cumsum(RANDOM.integers(12, 20, 40)))
ARRAYS = {name: RANDOM.standard_normal((OFFSETS[-1], DIM)).astype(np.float32) for name in ("a", "b")}
FILES = {f"{name}-{index:05d}.f16{end}" for name in ARRAYS for index in range(4) for end in ("", ".sha256")}
IDENTITY = {"tokens": int(OFFSETS[-1]), "tokenizer": "t"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(trainer.features.shards, "SHARD_TOKENS", SHARD)


@pytest.fixture
def at(tmp_path):
    """at() -> the store of the test's folder."""
    return lambda: ShardStore(tmp_path, IDENTITY, OFFSETS, DIM)


def write(store):
    """Write the missing shards of the store, each in two pieces."""
    store.prepare()
    with ShardWriter(store) as writer:
        for index in range(store.num_shards):
            missing = [name for name in ARRAYS if not store.is_complete((name, index))]
            shard = store.sequences(index)
            middle = (shard.start + shard.stop) // 2
            for first, last in ((shard.start, middle), (middle, shard.stop)) if missing else ():
                rows = slice(OFFSETS[first], OFFSETS[last])
                writer.put(index, {name: ARRAYS[name][rows] for name in missing}, first)
    return store


def read(store, name, sequences):
    out = np.full((sum(OFFSETS[i + 1] - OFFSETS[i] for i in sequences), store.dim), np.nan, np.float32)
    store.read(name, sequences, out)
    return out


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# Reading


def test_sequences_are_read_in_any_order_across_shards(at):
    store = write(at())
    for name, array in ARRAYS.items():
        for sequences in ([0], [39, 0, 39], range(40), [13, 12, 11]):
            want = np.concatenate([array[OFFSETS[i] : OFFSETS[i + 1]] for i in sequences])
            np.testing.assert_array_equal(read(store, name, sequences), want.astype(np.float16).astype(np.float32))


def test_every_float16_is_read_as_the_number_it_is(tmp_path):
    numbers = np.arange(65536, dtype=np.uint16).reshape(-1, DIM).view(np.float16).astype(np.float32)
    finite = np.where(np.isfinite(numbers), numbers, 0)
    store = ShardStore(tmp_path, {}, np.array([0, 1000, 2048]), DIM)
    store.prepare()
    with ShardWriter(store) as writer:
        for index in range(2):
            writer.put(index, {"a": finite[slice(*store.offsets[index : index + 2])]}, index)
    out = np.full((2048, DIM), np.nan, np.float32)
    store.read("a", [0, 1], out)
    np.testing.assert_array_equal(out.view(np.uint32), finite.view(np.uint32))  # the sign of zero too


def test_numbers_that_round_to_a_finite_float16_are_accepted():
    rows, offsets = np.array([[65504, -65519, 1e-9, 0.1]], np.float32), np.array([0, 1])
    np.testing.assert_array_equal(to_float16(rows, "a", offsets, 0)[0, :3], [65504, -65504, 0])
    with pytest.raises(ValueError, match="sequence 0: a holds -65520, outside float16"):
        to_float16(np.array([[-65520]], np.float32), "a", offsets, 0)


def test_shards_hold_complete_sequences_up_to_their_size():
    assert cut(np.array([0, 3, 7, 9, 18]), 8) == [0, 2, 3, 4]  # the worked example
    assert cut(np.array([0, 9, 10]), 8) == [0, 1, 2] and cut(np.array([0, 3, 8]), 8) == [0, 2]
    sizes = np.diff(OFFSETS[cut(OFFSETS, SHARD)])
    assert len(sizes) == 4 and (sizes <= SHARD).all() and (sizes[:-1] > SHARD - 20).all()


def test_a_store_is_read_as_it_was_cut_with_more_shards_than_may_be_open(at, monkeypatch):
    everything = read(write(at()), "a", range(40))
    monkeypatch.setattr(trainer.features.shards, "OPEN_SHARDS", 1)
    monkeypatch.setattr(trainer.features.shards, "SHARD_TOKENS", 70)
    store = at()
    np.testing.assert_array_equal(read(store, "a", range(40)), everything)
    assert store._rows.cache_info().currsize == 1 and store._rows.cache_info().misses == 4


# Checking


def test_checksums_are_what_sha256sum_reads(at, tmp_path):
    write(at())
    files = contents(tmp_path)
    assert set(files) == {"meta.json", *FILES}
    for name in (name for name in files if name.endswith(".f16")):
        assert files[f"{name}.sha256"].decode() == f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n"
    command = ["sha256sum", "--quiet", "-c", *sorted(name for name in files if name.endswith("sha256"))]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0
    meta = json.loads(files["meta.json"])
    assert meta == {"format": 2, "dim": DIM, "sequences": 40, **IDENTITY, "shards": cut(OFFSETS, SHARD)}


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("b-00002.f16", lambda old: old[:1234] + bytes([old[1234] ^ 1]) + old[1235:], "its checksum is [0-9a-f]{64}, "),
        ("b-00002.f16", lambda old: old[:4096], "it has 4096 bytes, expected [0-9]+; delete it to have it written"),
        ("b-00002.f16.sha256", lambda old: b"12  b-00002.f16\n", "expected a SHA-256 .*; delete it to have the shard"),
        ("b-00002.f16.sha256", lambda old: b"0" * 64 + b"  b-00001.f16\n", "expected a SHA-256"),
        ("b-00002.f16.sha256", lambda old: b"\xff\xfe", "expected a SHA-256"),
    ],
)
def test_a_damaged_file_is_refused_by_name_until_it_is_deleted(at, tmp_path, name, damage, message):
    store = write(at())
    complete, path = contents(tmp_path), tmp_path / name
    store.verify(store.all(ARRAYS))
    path.write_bytes(damage(complete[name]))
    with pytest.raises(ValueError, match=rf"{path} is damaged: {message}"):
        store.verify(store.all(ARRAYS))
    store.verify(store.all(["a"]))
    path.unlink()
    write(at())
    assert contents(tmp_path) == complete


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "other"}, " is a cache of other data: tokenizer in meta.json is other, expected t; delete the"),
        ({"dim": 64}, " is a cache of other data: dim in meta.json is 64, expected 32"),
        ({"shards": [0, 12, 12, 40]}, "/meta.json is damaged: shards must ascend"),
        ({"shards": [0, 12, 39]}, "/meta.json is damaged: shards must ascend"),
        (b"[1, 2]", "/meta.json is damaged: it holds .*, expected an object"),
        (b'{"format": 2, "dim"', "/meta.json line 1: not valid JSON .*; delete it"),
    ],
)
def test_a_description_that_does_not_fit_is_refused_by_name(at, tmp_path, change, message):
    complete = contents(write(at()).directory)
    path = tmp_path / "meta.json"
    path.write_bytes(
        change if isinstance(change, bytes) else json.dumps(json.loads(path.read_text()) | change).encode()
    )
    with pytest.raises(ValueError, match=f"^{tmp_path}{message}"):
        at()
    if message.startswith("/meta.json"):  # its advice works
        path.unlink()
        write(at())
        assert contents(tmp_path) == complete


# Writing


def test_only_the_partial_files_of_dead_writers_are_removed(at, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    others = {f".a.f16.{HOST}.{os.getppid()}.partial", f".a.f16.other-{HOST}.{dead.pid}.partial", f".{HOST}.partial"}
    for name in (*others, f".b.f16.{HOST}.{dead.pid}.partial"):
        (tmp_path / name).touch()
    write(at())
    assert set(contents(tmp_path)) == {"meta.json", *FILES, *others}


def test_a_shard_that_another_process_finished_first_is_left_as_it_is(at, tmp_path):
    store = write(at())
    before = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    with ShardWriter(store) as writer:
        writer.put(0, {"a": ARRAYS["a"][: store.num_rows(0)]}, 0)
    assert writer.written == set()
    assert {path.name: path.stat().st_ino for path in tmp_path.iterdir()} == before


def test_put_returns_before_its_rows_are_written(at, tmp_path, monkeypatch):
    """The next ``put`` waits for them and raises what went wrong; the unfinished shard is removed."""
    may_write, threads = threading.Event(), []

    def blocked(self, values):
        threads.append(threading.current_thread())
        assert may_write.wait(30)
        raise OSError("of the thread")

    store = at()
    store.prepare()
    monkeypatch.setattr(trainer.features.shards._Partial, "write", blocked)
    rows = ARRAYS["a"][: OFFSETS[1]]
    with pytest.raises(OSError, match="of the thread"), ShardWriter(store) as writer:
        writer.put(0, {"a": rows}, 0)
        may_write.set()  # reached only because the write above is not waited for
        writer.put(0, {"a": rows}, 1)
        pytest.fail("the second put must raise")
    assert threads[0] is not threading.current_thread() and len(threads) == 1
    assert set(contents(tmp_path)) == {"meta.json"}


def test_an_error_in_the_last_rows_is_raised(at, tmp_path):
    store = at()
    store.prepare()
    rows = ARRAYS["a"][: OFFSETS[40]] * np.where(np.arange(OFFSETS[40]) == OFFSETS[5], np.inf, 1)[:, None]
    with pytest.raises(ValueError, match=r"sequence 5: a holds -?inf, outside float16"), ShardWriter(store) as writer:
        writer.put(0, {"a": rows[OFFSETS[3] : OFFSETS[7]]}, 3)
    assert set(contents(tmp_path)) == {"meta.json"}
