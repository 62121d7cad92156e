"""Backbones to time: their sizes, random weights of that size, and what a pass over them must read and compute.

The embedded tiny-vicuna fits into a processor's cache; the others have the sizes of well-known Llamas and random
weights, because what a pass costs does not depend on the weights.
"""

from __future__ import annotations

import numpy as np

from backbone.config import BackboneConfig, read_config
from backbone.tokenizer import EMBEDDED
from backbone.weights import expected_shapes
from runtime.entry import suggest
from runtime.memory import freed_at_once

TINY = "tiny-vicuna"
ITEM_BYTES = {"float16": 2, "float32": 4}
# While a backbone is built, some weights exist two or three times: up to 1.4 was measured for the 1.1b shape.
BUILD_FACTOR = 1.4


def _llama(layers: int, hidden: int, heads: int, kv_heads: int, inner: int, positions: int = 2048) -> BackboneConfig:
    return BackboneConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        max_positions=positions,
        tie_embeddings=False,
        model_type="llama",
        bos_id=1,
        eos_ids=(2,),
    )


SHAPES = {
    "110m": _llama(12, 768, 12, 12, 2048),
    "1.1b": _llama(22, 2048, 32, 4, 5632),  # TinyLlama 1.1B's
    "7b": _llama(32, 4096, 32, 32, 11008, 4096),  # Llama-2 7B's, so Vicuna v1.5 7B's
}


def shape_config(name: str) -> BackboneConfig:
    """The sizes of a shape by name. Raises ValueError with a suggestion for an unknown one."""
    if name == TINY:
        return read_config(EMBEDDED)
    if name not in SHAPES:
        raise suggest("shape", name, [TINY, *SHAPES])
    return SHAPES[name]


def usual_contexts(config: BackboneConfig) -> list[int]:
    """Cached rows before a pass by default: few, a usual number, and as many as leave room for 64 rows (1,024 rows if
    there are not many more positions)."""
    return [128, 1024, 3968] if config.max_positions == 4096 else [128, 512, 1024]


def config_from(plain: dict) -> BackboneConfig:
    """The config from the dictionary that ``dataclasses.asdict`` and JSON made of it."""
    return BackboneConfig(**{**plain, "eos_ids": tuple(plain["eos_ids"])})


def matrices(config: BackboneConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of the products of one layer as the engine runs them, and of the language-model head."""
    c = config
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return {
        "qkv": (queries + 2 * keys, c.hidden_size),
        "o": (c.hidden_size, queries),
        "gate_up": (2 * c.intermediate_size, c.hidden_size),
        "down": (c.hidden_size, c.intermediate_size),
        "lm_head": (c.vocab_size, c.hidden_size),
    }


def largest_matrix(config: BackboneConfig) -> tuple[str, int, int]:
    """(name, out, in) of the largest of ``matrices``."""
    name, (num_out, num_in) = max(matrices(config).items(), key=lambda item: item[1][0] * item[1][1])
    return name, num_out, num_in


def _multiplied(config: BackboneConfig) -> int:
    """Weights that every row of a pass is multiplied by: all matrices of all layers and the language-model head."""
    sizes = {name: num_out * num_in for name, (num_out, num_in) in matrices(config).items()}
    head = sizes.pop("lm_head")
    return config.num_layers * sum(sizes.values()) + head


def pass_flops(config: BackboneConfig, rows: int, context: int) -> int:
    """Floating-point operations of a pass over a chain of ``rows`` rows after ``context`` cached ones.

    2 for each weight of a product and row, 4 for each coordinate of a query head and key that a row sees (the score,
    and the sum of values). Norms, rotations, the softmax and SiLU are not counted: below 1% for the shapes here. Worked
    example: 1 layer, 2 wide, 1 head of 2, inner 3, vocabulary 5: 12 + 4 + 12 + 6 weights in the layer and 10 in the
    head; 2 rows after 3 see 4 + 5 keys: 2 * 2 * 44 + 4 * 2 * 9 = 248.
    """
    keys = rows * context + rows * (rows + 1) // 2
    return 2 * rows * _multiplied(config) + 4 * config.num_layers * config.num_heads * config.head_dim * keys


def pass_bytes(config: BackboneConfig, dtype: str, rows: int, context: int) -> int:
    """Bytes that such a pass must read: every weight of a product once, the norms in float32, the rows' embeddings, and
    the keys and values of the context and of the rows. Intermediate results are not counted: they stay in a cache.

    Worked example, the one of ``pass_flops`` in float16: 44 weights and 2 embeddings of 2, 2 bytes each: 96; 3 norms of
    2 coordinates, 4 bytes each: 24; keys and values of 5 rows, 2 coordinates, 2 bytes each: 40; together 160.
    """
    item, norms = ITEM_BYTES[dtype], 2 * config.num_layers + 1
    weights = item * (_multiplied(config) + rows * config.hidden_size) + 4 * norms * config.hidden_size
    return weights + cache_bytes(config, dtype, context + rows)


def cache_bytes(config: BackboneConfig, dtype: str, length: int) -> int:
    """Bytes of the keys and values of ``length`` rows in every layer."""
    return ITEM_BYTES[dtype] * 2 * config.num_layers * config.num_kv_heads * config.head_dim * length


def weight_bytes(config: BackboneConfig, dtype: str) -> int:
    """Bytes of all weights as the backbone stores them: matrices and embedding in ``dtype``, norms in float32."""
    shapes = expected_shapes(config).values()
    return sum(int(np.prod(shape)) * (ITEM_BYTES[dtype] if len(shape) > 1 else 4) for shape in shapes)


def check_memory(name: str, config: BackboneConfig, dtype: str, cache_length: int, available: int) -> None:
    """Raises ValueError if a shape with a cache does not fit into ``available`` bytes."""
    needed = BUILD_FACTOR * weight_bytes(config, dtype) + cache_bytes(config, dtype, cache_length)
    if needed > available:
        raise ValueError(
            f"shape {name} in {dtype} needs {needed / 1e9:.2f} GB of memory, {available / 1e9:.2f} GB are available; "
            "leave it out, or choose a smaller one"
        )


DRAWN_ROWS = 256  # of a random matrix, at a time


def random_weights(config: BackboneConfig, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by Hugging Face name in ``dtype``, uniform on a scale that keeps hidden states near one; norms are ones.

    Drawn some rows at a time, so that no matrix is in memory in float32.
    """
    random, tensors = np.random.default_rng(seed), {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 1:
            tensors[name] = np.ones(shape, np.float32)
            continue
        tensors[name] = np.empty(shape, dtype)
        for first in range(0, shape[0], DRAWN_ROWS):
            part = tensors[name][first : first + DRAWN_ROWS]
            part[:] = (random.random(part.shape, np.float32) - 0.5) * (12 / shape[1]) ** 0.5  # variance 1 / in
    return tensors


def build_backbone(name: str, config: BackboneConfig, dtype: str):
    """The backbone of a shape: the embedded one with its own weights, the others with random ones. For the CUDA bodies
    those are made on the device."""
    from backbone.model import Backbone, load_backbone
    from bench.clock.random_backbone import RandomBackbone
    from ops.kernel import on_cpu

    if name == TINY:
        return load_backbone(dtype=dtype)
    if not on_cpu():
        return RandomBackbone(config, dtype)
    with freed_at_once():
        return Backbone(config, random_weights(config, dtype), dtype, f"random {name}")
