"""The feature cache: equal to computing, whole after every kind of end, damaged or foreign files refused by name."""

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
from tests.small import small_backbone
from trainer.data.tokens import TokenizedData
from trainer.features.cache import (
    OnlineFeatures,
    array_names,
    cache_key,
    chunks,
    feature_store,
    open_cache,
    write_features,
)
from trainer.features.shards import HOST

ROOT = Path(__file__).resolve().parents[3]
SHARD, CHUNK = 200, 60  # tokens: four shards of the data below, each written in several pieces
BYTES = 32 * 2  # of a token in an array


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(trainer.features.shards, "SHARD_TOKENS", SHARD)
    monkeypatch.setattr(trainer.features.cache, "CHUNK_TOKENS", CHUNK)


@pytest.fixture(scope="module")
def backbone():
    return small_backbone()


def some_data():
    random = np.random.default_rng(0)
    return TokenizedData.of([(random.integers(3, 64, n), np.ones(n)) for n in random.integers(12, 20, 40)])


@pytest.fixture(scope="module")
def data():
    return some_data()


@pytest.fixture
def opened(backbone, data, tmp_path):
    """opened(layers=(), **options) -> (features, bytes told of before writing): open_cache with what it says noted."""

    def go(layers=(), **options):
        told, counts = [], []
        cached = open_cache(
            backbone, "tok", data, layers, tmp_path, lambda *what: told.append(what), counts.append, **options
        )
        assert sum(counts) == data.offsets[-1]
        assert [path for path, _ in told] == [directory_of(tmp_path)] * len(told)
        return cached, sum(size for _, size in told)

    return go


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
    cached, told = opened(layers)
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
    assert told == data.offsets[-1] * BYTES * 3
    assert opened(layers)[1] == 0


def test_passes_take_whole_sequences_up_to_their_size():
    data = TokenizedData.of([(np.zeros(n), np.ones(n)) for n in (7, 3, 4, 2, 9, 1)])
    assert list(chunks(data, range(1, 6), 7)) == [range(1, 3), range(3, 4), range(4, 5), range(5, 6)]
    assert list(chunks(data, range(0, 2), 100)) == [range(0, 2)]


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


# Going on


def test_a_cache_is_shared_and_grows_by_the_layers_it_lacks(backbone, data, opened, tmp_path):
    opened((1,))
    before = {path.name: path.stat().st_mtime_ns for path in directory_of(tmp_path).iterdir()}
    assert set(before) == {"meta.json", *all_shards("hidden", "layer1")}
    cached, told = opened((0, 1))
    assert told == data.offsets[-1] * BYTES  # one more layer alone
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


def not_renamed(path):
    path.rename(_under(path))
    checksum(path).unlink()


def without_checksum(path):
    checksum(path).unlink()


def checksum_in_flight(path):
    checksum(path).write_text("5" * 30)
    checksum(path).rename(_under(checksum(path)))


def without_shard(path):
    path.unlink()


def without_description(path):
    path.with_name("meta.json").rename(_under(path.with_name("meta.json")))
    checksum(path).unlink()


def checksum(path):
    return path.with_name(f"{path.name}.sha256")


MOMENTS = [in_flight, not_renamed, without_checksum, checksum_in_flight, without_shard, without_description]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_writer_killed_at_any_moment_loses_one_shard(data, opened, tmp_path, moment):
    opened((1,))
    whole = contents(tmp_path)
    moment(directory_of(tmp_path) / "layer1-00002.f16")
    assert contents(tmp_path) != whole
    cached, told = opened((1,))
    assert told == cached.store.num_rows(2) * BYTES
    assert contents(tmp_path) == whole


def stop_at(chunk, error):
    """An on_tokens that raises at its n-th call (the first one tells what is there)."""
    calls = []

    def stop(count):
        calls.append(count)
        if len(calls) == chunk:
            raise error

    return stop


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("of the backbone")])
def test_an_interrupted_write_keeps_the_whole_shards_and_goes_on_behind_them(backbone, data, opened, tmp_path, error):
    with pytest.raises(type(error)):
        open_cache(backbone, "tok", data, (1,), tmp_path, on_tokens=stop_at(7, error))
    kept = contents(tmp_path)
    assert set(kept) == {"meta.json", *shard_files("hidden-00000", "layer1-00000")}
    cached, told = opened((1,))
    assert told == (data.offsets[-1] - cached.store.num_rows(0)) * BYTES * 2
    assert kept.items() <= contents(tmp_path).items()
    assert set(contents(tmp_path)) == {"meta.json", *all_shards("hidden", "layer1")}


def test_ctrl_c_takes_effect_between_two_pieces(backbone, data, opened, tmp_path):
    counts = []

    def press(count):
        counts.append(count)
        if len(counts) == 3:
            signal.raise_signal(signal.SIGINT)
            counts.append("still running")

    with pytest.raises(KeyboardInterrupt):
        open_cache(backbone, "tok", data, (), tmp_path, on_tokens=press)
    assert counts[-1] == "still running" and len(counts) == 4
    assert set(contents(tmp_path)) == {"meta.json"}
    assert opened()[1] == data.offsets[-1] * BYTES


CHILD = """
import os, signal, sys, time
from pathlib import Path
import trainer.features.cache, trainer.features.shards
from tests.small import small_backbone
from tests.trainer.features.test_cache import CHUNK, SHARD, some_data

trainer.features.shards.SHARD_TOKENS, trainer.features.cache.CHUNK_TOKENS = SHARD, CHUNK
root, kill_at, calls = Path(sys.argv[1]), int(sys.argv[2]), []

def count(tokens):
    # All three have looked for what is lacking, and are in the middle of the first shard, before any goes on.
    calls.append(tokens)
    if len(calls) <= 2:
        (root / f"{len(calls)}-{os.getpid()}").touch()
        while len(list(root.glob(f"{len(calls)}-*"))) < 3:
            time.sleep(0.005)
    if len(calls) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

trainer.features.cache.open_cache(small_backbone(), "tok", some_data(), (1,), root / "cache", on_tokens=count)
"""


def test_processes_that_write_at_once_and_one_that_is_killed_do_not_harm_each_other(backbone, data, tmp_path):
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
    # Only the killed one left something, its shards in flight, which the next writer takes away.
    left = {f".{name}-00000.f16.{HOST}.{children[2].pid}.partial" for name in array_names((1,))}
    assert set(written) - set(alone) == left
    (directory_of(together) / "hidden-00001.f16").unlink()
    open_cache(backbone, "tok", data, (1,), together)
    assert contents(together) == alone


def test_what_another_process_wrote_meanwhile_is_not_computed_again(backbone, data, tmp_path):
    def other_is_faster(*_):
        write_features(backbone, data, feature_store(backbone, "tok", data, tmp_path), ())

    slow = SimpleNamespace(config=backbone.config, fingerprint=backbone.fingerprint, storage=backbone.storage)
    store = feature_store(slow, "tok", data, tmp_path)  # and this backbone cannot compute at all
    assert write_features(slow, data, store, (), on_start=other_is_faster)[0] == set()
    assert set(contents(tmp_path)) == {"meta.json", *all_shards("hidden")}


# Several ranks


def test_each_rank_writes_its_share_and_all_open_the_whole(backbone, data, opened, tmp_path):
    whole, names = opened((1,))[0](range(len(data))), array_names((1,))
    want = contents(tmp_path)
    shutil.rmtree(directory_of(tmp_path))
    stores = [feature_store(backbone, "tok", data, tmp_path) for _ in range(2)]
    shares = [write_features(backbone, data, stores[rank], (1,), rank=rank, world_size=2) for rank in range(2)]
    assert shares[0][0] == {(name, index) for name in names for index in (0, 2)}
    assert shares[1][0] == {(name, index) for name in names for index in (1, 3)}
    for rank in range(2):
        cached, told = opened((1,), rank=rank, world_size=2)
        assert told == 0
        np.testing.assert_array_equal(cached(range(len(data))).hidden.numpy(), whole.hidden.numpy())
    assert contents(tmp_path) == want


def test_a_rank_opens_what_the_others_have_written_by_the_barrier(backbone, data, opened, tmp_path):
    def other_writes():
        write_features(backbone, data, feature_store(backbone, "tok", data, tmp_path), (), rank=1, world_size=2)

    _, told = opened(rank=0, world_size=2, barrier=other_writes)
    assert told == data.offsets[-1] * BYTES  # of both ranks: they share a disk
    assert set(contents(tmp_path)) == {"meta.json", *all_shards("hidden")}


def test_what_another_rank_did_not_write_is_named(opened, tmp_path):
    with pytest.raises(ValueError, match=r"hidden-00001\.f16 and 1 other shards are lacking after all 2 ranks"):
        opened(world_size=2)
    assert set(contents(tmp_path)) == {"meta.json", *shard_files("hidden-00000", "hidden-00002")}


def test_what_another_rank_damaged_is_refused(backbone, data, opened, tmp_path):
    def other_writes():
        write_features(backbone, data, feature_store(backbone, "tok", data, tmp_path), (), rank=1, world_size=2)
        flip(directory_of(tmp_path) / "hidden-00003.f16")

    with pytest.raises(ValueError, match=r"hidden-00003\.f16 is damaged"):
        opened(world_size=2, barrier=other_writes)


# Damage, and what cannot be kept


def flip(path):
    """Alter one bit."""
    content = bytearray(path.read_bytes())
    content[1234] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, lambda path: os.truncate(path, 4096)])
def test_a_damaged_shard_is_refused_before_anything_is_written_until_it_is_deleted(opened, tmp_path, damage):
    opened((1,))
    whole = contents(tmp_path)
    path = directory_of(tmp_path) / "layer1-00002.f16"
    damage(path)
    with pytest.raises(ValueError, match=r"layer1-00002\.f16 is damaged: .*; delete it to have it written anew"):
        opened((0, 1))
    assert set(contents(tmp_path)) == set(whole)
    assert opened()[1] == 0  # a head that does not read it is not held up
    path.unlink()
    cached, told = opened((1,))
    assert told == cached.store.num_rows(2) * BYTES and contents(tmp_path) == whole


def test_a_cache_of_other_data_is_refused_by_name(backbone, data, opened, tmp_path):
    opened()
    other = TokenizedData(data.token_ids[::-1].copy(), data.mask, data.offsets)
    directory_of(tmp_path).rename(tmp_path / cache_key(backbone, "tok", other))
    with pytest.raises(ValueError, match=f"{directory_of(tmp_path)} is a cache of other data: token_ids_sha256"):
        open_cache(backbone, "tok", other, (), tmp_path)


def scaled(backbone, token, factor):
    """The backbone, one token's hidden state multiplied."""

    def forward(token_ids, **how):
        output = backbone.forward(token_ids, **how)
        rows = np.where(token_ids == token, np.float32(factor), np.float32(1))[..., None]
        return SimpleNamespace(hidden=output.hidden * rows, layers=output.layers)

    return SimpleNamespace(config=backbone.config, fingerprint="x", storage="float32", forward=forward)


@pytest.mark.parametrize(("factor", "value"), [(1e6, r"-?[\d.]{5,}"), (np.nan, "nan"), (np.inf, "-?inf")])
def test_a_feature_that_float16_cannot_hold_is_refused_by_its_sequence(backbone, data, tmp_path, factor, value):
    sequences = [data.conversation(i)[0] for i in range(len(data))]
    sequences = [np.where(ids == 63, 3, ids) for ids in sequences]
    sequences[27][4] = 63
    marked = TokenizedData.of([(ids, np.ones(len(ids))) for ids in sequences])
    said = f"sequence 27: hidden holds {value}, outside float16; use --features online"
    with pytest.raises(ValueError, match=said):
        open_cache(scaled(backbone, 63, factor), "tok", marked, (), tmp_path)
    assert set(contents(tmp_path)) == {"meta.json", *shard_files("hidden-00000", "hidden-00001")}


def test_a_disk_without_room_is_said_before_anything_is_written(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="use --features online or another --cache-dir"):
        opened()
    assert list(tmp_path.iterdir()) == []
