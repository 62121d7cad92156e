"""Raw bits of logits over 1 to 64 rows and random trees of 64 nodes: the embedded backbone, every kind of weights."""

import numpy as np
import pytest

from backbone.model import load_backbone
from ops.row_plan import RowPlan
from tests.small import path_to

PREFIX = 21


@pytest.fixture(scope="module", params=["float16", "float32", "int8", "nf4"])
def backbone(request):
    flags = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True}}
    return load_backbone(**flags.get(request.param, {"dtype": request.param}))


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(3, 4096, (1, 200)).astype(np.int32)


def bits(output):
    """(rows, vocab) uint32: equal only where every bit is, unlike floats with -0 and 0."""
    return output.logits.numpy()[0].view(np.uint32)


def prefilled(backbone, ids):
    cache = backbone.new_cache(128)
    backbone.forward(ids[:, :PREFIX], cache=cache, logits=None).hidden.sync()
    cache.commit(np.arange(PREFIX))
    return cache


def test_a_row_has_the_same_bits_beside_1_to_63_others(backbone, ids):
    cache = prefilled(backbone, ids)
    whole = bits(backbone.forward(ids[:, PREFIX : PREFIX + 64], cache=cache))
    for rows in range(1, 64):
        part = bits(backbone.forward(ids[:, PREFIX : PREFIX + rows], cache=cache))
        np.testing.assert_array_equal(part, whole[:rows], err_msg=f"{rows} rows")


def random_tree(seed):
    """64 nodes: bushy, deep, or anything between."""
    random = np.random.default_rng(seed)
    back = [3, 12, 63][seed % 3]
    return np.array([-1, *(int(random.integers(max(0, row - back), row)) for row in range(1, 64))])


@pytest.mark.parametrize("seed", range(3))
def test_a_node_has_the_same_bits_in_a_tree_of_64_and_with_its_path_in_the_cache(backbone, ids, seed):
    parents, nodes = random_tree(seed), ids[:, 100:164]
    cache = prefilled(backbone, ids)
    tree = bits(backbone.forward(nodes, cache=cache, attend=RowPlan(parents)))
    for node in np.random.default_rng(seed).choice(64, 12, replace=False):
        path = path_to(parents, node)
        cache.rewind(PREFIX)
        for place in path:  # one row a pass: all ancestors come from the cache
            alone = bits(backbone.forward(nodes[:, place : place + 1], cache=cache))
            cache.commit([0])
        np.testing.assert_array_equal(alone[0], tree[node], err_msg=f"node {node}, path {path}")


def test_the_comparison_notices_ancestors_in_another_order(backbone, ids):
    """The control: the same keys, summed in another order, differ in their last bits and in nothing more."""
    nodes = ids[:, [100, 101, 102]]
    right, swapped = RowPlan(np.array([-1, 0, 1])), RowPlan(np.array([-1, 0, 1]))
    meta, extras = right.meta_array.copy(), np.full((3, 3), -1, np.int32)
    meta[2, 3], extras[2] = 0, [1, 0, 2]  # of the last row's own pass, all named one by one, two of them exchanged
    swapped._hold(meta, extras)
    cache = prefilled(backbone, ids)
    expected = backbone.forward(nodes, cache=cache, attend=right).logits.numpy()[0, 2]
    found = backbone.forward(nodes, cache=cache, attend=swapped).logits.numpy()[0, 2]
    assert (found.view(np.uint32) != expected.view(np.uint32)).any()
    assert np.abs(found - expected).max() < 1e-3
