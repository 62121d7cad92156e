"""The seven matrices out of a layer's packed weights, and products with them through which gradients flow."""

import gc

import numpy as np
import pytest

from ops.layer_weights import LayerShape, LayerWeights
from ops.packing.quantize import QUANTIZERS
from runtime import jt
from tests.ops.layers import stored

# No width is a multiple of 16, two are above the 64 inputs of an NF4 scale; grouped queries.
SHAPE = LayerShape(hidden_size=72, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=136, eps=1e-5)
SIZES = {
    "q": (24, 72),
    "k": (12, 72),
    "v": (12, 72),
    "o": (72, 24),
    "gate": (136, 72),
    "up": (136, 72),
    "down": (72, 136),
}
STORAGES = ["float16", "float32", *QUANTIZERS]


def draw(storage, body):
    """(a random layer, its matrices as the storage keeps them for a body)."""
    random, dtype = np.random.default_rng(0), "float32" if storage in QUANTIZERS else storage
    parts = {name: random.standard_normal(size).astype(dtype) for name, size in SIZES.items()}
    norms = {name: np.ones(SHAPE.hidden_size, np.float32) for name in ("norm1", "norm2")}
    weights = LayerWeights(SHAPE, **norms, **parts, storage=storage)
    return weights, {name: stored(part, storage, body) for name, part in parts.items()}


@pytest.fixture(params=STORAGES)
def layer(request, body):
    return draw(request.param, body)


def test_the_matrices_are_what_was_packed_bit_for_bit(layer):
    weights, expected = layer
    found = weights.matrices()
    assert list(found) == list(SIZES)
    for name, matrix in found.items():
        assert matrix.dtype == np.float32 and weights.frozen()[name].shape == SIZES[name] == matrix.shape
        np.testing.assert_array_equal(matrix, expected[name], err_msg=name)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_random_layer_is_one_of_the_same_sizes_and_its_matrices_differ(storage, body):
    weights, (made, _) = LayerWeights.random(SHAPE, storage, seed=2, std=0.02), draw(storage, body)
    for found, like in zip(weights.inputs, made.inputs, strict=True):
        assert (found.numpy().size, found.dtype) == (like.numpy().size, like.dtype)
    matrices = weights.matrices()
    for name, size in SIZES.items():
        assert matrices[name].shape == size and abs(matrices[name].std() - 0.02) < 0.002, name
    assert (matrices["gate"] != matrices["up"]).any() and (matrices["k"] != matrices["v"]).any()


def value_and_gradient(product, name):
    """(y, dL/dx) of y = product(sin(x)), L = sum y^2 c."""
    random = np.random.default_rng(7)
    x = jt.array(random.standard_normal((9, SIZES[name][1])).astype(np.float32))
    y = product(x.sin())
    loss = (y * y * jt.array(random.standard_normal((9, SIZES[name][0])).astype(np.float32))).sum()
    return y.numpy(), jt.grad(loss, x).numpy()


@pytest.mark.parametrize("name", ["k", "up", "down"])
def test_a_product_and_its_gradient_equal_those_of_the_float_matrix(layer, name):
    weights, expected = layer
    matrix = jt.array(expected[name])
    y, dx = value_and_gradient(weights.frozen()[name], name)
    expected_y, expected_dx = value_and_gradient(lambda x: jt.nn.matmul_transpose(x, matrix), name)
    # The same numbers through the same products.
    np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-5, atol=1e-5 * np.abs(expected_dx).max())
    other = jt.array(expected[name][::-1].copy())  # the control
    _, wrong = value_and_gradient(lambda x: jt.nn.matmul_transpose(x, other), name)
    assert np.abs(wrong - dx).max() > 0.1 * np.abs(dx).max()


def test_no_unpacked_matrix_outlives_its_product():
    """Twenty products in a row, forward and backward: room for two unpacked matrices, not for twenty."""
    shape = LayerShape(hidden_size=512, num_heads=8, num_kv_heads=8, head_dim=64, intermediate_size=512, eps=1e-5)
    square = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32) / 512**0.5
    norms = {name: np.ones(512, np.float32) for name in ("norm1", "norm2")}
    weights = LayerWeights(shape, **norms, **dict.fromkeys(SIZES, square), storage="nf4")
    matrix, unpacked_bytes = weights.frozen()["o"], 4 * 512 * 512
    x = jt.array(np.ones((2, 512), np.float32))

    def grown(product):
        gc.collect()
        jt.sync_all()
        jt.gc()
        before = jt.get_mem_info().total_cpu_used
        y = x
        for _ in range(20):
            z = product(y)
            y = z * z.sigmoid()
        loss = y.sum()
        gradient = jt.grad(loss, x)
        jt.sync([loss, gradient])
        return jt.get_mem_info().total_cpu_used - before

    assert grown(matrix) < 4 * unpacked_bytes
    assert grown(lambda y: jt.nn.matmul_transpose(y, matrix.float32())) >= 20 * unpacked_bytes  # the control
