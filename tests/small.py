"""A backbone small enough for a test: random weights, 2 layers, 32 wide, 64 tokens, grouped queries."""

import numpy as np

from backbone.config import BackboneConfig
from backbone.model import Backbone
from backbone.weights import expected_shapes

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_positions": 128,
    "tie_embeddings": False,
    "model_type": "llama",
    "bos_id": 1,
    "eos_ids": (2,),
}


def small_config(**changes) -> BackboneConfig:
    """The small backbone's sizes, some of them changed."""
    return BackboneConfig(**{**SMALL, **changes})


def draw_weights(config: BackboneConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by Hugging Face name, float32, on a scale that keeps hidden states near one."""
    random = np.random.default_rng(seed)
    return {
        name: (
            random.uniform(0.5, 1.5, shape) if len(shape) == 1 else random.standard_normal(shape) * 2 / shape[1] ** 0.5
        ).astype(np.float32)
        for name, shape in expected_shapes(config).items()
    }


def small_backbone(dtype: str = "float32", seed: int = 0) -> Backbone:
    """The small backbone with random weights."""
    config = small_config()
    return Backbone(config, draw_weights(config, seed), dtype)
