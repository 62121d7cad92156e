"""Decoding with CUDA's bodies, emulated where there is no GPU: a tree's text is the text without one."""

import contextlib

import numpy as np
import pytest

import runtime
from backbone.model import Backbone
from decoding.generate import generate, generate_autoregressive, generate_batch
from decoding.tree import Tree, default_tree
from ops.kernel import emulated_cuda
from tests.small import draw_weights, small_config

NUM_NEW = 40
TREES = {"gap": Tree.from_paths([[2], [0], [2, 1], [2, 1, 0], [0, 3]]), "default": default_tree(16, 4)}


@pytest.fixture(params=["float32", "float16"])
def small(request):
    """The small backbone, with more positions than attention reads in one chunk."""
    with contextlib.nullcontext() if runtime.device == "cuda" else emulated_cuda():
        config = small_config(max_positions=512)
        yield Backbone(config, draw_weights(config), request.param)


def text_of(length, seed=0):
    return np.random.default_rng(seed).integers(3, 64, length).tolist()


def known(backbone, prompt):
    """The baseline's text, some tokens longer than the tests ask for."""
    return generate_autoregressive(backbone, prompt, max_new_tokens=NUM_NEW + 16).token_ids


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("length", [5, 110])  # the second text grows past the first 128 keys
def test_greedy_tree_decoding_equals_autoregressive(small, make_head, name, length):
    prompt = text_of(length)
    continuation = known(small, prompt)
    head = make_head("sequential-mixed", small, prompt, continuation)
    result = generate(small, head, prompt, TREES[name], max_new_tokens=NUM_NEW)
    assert result.token_ids == continuation[:NUM_NEW]
    assert result.num_passes < 0.9 * NUM_NEW  # branches were accepted, and rows of the cache moved


def test_a_prompt_in_a_batch_gets_the_text_it_gets_alone(small, mixing_head):
    prompts = [text_of(length, length) for length in (3, 110, 17)]
    head, tree = mixing_head(small), TREES["default"]
    results = generate_batch(small, head, prompts, tree, max_new_tokens=12)
    for prompt, result in zip(prompts, results, strict=True):
        assert result.token_ids == generate(small, head, prompt, tree, max_new_tokens=12).token_ids
        assert result.token_ids == generate_autoregressive(small, prompt, max_new_tokens=12).token_ids


def test_the_comparison_notices_a_commit_of_other_rows(small, make_head, monkeypatch):
    prompt = text_of(20)
    continuation = known(small, prompt)
    head = make_head("sequential-mixed", small, prompt, continuation)
    monkeypatch.setattr("backbone.cache.keep_rows", lambda cache, sources, targets: None)
    with pytest.raises(AssertionError, match="do not line up"):  # the fake head's check
        generate(small, head, prompt, TREES["default"], max_new_tokens=NUM_NEW)
