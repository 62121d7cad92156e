"""Passes of small backbones, over a cache or without one, and random trees for them."""

import numpy as np

from tests.small import random_tree


def rows(output):
    """(hidden, logits) of a pass, (rows, ...) each."""
    return output.hidden.numpy()[0], output.logits.numpy()[0]


def run_pass(backbone, ids, cache=None, attend=None):
    """(hidden, logits) of a pass. Jittor runs nothing before its result is asked for: this asks."""
    return rows(backbone.forward(ids, cache=cache, attend=attend))


def prefilled(backbone, ids, room=64):
    """A cache with these tokens in it, possibly none."""
    cache = backbone.new_cache(room)
    if ids.shape[1]:
        run_pass(backbone, ids, cache)
        cache.commit(np.arange(ids.shape[1]))
    return cache


def tree_behind_a_prefix(seed):
    """(parents, base): a random tree, or forest, after a prefix of ``base`` tokens, possibly none."""
    random = np.random.default_rng(seed)
    parents = random_tree(random, int(random.integers(1, 14)), 14, lowest=-1 if seed % 3 == 0 else 0)
    return parents, int(random.integers(1, 12)) if seed % 4 else 0
