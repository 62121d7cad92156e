"""EAGLE-1's own files (arXiv 2401.15077): one Llama layer after ``fc``, with the config of a Llama of one layer.

Equation by equation:

    EAGLE-1                                          ours
    x_t = fc [e_{t+1}; f_t]                          join, the same order
    h = x + o attention(rope(q x), rope(k x), v x)   block, but reads n(x) with attention_norm
    f' = h + down(SiLU(gate m(h)) * up m(h))         the same, m = post_attention_layernorm = mlp_norm
    logits = LM(f')                                  the same; positions count pairs from 0 in both

k and v are the upper and lower half of our kv, gate and up those of gate_up. Files correspond to heads without
attention_norm. Sizes and rotary embedding are the backbone's.
"""

from __future__ import annotations

import numpy as np

from backbone.config import BackboneConfig, parse_config
from heads.formats import equations
from heads.formats.contents import HeadWeights, Piece, expect, gather, zeros
from heads.formats.files import MODEL_BIN, MODEL_SAFETENSORS
from heads.formats.own import default_options, imported_from
from heads.formats.published import Float64, PublishedFormat, exact

HEAD = "eagle"
NORM = "attention_norm"  # our option; false leaves the input of attention as it is
EMBEDDING, BIAS = "embed_tokens.weight", "fc.bias"
LAYER = "layers.0."
PLAIN, LINEAR = None, "linear"  # rope scalings of EAGLE-1's code
# Depth 0 reads only the text, depth 1 the head's own output too. Deeper ones repeat that step: they would add nothing
# but rounding errors.
COMPARED_DEPTHS = 2
# Our layer takes these from the backbone, so a file must agree.
SAME = ("hidden_size", "vocab_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "rms_norm_eps",
        "rope_theta", "rope_scaling")  # fmt: skip


class Eagle(PublishedFormat):
    name, sentence = "eagle", "EAGLE-1's own pytorch_model.bin or model.safetensors with a one-layer Llama config"
    head, files = HEAD, (MODEL_BIN, MODEL_SAFETENSORS)

    def recognize(self, found):
        return {"fc.weight", f"{LAYER}self_attn.q_proj.weight"} <= found.tensors.keys()

    def table(self, options, sizes):
        c = sizes
        dim, inner, queries, keys = (
            c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        )  # fmt: skip
        attention, mlp = f"{LAYER}self_attn.", f"{LAYER}mlp."
        return [
            Piece("fc.weight", "join.weight", (dim, 2 * dim)),
            Piece(BIAS, "join.bias", (dim,)),
            Piece(f"{attention}q_proj.weight", "block.q.weight", (queries, dim)),
            Piece(f"{attention}k_proj.weight", "block.kv.weight", (keys, dim)),
            Piece(f"{attention}v_proj.weight", "block.kv.weight", (keys, dim), keys),
            Piece(f"{attention}o_proj.weight", "block.o.weight", (dim, queries)),
            Piece(f"{LAYER}post_attention_layernorm.weight", "block.mlp_norm.weight", (dim,)),
            Piece(f"{mlp}gate_proj.weight", "block.gate_up.weight", (inner, dim)),
            Piece(f"{mlp}up_proj.weight", "block.gate_up.weight", (inner, dim), inner),
            Piece(f"{mlp}down_proj.weight", "block.down.weight", (dim, inner)),
        ]

    def read(self, found, target):
        tensors, notes = dict(found.tensors), list(found.notes)
        if "fc.weight" not in tensors:
            raise ValueError(f"{found.file} holds no fc.weight: it is not EAGLE-1's")
        target.check_sizes(found.file, tensors["fc.weight"].num_rows, None)
        self._check_config(found, target)
        if EMBEDDING in tensors:
            target.check_same(found.file, EMBEDDING, tensors.pop(EMBEDDING), target.embedding)
        options = default_options(HEAD, **{NORM: False})
        notes.append(f"EAGLE-1 has no fixed depth: num_depths is {options['num_depths']}, our default")
        pieces, absent = self.table(options, target.config), []
        if found.config.get("bias") not in (None, True):  # null decides nothing: EAGLE-1 has one by default
            absent = [piece for piece in pieces if piece.theirs == BIAS]
            pieces = [piece for piece in pieces if piece.theirs != BIAS]
        expect(found.file, tensors, {piece.theirs: piece.shape for piece in pieces})
        ours = gather(pieces, tensors) | {piece.ours: zeros(piece.shape) for piece in absent}
        return HeadWeights(HEAD, options, ours, imported_from(self.name, found, notes), notes=notes)

    def _check_config(self, found, target) -> None:
        """Raises ValueError naming where config.json contradicts the backbone, whose sizes our layer has."""
        where = found.file.with_name("config.json")
        if not found.config:
            raise ValueError(f"{where} is missing; it has the number of attention heads and the rotary embedding")
        theirs, own = parse_config(found.config, None, str(where)), target.config
        wrong = [f"{key} {getattr(theirs, key)} (backbone: {getattr(own, key)})" for key in SAME
                 if getattr(theirs, key) != getattr(own, key)]  # fmt: skip
        if found.config.get("qkv_bias"):
            wrong.append("qkv_bias true (ours has none)")
        if theirs.num_layers != 1:
            wrong.append(f"{theirs.num_layers} layers (ours has 1)")
        if wrong:
            raise ValueError(f"{where} does not fit {target}: {', '.join(wrong)}; pass --backbone with the right one")
        scaling_of(theirs, str(where))

    def check_holds(self, weights):
        if weights.options.get(NORM, True):
            raise ValueError(
                "this head norms attention's input (norm.weight), EAGLE-1's layer does not: cannot be written"
            )

    def extras(self, weights, target):
        target.check_belongs(weights)
        return {EMBEDDING: target.embedding}

    def config(self, weights, dtype, target):
        c = target.config
        if c.head_dim * c.num_heads != c.hidden_size:
            raise ValueError(
                f"EAGLE-1's attention heads add up to the width {c.hidden_size}; {c.num_heads} of {c.head_dim} do not"
            )
        scaling = scaling_of(c, str(target))
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": c.hidden_size,
            "intermediate_size": c.intermediate_size,
            "vocab_size": c.vocab_size,
            "num_hidden_layers": 1,
            "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.num_kv_heads,
            "rms_norm_eps": c.rms_norm_eps,
            "rope_theta": c.rope_theta,
            "rope_scaling": None if scaling is PLAIN else {"type": scaling, "factor": c.rope_scaling["factor"]},
            "max_position_embeddings": c.max_positions,
            "pretraining_tp": 1,
            "tie_word_embeddings": False,
            "bos_token_id": c.bos_id,
            "eos_token_id": list(c.eos_ids),
            "pad_token_id": None,
            "bias": True,
            "torch_dtype": str(dtype),
        }

    def logits(self, found, target, inputs):
        c, tensors = target.config, dict(Float64(found.tensors))  # read once: every position uses all of them
        drawn = inputs.of(c.hidden_size, c.vocab_size, COMPARED_DEPTHS)
        ends = exact(target.embedding), exact(target.lm_head)
        hidden = drawn.hidden.astype(np.float64)
        rotary = parse_config(found.config)  # whichever spelling the file has
        config = {**found.config, "rope_theta": rotary.rope_theta, "rope_scaling": rotary.rope_scaling}
        return equations.eagle(tensors, config, hidden, drawn.token_ids, *ends, COMPARED_DEPTHS)


def scaling_of(config: BackboneConfig, where: str) -> str | None:
    """The kind of rope scaling. Raises ValueError for one that EAGLE-1's code does not have."""
    kind = (config.rope_scaling or {}).get("rope_type")
    if kind not in (PLAIN, LINEAR):
        raise ValueError(f"{where}: rope scaling {kind} is unknown to EAGLE-1's code")
    return kind
