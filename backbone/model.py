"""The frozen Llama: token ids in, last hidden states and logits out, over a preallocated key-value cache."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from backbone.cache import KVCache
from backbone.config import BackboneConfig, read_config, rope_inverse_frequencies
from backbone.weights import Fingerprint, check_names, expected_shapes, read_backbone
from ops.decoder_pass import Decoder, decoder_pass
from ops.layer_weights import LayerShape, LayerWeights
from ops.linear import PackedLinear
from ops.packing.quantize import QUANTIZERS
from ops.row_plan import RowPlan
from ops.select import argmax
from runtime import jt
from runtime.memory import freed_at_once
from runtime.types import Var

EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "tiny-vicuna"
DTYPES = ("float16", "float32")


@dataclass
class BackboneOutput:
    """The result of a pass. hidden: (batch, rows, dim) float32, after the final norm. logits: (batch, rows, vocab)
    float32, (batch, 1, vocab) when only the last row's were requested, or None. layers: hidden states by layer index,
    (batch, rows, dim), before any norm; index 0 is the embedding, index i the output of layer i. chosen: (batch, rows)
    or (batch, 1) int32, the argmax of each row of logits, the first of equals; None without logits."""

    hidden: Var
    logits: Var | None
    layers: dict[int, Var] = field(default_factory=dict)
    chosen: Var | None = None


class Backbone:
    """A frozen Llama with weights in float16 or float32; sums are in float32. On CUDA, factors of products with weights
    other than float32, and with a float16 cache, are rounded to float16 first; on the CPU nothing is.

    storage: how the layers' matrices are stored, and so what a pass computes: in the dtype, as ``int8`` with a scale
    per output, or as ``nf4``, 4 bits with a scale per 64 inputs of an output (``ops.packing.quantize``). Embedding,
    language-model head, norms and cache are always in the dtype. A quantized backbone is another model with the same
    ``fingerprint``, which names the weights as they were read.

    A row's hidden state and logits are bitwise the same whatever other rows the pass has, and whether its ancestors are
    in this pass or in the cache.
    """

    def __init__(
        self, config: BackboneConfig, tensors: dict[str, np.ndarray], dtype="float16", path=None, storage=None
    ):
        """tensors: by Hugging Face name, consumed one by one. storage: the dtype, int8 or nf4; None for the dtype.

        Raises ValueError for weights that do not fit.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if storage not in (None, dtype, *QUANTIZERS):
            raise ValueError(f"storage must be one of {', '.join([dtype, *QUANTIZERS])}, got {storage!r}")
        check_names({name: t.shape for name, t in tensors.items()}, expected_shapes(config))
        self.config, self.dtype, self.path = config, dtype, str(path) if path else None
        self.storage = storage or dtype
        fingerprint = Fingerprint(config)
        for name in sorted(tensors):
            fingerprint.add(name, tensors[name])
        self.fingerprint = fingerprint.hexdigest()
        self._load(tensors)
        self._begin_rotary()

    def _begin_rotary(self) -> None:
        self._frequencies = rope_inverse_frequencies(self.config)
        self._rope_length, self._cosine, self._sine = 0, None, None

    def _load(self, tensors: dict[str, np.ndarray]) -> None:
        def take(name: str) -> np.ndarray:
            cast = tensors.pop(name).astype(self.dtype, copy=False)
            if not np.isfinite(cast).all():
                raise ValueError(f"{name} is not finite in {self.dtype}; load it with dtype float32, or check the file")
            return cast

        c = self.config
        shape = LayerShape(c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size, c.rms_norm_eps)
        # The largest first, and without a name: two copies of one matrix at a time, never three.
        self.embedding = jt.array(take("model.embed_tokens.weight")).stop_grad()
        self.embedding.sync()
        self.norm = jt.array(take("model.norm.weight").astype(np.float32)).stop_grad()
        if c.tie_embeddings:
            tensors.pop("lm_head.weight", None)
        self.lm_head = PackedLinear(self.embedding.numpy() if c.tie_embeddings else take("lm_head.weight"))
        self.blocks = []
        for i in range(c.num_layers):
            prefix = f"model.layers.{i}."
            parts = {
                "norm1": "input_layernorm",
                **{n: f"self_attn.{n}_proj" for n in "qkvo"},
                "norm2": "post_attention_layernorm",
                **{n: f"mlp.{n}_proj" for n in ("gate", "up", "down")},
            }
            weights = {k: take(f"{prefix}{v}.weight") for k, v in parts.items()}
            self.blocks.append(LayerWeights(shape, **weights, storage=self.storage))

    @functools.cached_property
    def lm_head_weight(self):
        """(vocab, dim) float32: what a training graph through the language-model head multiplies with.

        Made on first use, because decoding needs no second copy of the matrix; its numbers are those of the packed one.
        """
        weight = self.lm_head.float32().stop_grad()
        weight.sync()
        return weight

    @property
    def quantized(self) -> bool:
        """Whether the layers' matrices are stored in fewer bits than the dtype's."""
        return self.storage in QUANTIZERS

    @property
    def decoder(self) -> Decoder:
        """What a pass computes with."""
        return Decoder(self.blocks, self.embedding, self.norm, self.lm_head)

    def new_cache(self, max_length: int) -> KVCache:
        """An empty cache for one sequence of up to ``max_length`` rows. ValueError past the trained positions."""
        if max_length > self.config.max_positions:
            raise ValueError(
                f"a cache of {max_length} rows exceeds the {self.config.max_positions} positions of the backbone"
            )
        return self._make_cache(max_length)

    def _make_cache(self, max_length: int) -> KVCache:
        return KVCache(self.config, max_length, self.dtype)

    def adapted(self, changes: dict[tuple[int, str], np.ndarray], name: str) -> Backbone:
        """This backbone with changes added to some of its matrices, in its dtype; everything else is shared. All
        layers of a quantized one are then in its dtype: what was added would not survive another rounding.

        changes: (layer, "q" | "k" | "v" | "o" | "gate" | "up" | "down") -> (out, in) float32. name: a suffix of the
        result's fingerprint. Raises ValueError for a sum that the dtype cannot hold.
        """
        other = copy.copy(self)
        other.fingerprint, other.blocks, other.storage = f"{self.fingerprint}+{name}", list(self.blocks), self.dtype
        touched = range(len(self.blocks)) if self.quantized else sorted({layer for layer, _ in changes})
        for layer in touched:
            block, matrices = self.blocks[layer], {}
            for part, matrix in block.frozen().items():
                total = matrix.float32().numpy()
                if (layer, part) in changes:
                    total = total + changes[layer, part]
                matrices[part] = total.astype(self.dtype)
                if not np.isfinite(matrices[part]).all():
                    raise ValueError(f"{part} of layer {layer} with its change is not finite in {self.dtype}")
            norms = {"norm1": block.norm1.numpy(), "norm2": block.norm2.numpy()}
            other.blocks[layer] = LayerWeights(block.shape, **norms, **matrices)
        return other

    def rotary_tables(self, length: int):
        """cos and sin of position * frequency, (at least length, head_dim / 2) float32."""
        if length > self._rope_length:
            self._rope_length = max(512, 1 << (length - 1).bit_length())
            angles = np.arange(self._rope_length, dtype=np.float32)[:, None] * self._frequencies[None]
            self._cosine, self._sine = jt.array(np.cos(angles)), jt.array(np.sin(angles))
        return self._cosine, self._sine

    def embed(self, token_ids):
        """Rows of the frozen embedding. token_ids: any shape, int32 -> (..., dim) float32."""
        return self.embedding[token_ids].float32()

    def lm_logits(self, hidden):
        """The frozen language-model head. hidden: (..., dim) float32 -> (..., vocab) float32; row-invariant."""
        shape = tuple(hidden.shape)
        return self.lm_head(hidden.reshape(-1, shape[-1])).reshape(*shape[:-1], self.config.vocab_size)

    def forward(self, token_ids, positions=None, cache=None, attend=None, layers=(), logits="all") -> BackboneOutput:
        """One pass over ``rows`` rows.

        token_ids: (batch, rows) int32, NumPy array or Var. Without a cache every sequence of the batch is causal from
        position 0; with one the batch is 1 and the rows are written after ``cache.length``; call ``cache.commit``
        afterwards. attend: (rows,) int32, the earlier row of this pass that this row follows, -1 for none: it sees that
        row's ancestors; or a RowPlan made once; default: each row follows the one before it. positions: (rows,) int32,
        absolute; default from ``attend``. layers: indices of hidden states to return. logits: "all", "last" or None.

        Raises ValueError for misshapen arguments, CacheFull when the rows do not fit.
        """
        batch, rows = token_ids.shape
        base = cache.length if cache is not None else 0
        if cache is not None and batch != 1:
            raise ValueError(f"a pass over a cache takes a batch of 1, got {batch}")
        if isinstance(attend, RowPlan):
            plan = attend
        elif attend is not None:
            plan = RowPlan(attend, None if positions is None else np.asarray(positions) - base)
        elif positions is not None:
            plan = RowPlan(np.arange(rows) - 1, np.asarray(positions) - base)
        else:
            plan = RowPlan.chain(rows) if batch == 1 else RowPlan.sequences([rows] * batch)
        if plan.num_rows != batch * rows:
            raise ValueError(f"attend covers {plan.num_rows} rows, the tokens {batch * rows}")
        c = self.config
        if base + plan.max_position >= c.max_positions:
            raise ValueError(f"position {base + plan.max_position} exceeds the {c.max_positions} of the backbone")
        unknown = set(layers) - set(range(c.num_layers + 1))
        if unknown:
            raise ValueError(f"the backbone has layers 0 to {c.num_layers}, got {sorted(unknown)}")
        if logits not in ("all", "last", None):
            raise ValueError(f"logits must be 'all', 'last' or None, got {logits!r}")
        if cache is not None:
            cache.reserve(rows)
        return self._run(token_ids, plan, cache, layers, logits)

    def _single_layer(self) -> BackboneConfig:
        """A pass without a cache needs one layer's keys at a time: all layers share one plane."""
        return replace(self.config, num_layers=1)

    def _run(self, token_ids, plan, cache, layers, logits) -> BackboneOutput:
        batch, rows = token_ids.shape
        c = self.config
        base = cache.length if cache is not None else 0
        data = (cache or KVCache(self._single_layer(), batch * rows, self.dtype)).data
        cosine, sine = self.rotary_tables(base + plan.max_position + 1)
        ids = token_ids if isinstance(token_ids, jt.Var) else jt.array(np.asarray(token_ids, np.int32))
        scored = 0 if logits is None else batch * rows if logits == "all" else 1 if batch == 1 else 0
        wanted = tuple(sorted(set(layers)))
        out = decoder_pass(self.decoder, ids.reshape(-1), plan, cosine, sine, data, base, wanted, scored)
        if cache is not None:
            cache.written_by(out.hidden)
        hidden = out.hidden.reshape(batch, rows, c.hidden_size)
        scores, chosen = out.logits, out.chosen
        if scored:
            scores, chosen = scores.reshape(batch, -1, c.vocab_size), chosen.reshape(batch, -1)
        elif logits:
            scores = self.lm_logits(hidden[:, rows - 1 : rows])
            chosen = argmax(scores.reshape(batch, c.vocab_size)).reshape(batch, 1)
        taken = {i: out.taken[place].reshape(batch, rows, c.hidden_size) for place, i in enumerate(wanted)}
        return BackboneOutput(hidden, scores, taken, chosen)


def load_backbone(
    path=None, dtype: str = "float16", load_in_8bit: bool = False, load_in_4bit: bool = False
) -> Backbone:
    """Read a Hugging Face directory (config.json with *.safetensors or *.bin), a Meta directory (params.json with
    consolidated.*.pth) or a .pkl of ours; None: the embedded tiny-vicuna.
    load_in_8bit, load_in_4bit: store the layers' matrices as int8 or nf4.

    Raises ValueError for a directory without a model, for missing, extra or misshapen weights (each named), for an
    architecture this model does not compute, and for 8 and 4 bits at once.
    """
    if load_in_8bit and load_in_4bit:
        raise ValueError("load_in_8bit and load_in_4bit are both set; choose one of them")
    storage = "int8" if load_in_8bit else "nf4" if load_in_4bit else None
    directory = Path(path) if path else EMBEDDED
    config = read_config(directory)
    with freed_at_once():
        return Backbone(config, dict(read_backbone(directory, config)), dtype, path, storage)
