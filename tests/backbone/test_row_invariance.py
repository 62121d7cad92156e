"""Raw bits of logits over 1 to 64 rows and random trees of 64 nodes: the embedded backbone, every kind of weights."""

import numpy as np
import pytest

import runtime
from backbone.model import load_backbone
from ops.row_plan import RowPlan
from tests.backbone.passes import prefilled
from tests.small import bodies, path_to, random_tree

PREFIX = 118  # a tree after it reaches over the first 128 keys, where a new chunk of CUDA's attention begins


MADE = [(storage, "cpu") for storage in ("float16", "float32", "int8", "nf4")]
MADE += [("float16", "cuda"), ("float32", "cuda")]


@pytest.fixture(scope="module", params=MADE, ids="-".join)
def made(request):
    storage, body = request.param
    if runtime.device == "cuda" and body == "cpu":
        pytest.skip("on a GPU the CPU's bodies are not used")
    flags = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True}}
    with bodies(body):
        return load_backbone(**flags.get(storage, {"dtype": storage})), body


@pytest.fixture
def backbone(made):
    """The embedded backbone in every storage, for either bodies, which serve during the test."""
    with bodies(made[1]):
        yield made[0]


@pytest.fixture
def few(made):
    """few(numbers): a part of them where an emulation takes long."""
    return lambda numbers: numbers if made[1] == "cpu" else numbers[:: len(numbers) // 3]


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(3, 4096, (1, 200)).astype(np.int32)


def bits(output):
    """(rows, vocab) uint32: equal only where every bit is, unlike floats with -0 and 0."""
    return output.logits.numpy()[0].view(np.uint32)


def test_a_row_has_the_same_bits_beside_1_to_63_others(backbone, ids, few):
    cache = prefilled(backbone, ids[:, :PREFIX], 256)
    whole = bits(backbone.forward(ids[:, PREFIX : PREFIX + 64], cache=cache))
    for rows in few(range(1, 64)):
        part = bits(backbone.forward(ids[:, PREFIX : PREFIX + rows], cache=cache))
        np.testing.assert_array_equal(part, whole[:rows], err_msg=f"{rows} rows")


@pytest.mark.parametrize("seed", range(3))
def test_a_node_has_the_same_bits_in_a_tree_of_64_and_with_its_path_in_the_cache(backbone, ids, few, seed):
    # Bushy, deep, and between.
    parents, nodes = random_tree(np.random.default_rng(seed), 64, [3, 12, 63][seed]), ids[:, 100:164]
    cache = prefilled(backbone, ids[:, :PREFIX], 256)
    tree = bits(backbone.forward(nodes, cache=cache, attend=RowPlan(parents)))
    for node in few(np.random.default_rng(seed).choice(64, 12, replace=False)):
        path = path_to(parents, node)
        cache.rewind(PREFIX)
        for place in path:  # one row a pass: all ancestors come from the cache
            alone = bits(backbone.forward(nodes[:, place : place + 1], cache=cache))
            cache.commit([0])
        np.testing.assert_array_equal(alone[0], tree[node], err_msg=f"node {node}, path {path}")


def test_the_comparison_notices_ancestors_in_another_order(backbone, ids, made):
    """The control: the same keys, summed in another order, differ in their last bits and in nothing more."""
    nodes = ids[:, [100, 101, 102]]
    right, swapped = RowPlan(np.array([-1, 0, 1])), RowPlan(np.array([-1, 0, 1]))
    meta, extras = right.meta_array.copy(), np.full((3, 3), -1, np.int32)
    meta[2, 3], extras[2] = 0, [1, 0, 2]  # of the last row's own pass, all named one by one, two of them exchanged
    swapped._hold(meta, extras)
    differ = 0
    for base in range(PREFIX + 5, PREFIX + 10):
        cache = prefilled(backbone, ids[:, :base], 256)
        expected, found = (
            backbone.forward(nodes, cache=cache, attend=plan).logits.numpy()[0, 2] for plan in (right, swapped)
        )
        differ += (found.view(np.uint32) != expected.view(np.uint32)).any()
        assert np.abs(found - expected).max() < (1e-3 if made[1] == "cpu" else 2e-2)
    assert differ
