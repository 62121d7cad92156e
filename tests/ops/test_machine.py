"""What the machine's gauges touch is what they say they touch; how fast it is depends on the machine."""

import math

import numpy as np
import pytest

from ops.machine import (
    copy,
    copy_gb_s,
    fma_gflop_s,
    last_level_cache_bytes,
    launch_us,
    mma_tflop_s,
    multiply_halves,
    num_threads,
    read,
    read_gb_s,
)
from runtime import jt

pytestmark = pytest.mark.usefixtures("body")


def ones(count):
    buffer = jt.ones((count,))
    buffer.sync()
    return buffer


def test_every_element_is_read_in_every_sweep(body):
    count = 256 * num_threads() * 40
    for sweeps in (1, 3):
        seconds, total = read(ones(count), sweeps)
        assert total == sweeps * count and seconds > 0
    uneven = count + 102
    total = read(ones(uneven), 1)[1]
    assert count <= total <= uneven  # what is left out at the end is no more than that
    assert body == "cpu" or total == uneven


def test_a_copy_is_the_source():
    source = jt.array(np.arange(100_003, dtype=np.float32))
    source.sync()
    seconds, target = copy(source)
    assert seconds > 0
    np.testing.assert_array_equal(target.numpy(), source.numpy())


def test_a_warp_adds_up_the_products_of_halves(body, order):
    if body == "cpu":
        for measure in (lambda: mma_tflop_s(1), launch_us):
            with pytest.raises(ValueError, match="only a GPU"):
                measure()
        return
    rate, total = multiply_halves(1.5, 3)
    assert math.isfinite(rate) and rate > 0
    assert total == 3 * 16 * 1.5**2
    assert multiply_halves(1.5, 2)[1] != total


def test_rates_are_finite_and_positive(body):
    buffer = ones(1 << 20 if body == "cpu" else 1 << 16)
    rates = [read_gb_s(buffer), read_gb_s(buffer, 4), copy_gb_s(buffer), fma_gflop_s(10_000 if body == "cpu" else 100)]
    if body == "cuda":
        rates += [mma_tflop_s(1), *launch_us(10, ahead=10)]
        assert last_level_cache_bytes() > 0
    assert all(math.isfinite(rate) and rate > 0 for rate in rates), rates
    assert num_threads() >= 1


def test_the_last_level_cache_of_a_cpu_is_the_largest_one(tmp_path, body):
    if body == "cuda":
        pytest.skip("a GPU is asked itself")
    for index, size in enumerate(("48K", "1024K", "32M", "odd")):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "size").write_text(size + "\n")
    assert last_level_cache_bytes(tmp_path) == 32 << 20
    assert last_level_cache_bytes(tmp_path / "nowhere") is None
