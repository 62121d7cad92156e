"""The embedded backbone with CUDA's bodies, emulated where there is no GPU: the numbers of the CPU's, and bits that do
not depend on how rows come to be run."""

import contextlib

import numpy as np
import pytest

import runtime
from backbone.model import load_backbone
from ops.kernel import emulated_cuda
from ops.row_plan import RowPlan
from tests.small import path_to

PREFIX = 118  # a tree behind it reaches over the first 128 keys, where a new chunk of attention begins
# Against the CPU's float32 arithmetic, logits of standard deviation 3: on CUDA, rows are rounded to float16 before
# every product with weights other than float32, 24 in six layers; so are attention's queries and NF4's values.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "int8": 2e-2, "nf4": 2e-2}
FLAGS = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True}}


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(3, 4096, (1, 200)).astype(np.int32)


@contextlib.contextmanager
def cuda():
    with contextlib.nullcontext() if runtime.device == "cuda" else emulated_cuda():
        yield


def load(storage):
    return load_backbone(**FLAGS.get(storage, {"dtype": storage}))


def random_tree(rows, back, seed=0):
    random = np.random.default_rng(seed)
    return np.array([-1, *(int(random.integers(max(0, row - back), row)) for row in range(1, rows))])


def prefilled(backbone, ids, length=PREFIX):
    cache = backbone.new_cache(256)
    backbone.forward(ids[:, :length], cache=cache, logits=None).hidden.sync()
    cache.commit(np.arange(length))
    return cache


def prompt_and_tree(storage, ids, defect=0.0):
    """(logits, chosen) of a prompt and of a tree behind it, (PREFIX + 24, ...)."""
    backbone = load(storage)
    backbone.norm = backbone.norm * (1 + defect)
    cache = backbone.new_cache(256)
    prompt = backbone.forward(ids[:, :PREFIX], cache=cache)
    logits, chosen = [prompt.logits.numpy()[0]], [prompt.chosen.numpy()[0]]
    cache.commit(np.arange(PREFIX))
    tree = backbone.forward(ids[:, PREFIX : PREFIX + 24], cache=cache, attend=random_tree(24, 8))
    logits.append(tree.logits.numpy()[0]), chosen.append(tree.chosen.numpy()[0])
    return np.concatenate(logits), np.concatenate(chosen)


@pytest.mark.skipif(runtime.device == "cuda", reason="on a GPU the CPU's bodies are not used")
@pytest.mark.parametrize("storage", TOLERANCE)
def test_logits_and_greedy_tokens_are_those_of_the_cpu(storage, ids):
    expected, tokens = prompt_and_tree(storage, ids)
    with cuda():
        found, chosen = prompt_and_tree(storage, ids)
    assert np.abs(found - expected).max() < TOLERANCE[storage]
    np.testing.assert_array_equal(chosen, found.argmax(1))
    best = np.sort(expected, 1)[:, -2:]
    certain = best[:, 1] - best[:, 0] > 2 * TOLERANCE[storage]
    assert certain.mean() > 0.8
    np.testing.assert_array_equal(chosen[certain], tokens[certain])


@pytest.mark.skipif(runtime.device == "cuda", reason="on a GPU the CPU's bodies are not used")
def test_the_comparison_notices_a_slightly_larger_norm(ids):
    expected, _ = prompt_and_tree("float16", ids)
    with cuda():
        found, _ = prompt_and_tree("float16", ids, defect=0.01)
    assert np.abs(found - expected).max() > 2 * TOLERANCE["float16"]


def bits(output):
    return output.logits.numpy()[0].view(np.uint32)


@pytest.mark.parametrize("storage", ["float16", "float32"])
def test_a_row_has_the_same_bits_beside_others_in_a_tree_and_behind_its_path(storage, ids):
    with cuda():
        backbone = load(storage)
        cache, nodes = prefilled(backbone, ids), ids[:, PREFIX : PREFIX + 65]
        whole = bits(backbone.forward(nodes, cache=cache))
        for rows in (1, 9, 33, 64):
            np.testing.assert_array_equal(bits(backbone.forward(nodes[:, :rows], cache=cache)), whole[:rows])
        parents = random_tree(64, 12)
        tree = bits(backbone.forward(nodes[:, :64], cache=cache, attend=RowPlan(parents)))
        for node in (20, 63):
            path = path_to(parents, node)
            cache.rewind(PREFIX)
            for place in path:
                alone = bits(backbone.forward(nodes[:, place : place + 1], cache=cache))
                cache.commit([0])
            np.testing.assert_array_equal(alone[0], tree[node], err_msg=f"node {node}, path {path}")


@pytest.mark.parametrize("storage", ["float16", "float32"])
def test_a_long_prompt_goes_through_in_stretches_of_rows_with_the_same_bits(storage, ids, monkeypatch):
    with cuda():
        backbone = load(storage)
        whole = backbone.forward(ids[:, :90], layers=(0, 3, 6))
        expected = [bits(whole), *(layer.numpy().view(np.uint32) for layer in whole.layers.values())]
        monkeypatch.setattr("ops.row_plan.STRETCH", 32)
        parts = backbone.forward(ids[:, :90], layers=(0, 3, 6))
        found = [bits(parts), *(layer.numpy().view(np.uint32) for layer in parts.layers.values())]
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)
        last = backbone.forward(ids[:, :90], logits="last")
        np.testing.assert_array_equal(bits(last)[0], expected[0][-1])


@pytest.mark.parametrize("storage", ["float16", "float32"])
def test_a_batch_gives_each_sequence_the_bits_it_has_alone(storage, ids):
    with cuda():
        backbone, rows = load(storage), np.stack([ids[0, :20], ids[0, 50:70], ids[0, 100:120]])
        together = backbone.forward(rows, logits="last")
        for row in range(3):
            alone = backbone.forward(rows[row : row + 1])
            np.testing.assert_array_equal(
                together.hidden.numpy()[row].view(np.uint32), alone.hidden.numpy()[0].view(np.uint32)
            )
            np.testing.assert_array_equal(
                together.logits.numpy()[row, 0].view(np.uint32), alone.logits.numpy()[0, -1].view(np.uint32)
            )
            assert together.chosen.numpy()[row, 0] == alone.chosen.numpy()[0, -1]


def test_embedding_and_language_model_head_alone_are_those_of_a_pass(ids):
    with cuda():
        backbone = load("float16")
        output = backbone.forward(ids[:, :5], layers=(0,))
        np.testing.assert_array_equal(backbone.embed(output.chosen * 0 + ids[:, :5]).numpy(), output.layers[0].numpy())
        np.testing.assert_array_equal(backbone.lm_logits(output.hidden).numpy(), output.logits.numpy())
