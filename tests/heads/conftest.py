"""A backbone small enough that a head on it trains in a second, and heads whose parameters are all at work."""

import numpy as np
import pytest

from heads.registry import build
from runtime import jt
from tests.small import small_backbone


@pytest.fixture(scope="session")
def backbone():
    """Random weights in float32: 2 layers, 32 wide, 64 tokens."""
    return small_backbone()


@pytest.fixture
def random_head(backbone):
    """build(name, **options): a head with every parameter moved off its start, so that blocks that begin as zero or
    as the identity count too."""

    def make(name, seed=0, **options):
        head = build(name, options, backbone)
        random = np.random.default_rng(seed)
        for _, parameter in sorted(head.named_parameters()):
            start = parameter.numpy()
            noise = random.standard_normal(start.shape) * 0.5 / max(1, start.shape[-1]) ** 0.5
            parameter.update(jt.array((start + noise).astype(np.float32)))
        return head

    return make
