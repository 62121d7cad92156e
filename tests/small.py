"""A backbone small enough for a test: random weights, 2 layers, 32 wide, 64 tokens, grouped queries."""

import contextlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import runtime
from backbone.config import BackboneConfig
from backbone.model import Backbone
from backbone.weights import expected_shapes
from ops.kernel import emulated_cuda

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


def random_tree(random, rows: int, back: int, lowest: int = 0) -> np.ndarray:
    """Parents of a tree whose nodes hang on one of the ``back`` nodes before them; a forest where ``lowest`` is -1."""
    return np.array([-1, *(int(random.integers(max(lowest, row - back), row)) for row in range(1, rows))])


def path_to(parents, node: int) -> list[int]:
    """The nodes from the root to ``node``."""
    path = [int(node)]
    while parents[path[0]] >= 0:
        path.insert(0, int(parents[path[0]]))
    return path


def save_hugging_face(directory: Path, config: BackboneConfig, tensors: dict[str, np.ndarray], **changes) -> Path:
    """A Hugging Face directory of these tensors; returns it. changes: of its config.json."""
    raw = {
        "architectures": ["MistralForCausalLM" if config.model_type == "mistral" else "LlamaForCausalLM"],
        "model_type": config.model_type,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, **(config.rope_scaling or {"rope_type": "default"})},
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "sliding_window": None,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0],
        **changes,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    save_file(tensors, directory / "model.safetensors")
    return directory


def bodies(which: str):
    """Within, the operations run these bodies: "cpu", or "cuda", emulated where there is no GPU."""
    return emulated_cuda() if which == "cuda" and runtime.device == "cpu" else contextlib.nullcontext()
