"""The embedded backbone with CUDA's bodies, emulated where there is no GPU, computes the numbers of the CPU's."""

import numpy as np
import pytest

import runtime
from backbone.model import load_backbone
from tests.small import bodies, random_tree

PREFIX = 118  # a tree after it reaches over the first 128 keys, where a new chunk of attention begins
# Against the CPU's float32 arithmetic, logits of standard deviation 3: on CUDA, rows are rounded to float16 before
# every product with weights other than float32, 24 in six layers; so are attention's queries and NF4's values.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "int8": 2e-2, "nf4": 2e-2}
FLAGS = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True}}


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(3, 4096, (1, 200)).astype(np.int32)


def load(storage):
    return load_backbone(**FLAGS.get(storage, {"dtype": storage}))


def prompt_and_tree(storage, ids, defect=0.0):
    """(logits, chosen) of a prompt and of a tree after it, (PREFIX + 24, ...)."""
    backbone = load(storage)
    backbone.norm = backbone.norm * (1 + defect)
    cache = backbone.new_cache(256)
    prompt = backbone.forward(ids[:, :PREFIX], cache=cache)
    logits, chosen = [prompt.logits.numpy()[0]], [prompt.chosen.numpy()[0]]
    cache.commit(np.arange(PREFIX))
    tree = backbone.forward(
        ids[:, PREFIX : PREFIX + 24], cache=cache, attend=random_tree(np.random.default_rng(0), 24, 8)
    )
    logits.append(tree.logits.numpy()[0]), chosen.append(tree.chosen.numpy()[0])
    return np.concatenate(logits), np.concatenate(chosen)


@pytest.mark.skipif(runtime.device == "cuda", reason="on a GPU the CPU's bodies are not used")
@pytest.mark.parametrize("storage", TOLERANCE)
def test_logits_and_greedy_tokens_are_those_of_the_cpu(storage, ids):
    expected, tokens = prompt_and_tree(storage, ids)
    with bodies("cuda"):
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
    with bodies("cuda"):
        found, _ = prompt_and_tree("float16", ids, defect=0.01)
    assert np.abs(found - expected).max() > 2 * TOLERANCE["float16"]


def bits(output):
    return output.logits.numpy()[0].view(np.uint32)


@pytest.mark.parametrize("storage", ["float16", "float32"])
def test_a_long_prompt_goes_through_in_stretches_of_rows_with_the_same_bits(storage, ids, monkeypatch):
    with bodies("cuda"):
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
