"""What the machine's gauges touch is what they say they touch; how fast it is depends on the machine."""

import math

import numpy as np

from ops.machine import copy, copy_gb_s, fma_gflop_s, last_level_cache_bytes, num_threads, read, read_gb_s
from runtime import jt


def ones(count):
    buffer = jt.ones((count,))
    buffer.sync()
    return buffer


def test_every_element_is_read_in_every_sweep():
    count = 256 * num_threads() * 40
    for sweeps in (1, 3):
        seconds, total = read(ones(count), sweeps)
        assert total == sweeps * count and seconds > 0
    uneven = count + 100
    assert count <= read(ones(uneven), 1)[1] <= uneven  # what is left out at the end is no more than that


def test_a_copy_is_the_source():
    source = jt.array(np.arange(100_003, dtype=np.float32))
    source.sync()
    seconds, target = copy(source)
    assert seconds > 0
    np.testing.assert_array_equal(target.numpy(), source.numpy())


def test_rates_are_finite_and_positive():
    buffer = ones(1 << 20)
    for rate in (read_gb_s(buffer), read_gb_s(buffer, 4), copy_gb_s(buffer), fma_gflop_s(10_000)):
        assert math.isfinite(rate) and rate > 0
    assert num_threads() >= 1


def test_the_last_level_cache_is_the_largest_one(tmp_path):
    for index, size in enumerate(("48K", "1024K", "32M", "odd")):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "size").write_text(size + "\n")
    assert last_level_cache_bytes(tmp_path) == 32 << 20
    assert last_level_cache_bytes(tmp_path / "nowhere") is None
