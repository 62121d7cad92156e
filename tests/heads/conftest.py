"""A backbone small enough that a head on it trains in a second, and heads whose parameters are all at work."""

import numpy as np
import pytest

from backbone.config import BackboneConfig
from backbone.model import Backbone
from backbone.weights import expected_shapes
from heads.registry import build
from runtime import jt

CONFIG = BackboneConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=56,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    max_positions=128,
    tie_embeddings=False,
    model_type="llama",
    bos_id=1,
    eos_ids=(2,),
)


@pytest.fixture(scope="session")
def backbone():
    """Random weights in float32: 2 layers, 32 wide, 64 tokens."""
    random = np.random.default_rng(0)
    tensors = {
        name: (
            random.uniform(0.5, 1.5, shape) if len(shape) == 1 else random.standard_normal(shape) * 2 / shape[1] ** 0.5
        ).astype(np.float32)
        for name, shape in expected_shapes(CONFIG).items()
    }
    return Backbone(CONFIG, tensors, "float32")


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
