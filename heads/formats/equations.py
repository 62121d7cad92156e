"""The published heads in NumPy, on tensors as their files name them. They know nothing of the conversion, so that a
name that it maps wrongly shows as other logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]


def silu(x: np.ndarray) -> np.ndarray:
    """x sigmoid(x)."""
    return x / (1 + np.exp(-x))


def count(tensors: Arrays, pattern: str) -> int:
    """How many of the names pattern.format(0), pattern.format(1), .. exist before the first that does not."""
    return next(i for i in itertools.count() if pattern.format(i) not in tensors)


def medusa(tensors: Arrays, hidden: np.ndarray, lm_head: Callable[[], np.ndarray]) -> list[np.ndarray]:
    """Medusa (arXiv 2401.10774, section 2.1): W_i (h + SiLU(A_i h + b_i)), residual blocks in a row.

    hidden: (rows, dim); lm_head: gives (vocab, dim) for files without W_i. Returns (rows, vocab) per depth.
    """
    return _medusa(tensors, hidden, "{}.{}.linear", "{}.{}.weight", lm_head)


def vllm_medusa(tensors: Arrays, hidden: np.ndarray) -> list[np.ndarray]:
    """The same networks under vLLM's names. Biases may be left out, and there may be one language-model head for
    all."""
    shared = "lm_head.weight"
    return _medusa(tensors, hidden, "blocks.{}.layers.{}", "lm_heads.{}.weight", lambda: tensors[shared])


def tensorrt_medusa(tensors: Arrays, hidden: np.ndarray) -> list[np.ndarray]:
    """The same networks under TensorRT-LLM's names."""
    return _medusa(tensors, hidden, "medusa_heads.{}.medusa_layers.{}.linear", "medusa_heads.{}.lm_head.weight")


def _medusa(
    tensors: Arrays, hidden: np.ndarray, block: str, lm: str, shared: Callable[[], np.ndarray] | None = None
) -> list[np.ndarray]:
    """block: a linear map's name by depth and layer; lm: a language-model head's by depth and number of layers; shared:
    gives the one for depths without their own."""
    logits = []
    for depth in itertools.count():
        num_layers = count(tensors, f"{block.format(depth, '{}')}.weight")
        if num_layers == 0:
            return logits
        x = hidden
        for layer in range(num_layers):
            name = block.format(depth, layer)
            y = x @ tensors[f"{name}.weight"].T
            x = x + silu(y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y)
        own = lm.format(depth, num_layers)
        logits.append(x @ (tensors[own] if own in tensors or shared is None else shared()).T)


def hydra(tensors: Arrays, hidden: np.ndarray, token_ids: np.ndarray, embedding: np.ndarray) -> list[np.ndarray]:
    """Grounded Hydra (arXiv 2402.05109, section 3): head i reads [h; e_{t+1}; .. e_{t+1+i}].

    hidden: (rows, dim), row t followed by token_ids[t + 1] ..; token_ids: (rows + heads,); embedding: (vocab, dim).
    """
    rows, x, logits = len(hidden), hidden, []
    for i in range(count(tensors, "hydra_lm_head.{}.weight")):
        x = np.concatenate([x, embedding[token_ids[1 + i : 1 + i + rows]]], 1)
        first = f"hydra_mlp.{i}.0"
        residual, new = (
            x @ tensors[f"{first}.{part}.weight"].T + tensors[f"{first}.{part}.bias"]
            for part in ("res_connection", "linear")
        )
        y, j = residual + silu(new), 1
        while f"hydra_mlp.{i}.{j}.linear.weight" in tensors:
            y = y + silu(y @ tensors[f"hydra_mlp.{i}.{j}.linear.weight"].T + tensors[f"hydra_mlp.{i}.{j}.linear.bias"])
            j += 1
        logits.append(y @ tensors[f"hydra_lm_head.{i}.weight"].T + tensors[f"hydra_lm_head.{i}.bias"])
    return logits


def eagle(
    tensors: Arrays,
    config: dict,
    hidden: np.ndarray,
    token_ids: np.ndarray,
    embedding: np.ndarray,
    lm_head: np.ndarray,
    num_depths: int,
) -> list[np.ndarray]:
    """EAGLE-1 (arXiv 2401.15077, section 4): its layer, without a norm before attention, over fc [e_{s+1}; f_s].

    hidden: (rows, dim), row t followed by token_ids[t + 1] ..; token_ids: (rows + num_depths,); embedding, lm_head:
    (vocab, dim). Returns (rows, vocab) per depth.
    """

    def layer(features, embedded):
        x = np.concatenate([embedded, features], 1) @ tensors["fc.weight"].T + tensors.get("fc.bias", 0)
        return llama_layer(tensors, config, "layers.0.", x, x)

    return unrolled(layer, lambda y: lm_head @ y, hidden, token_ids, embedding, num_depths)


def eagle3(
    tensors: Arrays,
    config: dict,
    name: str,
    fused: np.ndarray,
    token_ids: np.ndarray,
    embedding: np.ndarray,
    num_depths: int,
) -> list[np.ndarray]:
    """EAGLE-3 (arXiv 2503.01840, section 3): its layer over [norm(e_{s+1}); norm(g_s)], g = fc [l; m; h], with g itself
    as the residual.

    config: of the layer; name: the prefix of its tensors; fused: (rows, 3 dim), the hidden states of the three layers.
    Returns (rows, draft vocabulary) per depth.
    """
    eps = config["rms_norm_eps"]

    def layer(features, embedded):
        e = rms_norm(embedded, tensors[f"{name}input_layernorm.weight"], eps)
        g = rms_norm(features, tensors[f"{name}hidden_norm.weight"], eps)
        return llama_layer(tensors, config, name, features, np.concatenate([e, g], 1))

    def logits(y):
        return tensors["lm_head.weight"] @ rms_norm(y, tensors["norm.weight"], eps)

    return unrolled(layer, logits, fused @ tensors["fc.weight"].T, token_ids, embedding, num_depths)


def unrolled(
    layer: Callable, logits_of: Callable, hidden: np.ndarray, token_ids: np.ndarray, embedding: np.ndarray, depths: int
) -> list[np.ndarray]:
    """A draft after every row t: the layer over the pairs (f_s, e_{s+1}) of the text up to t, then over its own outputs
    and the tokens that follow.

    layer(features, embedded): two of (rows, dim) -> (rows, dim); logits_of: (dim,) -> (vocab,). Returns (rows, vocab)
    per depth.
    """
    logits: list[list[np.ndarray]] = [[] for _ in range(depths)]
    for t in range(len(hidden)):
        features = list(hidden[: t + 1])
        for depth in range(depths):
            outputs = layer(np.stack(features), embedding[token_ids[1 : len(features) + 1]])
            features.append(outputs[-1])
            logits[depth].append(logits_of(outputs[-1]))
    return [np.stack(rows) for rows in logits]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm of the last axis."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def llama_layer(tensors: Arrays, config: dict, name: str, residual: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A Llama layer. name: the prefix of its tensors; residual: (rows, dim); x: (rows, in), what attention reads.
    Returns (rows, dim)."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    q, k, v = (x @ tensors[f"{name}self_attn.{part}_proj.weight"].T for part in "qkv")
    q, k, v = (y.reshape(len(x), n, -1) for y, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    q, k = rotated(q, config), rotated(k, config)
    k, v = (np.repeat(y, heads // kv_heads, axis=1) for y in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones((len(x), len(x)), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    attended = np.einsum("hij,jhd->ihd", weights, v).reshape(len(x), -1)
    h = residual + attended @ tensors[f"{name}self_attn.o_proj.weight"].T
    normed = rms_norm(h, tensors[f"{name}post_attention_layernorm.weight"], config["rms_norm_eps"])
    gate, up = (normed @ tensors[f"{name}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
    return h + (silu(gate) * up) @ tensors[f"{name}mlp.down_proj.weight"].T


def rotated(x: np.ndarray, config: dict) -> np.ndarray:
    """x, (rows, heads, head_dim), rotated by positions 0, 1, .. in the pairing of Hugging Face's Llama."""
    half = x.shape[-1] // 2
    frequencies = config.get("rope_theta", 10000.0) ** (-np.arange(half) / half)
    scaling = config.get("rope_scaling") or {}
    slowed = frequencies / scaling.get("factor", 1.0)
    if scaling.get("rope_type") == "llama3":  # turns within the original length: few are slowed, many are left
        turns = frequencies * scaling["original_max_position_embeddings"] / (2 * np.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        left = np.clip((turns - low) / (high - low), 0, 1)
        slowed = left * frequencies + (1 - left) * slowed
    angles = np.arange(len(x))[:, None, None] * slowed
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], -1
    )
