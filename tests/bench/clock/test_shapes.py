"""What a pass must read and compute, by hand-worked examples and published sizes."""

import dataclasses

import numpy as np
import pytest

from bench.clock import shapes
from bench.clock.shapes import (
    SHAPES,
    cache_bytes,
    check_memory,
    largest_matrix,
    pass_bytes,
    pass_flops,
    random_weights,
    weight_bytes,
)
from tests.small import small_config

# The worked example: 44 weights in products (12 + 4 + 12 + 6 in the layer, 10 in the head).
HAND = dataclasses.replace(
    small_config(),
    num_layers=1,
    hidden_size=2,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    intermediate_size=3,
    vocab_size=5,
)


def test_flops_and_bytes_of_the_worked_example():
    assert pass_flops(HAND, rows=2, context=3) == 248
    assert pass_bytes(HAND, "float16", rows=2, context=3) == 160
    assert pass_bytes(HAND, "float32", rows=2, context=3) == 2 * 96 + 24 + 2 * 40
    assert pass_flops(HAND, rows=1, context=0) == 2 * 44 + 4 * 2  # a row sees itself


def test_grouped_queries_read_fewer_keys_and_compute_as_much():
    grouped = dataclasses.replace(small_config(), num_kv_heads=1)
    single = dataclasses.replace(small_config(), num_kv_heads=4)
    assert 4 * cache_bytes(grouped, "float16", 10) == cache_bytes(single, "float16", 10)
    more = [pass_flops(c, 3, 10) - pass_flops(c, 3, 0) for c in (grouped, single)]
    assert more[0] == more[1] == 4 * 2 * 4 * 8 * 3 * 10  # 2 layers, 4 heads of 8, 3 rows, 10 keys


def test_the_large_shapes_have_the_published_numbers_of_weights():
    # norms are float32, the rest float16
    for name, parameters in (("1.1b", 1_100_048_384), ("7b", 6_738_415_616)):
        config = SHAPES[name]
        norms = (2 * config.num_layers + 1) * config.hidden_size
        assert weight_bytes(config, "float16") == 2 * parameters + 2 * norms


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_random_weights_take_the_bytes_that_are_counted(dtype):
    config = small_config()
    tensors = random_weights(config, dtype)
    assert sum(t.nbytes for t in tensors.values()) == weight_bytes(config, dtype)
    matrix = tensors["model.layers.0.mlp.down_proj.weight"].astype(np.float32)
    assert abs(matrix.std() * matrix.shape[1] ** 0.5 - 1) < 0.1
    np.testing.assert_array_equal(matrix, random_weights(config, dtype)["model.layers.0.mlp.down_proj.weight"])


def test_the_largest_matrix_is_found_inside_and_outside_the_layers():
    assert largest_matrix(SHAPES["1.1b"]) == ("lm_head", 32000, 2048)
    assert largest_matrix(small_config()) == ("gate_up", 112, 32)


def test_a_shape_that_does_not_fit_is_refused_with_both_figures():
    config = SHAPES["7b"]
    needed = shapes.BUILD_FACTOR * weight_bytes(config, "float16") + cache_bytes(config, "float16", 1000)
    check_memory("7b", config, "float16", 1000, int(needed) + 1)  # the control: this much is enough
    with pytest.raises(ValueError, match=r"shape 7b in float16 needs 19\.\d\d GB of memory, 8\.00 GB are available"):
        check_memory("7b", config, "float16", 1000, 8 * 10**9)
