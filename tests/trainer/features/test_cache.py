"""The feature cache: equal to online features, completed after every interruption, damaged files refused by name."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import trainer.features.cache
import trainer.features.shards
from ops.kernel import emulated_cuda
from runtime.atomic import HOST
from tests.small import small_backbone
from trainer.data.tokens import TokenizedData
from trainer.features.cache import (
    OnlineFeatures,
    array_names,
    cache_key,
    feature_store,
    open_cache,
    write_features,
)

ROOT = Path(__file__).resolve().parents[3]
SHARD, CHUNK = 200, 60  # tokens: four shards of the data below, each written in several pieces
BYTES = 32 * 2  # of a token in an array


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(trainer.features.shards, "SHARD_TOKENS", SHARD)
    monkeypatch.setattr(trainer.features.cache, "CHUNK_TOKENS", CHUNK)


def some_data():
    random = np.random.default_rng(0)
    return TokenizedData.of([(random.integers(3, 64, n), np.ones(n)) for n in random.integers(12, 20, 40)])


@pytest.fixture(scope="module")
def data():
    return some_data()


@pytest.fixture
def opened(backbone, data, tmp_path):
    """opened(layers=(), **options) -> (features, bytes announced before writing): open_cache with its reports."""

    def call(layers=(), **options):
        announced, counts = [], []
        cached = open_cache(
            backbone, "tok", data, layers, tmp_path, lambda *what: announced.append(what), counts.append, **options
        )
        assert sum(counts) == data.offsets[-1]
        assert [path for path, _ in announced] == [directory_of(tmp_path)] * len(announced)
        return cached, sum(size for _, size in announced)

    return call


def write_share(backbone, data, root, rank=0, world_size=1, layers=(), on_start=lambda *_: None):
    """The shards that a rank writes."""
    store = feature_store(backbone, "tok", data, root)
    return write_features(backbone, data, store, layers, on_start, lambda count: None, rank, world_size)[0]


def directory_of(root):
    [directory] = root.iterdir()
    return directory


def contents(root):
    """The files of the one cache in a folder, by name."""
    return {path.name: path.read_bytes() for path in directory_of(root).iterdir()}


def shard_files(*shards):
    return {name for shard in shards for name in (f"{shard}.f16", f"{shard}.f16.sha256")}


def all_shards(*arrays):
    return shard_files(*[f"{array}-{index:05d}" for array in arrays for index in range(4)])


# Equal to computing


@pytest.mark.parametrize("layers", [(0, 1), (1, 0)])
def test_cached_features_equal_online_features_rounded_to_float16(backbone, data, opened, layers):
    cached, num_bytes = opened(layers)
    online = OnlineFeatures(backbone, data, layers)
    for indices in ([0], [5, 2, 30], range(len(data)), np.array([39, 39])):
        a, b = cached(indices), online(indices)
        with emulated_cuda():  # which widens halves itself
            np.testing.assert_array_equal(cached(indices).hidden.numpy(), a.hidden.numpy())
        assert a.lengths == b.lengths and tuple(a.layers) == layers
        for got, want in [(a.hidden, b.hidden), *((a.layers[i], b.layers[i]) for i in layers)]:
            assert got.dtype == "float32" and got.shape == want.shape
            # To the nearest of float16's 11 significant bits: within 2^-11 of the number.
            np.testing.assert_array_equal(got.numpy(), want.numpy().astype(np.float16).astype(np.float32))
            np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=2**-11, atol=2**-24)
    assert (cached([5]).hidden.numpy() != online([2]).hidden.numpy()[:, :1]).any()
    assert num_bytes == data.offsets[-1] * BYTES * 3
    assert opened(layers)[1] == 0


def test_the_cache_is_named_by_all_it_depends_on(backbone, data, monkeypatch):
    other_ids = TokenizedData(data.token_ids.copy(), data.mask, data.offsets)
    other_ids.token_ids[7] += 1
    other_cut = TokenizedData(data.token_ids, data.mask, data.offsets.copy())
    other_cut.offsets[1] += 1
    keys = [
        cache_key(backbone, "tok", data),
        cache_key(backbone, "other", data),
        cache_key(backbone, "tok", other_ids),
        cache_key(backbone, "tok", other_cut),
        cache_key(small_backbone("float16"), "tok", data),
        cache_key(small_backbone(seed=1), "tok", data),
    ]
    again = TokenizedData(data.token_ids.copy(), data.mask.copy(), data.offsets.copy())
    assert cache_key(small_backbone(), "tok", again) == keys[0]
    monkeypatch.setattr(trainer.features.cache, "FORMAT", 1)
    assert len({*keys, cache_key(backbone, "tok", data)}) == len(keys) + 1


# Resuming


def test_a_cache_is_shared_and_grows_by_the_missing_layers(backbone, data, opened, tmp_path):
    opened((1,))
    before = {path.name: path.stat().st_mtime_ns for path in directory_of(tmp_path).iterdir()}
    assert set(before) == {"meta.json", *all_shards("hidden", "layer1")}
    cached, num_bytes = opened((0, 1))
    assert num_bytes == data.offsets[-1] * BYTES  # only one more layer
    after = {path.name: path.stat().st_mtime_ns for path in directory_of(tmp_path).iterdir()}
    assert set(after) == {*before, *all_shards("layer0")} and before.items() <= after.items()
    want = OnlineFeatures(backbone, data, (0, 1))([3])
    for index, layer in cached([3]).layers.items():
        np.testing.assert_array_equal(layer.numpy(), want.layers[index].numpy().astype(np.float16).astype(np.float32))


def _under(path):
    """The temporary name of a writer that is dead."""
    writer = subprocess.Popen(["true"])
    writer.wait()
    return path.with_name(f".{path.name}.{HOST}.{writer.pid}.partial")


def in_flight(path):
    os.truncate(path, 1000)
    path.rename(_under(path))
    checksum(path).unlink()


def without_checksum(path):
    checksum(path).unlink()


def checksum_in_flight(path):
    checksum(path).write_text("5" * 30)
    checksum(path).rename(_under(checksum(path)))


def without_description(path):
    path.with_name("meta.json").rename(_under(path.with_name("meta.json")))
    checksum(path).unlink()


def checksum(path):
    return path.with_name(f"{path.name}.sha256")


@pytest.mark.parametrize("moment", [in_flight, without_checksum, checksum_in_flight, without_description])
def test_a_writer_killed_at_any_moment_loses_one_shard(data, opened, tmp_path, moment):
    opened((1,))
    complete = contents(tmp_path)
    moment(directory_of(tmp_path) / "layer1-00002.f16")
    assert contents(tmp_path) != complete
    cached, num_bytes = opened((1,))
    assert num_bytes == cached.store.num_rows(2) * BYTES
    assert contents(tmp_path) == complete


CHILD = """
import os, signal, sys, time
from pathlib import Path
import trainer.features.cache, trainer.features.shards
from tests.small import small_backbone
from tests.trainer.features.test_cache import CHUNK, SHARD, some_data

trainer.features.shards.SHARD_TOKENS, trainer.features.cache.CHUNK_TOKENS = SHARD, CHUNK
root, kill_at, calls = Path(sys.argv[1]), int(sys.argv[2]), []

def count(tokens):
    # All three have looked for missing shards, and are in the middle of the first one, before any continues.
    calls.append(tokens)
    if len(calls) <= 2:
        (root / f"{len(calls)}-{os.getpid()}").touch()
        while len(list(root.glob(f"{len(calls)}-*"))) < 3:
            time.sleep(0.005)
    if len(calls) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

trainer.features.cache.open_cache(small_backbone(), "tok", some_data(), (1,), root / "cache", on_tokens=count)
"""


def test_processes_that_write_at_once_do_not_harm_each_other_even_if_one_is_killed(backbone, data, tmp_path):
    for name in ("together", "alone"):
        (tmp_path / name).mkdir()
    commands = [[sys.executable, "-c", CHILD, str(tmp_path / "together"), str(kill_at)] for kill_at in (0, 0, 3)]
    children = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    try:
        assert [child.wait(100) for child in children] == [0, 0, -signal.SIGKILL]
    finally:
        for child in children:
            child.kill()
    together = tmp_path / "together" / "cache"
    open_cache(backbone, "tok", data, (1,), tmp_path / "alone")
    alone, written = contents(tmp_path / "alone"), contents(together)
    assert alone.items() <= written.items()
    # Only the killed one left files, its unfinished shards, which the next writer removes.
    left = {f".{name}-00000.f16.{HOST}.{children[2].pid}.partial" for name in array_names((1,))}
    assert set(written) - set(alone) == left
    (directory_of(together) / "hidden-00001.f16").unlink()
    open_cache(backbone, "tok", data, (1,), together)
    assert contents(together) == alone


def test_shards_that_another_process_wrote_meanwhile_are_not_computed(backbone, data, tmp_path):
    def other_is_faster(*_):
        write_share(backbone, data, tmp_path)

    slow = SimpleNamespace(config=backbone.config, fingerprint=backbone.fingerprint, storage=backbone.storage)
    # This backbone cannot compute at all.
    assert write_share(slow, data, tmp_path, on_start=other_is_faster) == set()
    assert set(contents(tmp_path)) == {"meta.json", *all_shards("hidden")}


# Several ranks


def test_each_rank_writes_its_share_and_all_open_all_of_it(backbone, data, opened, tmp_path):
    everything, names = opened((1,))[0](range(len(data))), array_names((1,))
    want = contents(tmp_path)
    shutil.rmtree(directory_of(tmp_path))
    for rank in range(2):
        share = write_share(backbone, data, tmp_path, rank, 2, (1,))
        assert share == {(name, index) for name in names for index in (rank, rank + 2)}
    for rank in range(2):
        cached, num_bytes = opened((1,), rank=rank, world_size=2)
        assert num_bytes == 0
        np.testing.assert_array_equal(cached(range(len(data))).hidden.numpy(), everything.hidden.numpy())
    assert contents(tmp_path) == want


def test_shards_that_another_rank_did_not_write_are_named(opened, tmp_path):
    with pytest.raises(ValueError, match=r"hidden-00001\.f16 and 1 other shards are missing although all 2 ranks"):
        opened(world_size=2)
    assert set(contents(tmp_path)) == {"meta.json", *shard_files("hidden-00000", "hidden-00002")}


def test_a_shard_that_another_rank_damaged_is_refused(backbone, data, opened, tmp_path):
    def other_writes():
        write_share(backbone, data, tmp_path, 1, 2)
        flip(directory_of(tmp_path) / "hidden-00003.f16")

    with pytest.raises(ValueError, match=r"hidden-00003\.f16 is damaged"):
        opened(world_size=2, barrier=other_writes)


# Damage


def flip(path):
    """Alter one bit."""
    content = bytearray(path.read_bytes())
    content[1234] ^= 1
    path.write_bytes(content)


def test_a_damaged_shard_is_refused_before_anything_is_written_until_it_is_deleted(opened, tmp_path):
    opened((1,))
    complete = contents(tmp_path)
    path = directory_of(tmp_path) / "layer1-00002.f16"
    flip(path)
    with pytest.raises(ValueError, match=r"layer1-00002\.f16 is damaged: .*; delete it to have it written again"):
        opened((0, 1))
    assert set(contents(tmp_path)) == set(complete)
    assert opened()[1] == 0  # a head that does not need it is not affected
    path.unlink()
    cached, num_bytes = opened((1,))
    assert num_bytes == cached.store.num_rows(2) * BYTES and contents(tmp_path) == complete


def test_a_disk_without_room_is_reported_before_anything_is_written(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="use --features online or another --cache-dir"):
        opened()
    assert list(tmp_path.iterdir()) == []
