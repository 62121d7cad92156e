"""EAGLE-1's own files (arXiv 2401.15077): one Llama layer after ``fc``, with the config of a Llama of one layer.

Equation by equation:

    EAGLE-1                                          ours
    x_t = fc [e_{t+1}; f_t]                          join, the same order
    h = x + o attention(rope(q x), rope(k x), v x)   block, but reads n(x) with attention_norm
    f' = h + down(SiLU(gate m(h)) * up m(h))         the same, m = post_attention_layernorm = mlp_norm
    logits = LM(f')                                  the same; positions count pairs from 0 in both

k and v are the upper and lower half of our kv, gate and up those of gate_up. Files correspond to heads without
attention_norm. Sizes and rotary embedding are the backbone's.

**The bias of fc.** EAGLE's own code has one where config.json says ``bias``. vLLM's fc has none, and it reads the same
key as biases of attention, which it then never loads. So ``bias`` is false in what is written, and the embedding, which
the file carries anyway, does the bias's work: with W_e the columns of fc that read it, e + d in place of every e, where
W_e d = b. ``folded_fc_bias`` of config.json keeps b itself.
"""

from __future__ import annotations

import numpy as np

from backbone.config import BackboneConfig, parse_config
from backbone.files.lazy import LazyTensor, in_memory
from heads.formats import equations
from heads.formats.contents import FLOAT32, HeadWeights, Piece, Target, expect, gather, zeros
from heads.formats.files import MODEL_BIN, MODEL_SAFETENSORS
from heads.formats.own import default_options, imported_from
from heads.formats.published import Float64, PublishedFormat, exact

HEAD = "eagle"
NORM = "attention_norm"  # our option; false leaves the input of attention as it is
EMBEDDING, BIAS, FOLDED = "embed_tokens.weight", "fc.bias", "folded_fc_bias"
LAYER = "layers.0."
HIDDEN_NORM = "hidden_norm.weight"  # of EAGLE-3's layer
# Gap between 1 and the next number; np.finfo warns where subnormal numbers are flushed to zero.
EPSILONS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
PLAIN, LINEAR, LLAMA3 = None, "linear", "llama3"  # rope scalings
# Depth 0 reads only the text, depth 1 the head's own output too. Deeper ones repeat that step: they would add nothing
# but rounding errors.
COMPARED_DEPTHS = 2
# Our layer takes these from the backbone, so a file must agree.
SAME = ("hidden_size", "vocab_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "rms_norm_eps",
        "rope_theta", "rope_scaling")  # fmt: skip


class Eagle(PublishedFormat):
    name, sentence = "eagle", "EAGLE-1's own pytorch_model.bin or model.safetensors with a one-layer Llama config"
    head, files = HEAD, (MODEL_BIN, MODEL_SAFETENSORS)
    scalings = (PLAIN, LINEAR)  # that EAGLE-1's code has

    def recognize(self, found):
        names = found.tensors.keys()
        return {"fc.weight", f"{LAYER}self_attn.q_proj.weight"} <= names and LAYER + HIDDEN_NORM not in names

    def table(self, options, sizes):
        dim = sizes.hidden_size
        return [Piece("fc.weight", "join.weight", (dim, 2 * dim)), *layer_table(LAYER, sizes, dim)]

    def elsewhere(self, options, sizes):
        return [Piece(BIAS, "join.bias", (sizes.hidden_size,))]

    def read(self, found, target):
        tensors, notes = dict(found.tensors), list(found.notes)
        if "fc.weight" not in tensors:
            raise ValueError(f"{found.file} holds no fc.weight: it is not EAGLE-1's")
        target.check_sizes(found.file, tensors["fc.weight"].num_rows, None)
        check_layer_config(found, found.config, target, self.scalings)
        options = default_options(HEAD, **{NORM: False})
        notes.append(f"EAGLE-1 has no fixed depth: num_depths is {options['num_depths']}, our default")
        pieces, [bias], absent = self.table(options, target.config), self.elsewhere(options, target.config), {}
        if found.config.get("bias") in (None, True):  # null decides nothing: EAGLE-1 has one by default
            pieces.append(bias)
        elif FOLDED in found.config:
            absent[bias.ours] = unfolded_bias(found, tensors.pop(EMBEDDING, None), target)
        else:
            absent[bias.ours] = zeros(bias.shape)
        if EMBEDDING in tensors:
            target.check_same(found.file, EMBEDDING, tensors.pop(EMBEDDING), target.embedding)
        expect(found.file, tensors, {piece.theirs: piece.shape for piece in pieces})
        ours = gather(pieces, tensors) | absent
        return HeadWeights(HEAD, options, ours, imported_from(self.name, found, notes), notes=notes)

    def check_holds(self, weights):
        if weights.options.get(NORM, True):
            raise ValueError(
                "this head norms attention's input (norm.weight), EAGLE-1's layer does not: cannot be written"
            )

    def extras(self, weights, target):
        target.check_belongs(weights)
        return {EMBEDDING: folded_embedding(weights, target)}

    def config(self, weights, dtype, target):
        c = target.config
        if c.head_dim * c.num_heads != c.hidden_size:
            raise ValueError(
                f"EAGLE-1's attention heads add up to the width {c.hidden_size}; {c.num_heads} of {c.head_dim} do not"
            )
        bias = weights.tensors["join.bias"].read()
        folded = {FOLDED: [float(number) for number in bias]} if bias.any() else {}
        return {**layer_config(target, dtype, self.scalings), "bias": False, **folded}

    def logits(self, found, target, inputs):
        c, tensors = target.config, dict(Float64(found.tensors))  # read once: every position uses all of them
        drawn = inputs.of(c.hidden_size, c.vocab_size, COMPARED_DEPTHS)
        embedding = tensors[EMBEDDING] if EMBEDDING in tensors else exact(target.embedding)
        hidden, lm_head = drawn.hidden.astype(np.float64), exact(target.lm_head)
        rotary = parse_config(found.config)  # whichever spelling the file has
        config = {**found.config, "rope_theta": rotary.rope_theta, "rope_scaling": rotary.rope_scaling}
        return equations.eagle(tensors, config, hidden, drawn.token_ids, embedding, lm_head, COMPARED_DEPTHS)


# The bias in the embedding -------------------------------------------------------------------------------------------


def folded_embedding(weights: HeadWeights, target: Target) -> LazyTensor:
    """The backbone's embedding plus d, (vocab, dim) float32; as it is for a bias of zeros.

    Raises ValueError where fc's columns of the embedding do not span the bias.
    """
    bias, embedding = exact(weights.tensors["join.bias"]), target.embedding
    if not bias.any():
        return embedding
    reads = exact(weights.tensors["join.weight"])[:, : len(bias)]
    shift = np.linalg.lstsq(reads, bias, rcond=None)[0]
    if not np.abs(reads @ shift - bias).max() <= 1e-6 * np.abs(bias).max():  # true for nan
        raise ValueError(
            "the bias of this head (join.bias) is outside what its join.weight makes of embeddings, so that it cannot "
            "be written as part of them; vLLM's EAGLE-1 has no other place for it"
        )
    weights.notes.append(
        "vLLM's EAGLE-1 has no bias in fc: ours is written as a part of embed_tokens; a server that takes the "
        "backbone's embedding instead drafts without it"
    )

    def read_rows(start: int, stop: int) -> np.ndarray:
        return (embedding.read_rows(start, stop).astype(np.float64) + shift).astype(np.float32)

    return LazyTensor(FLOAT32, embedding.shape, read_rows)


def unfolded_bias(found, embedding: LazyTensor | None, target: Target) -> LazyTensor:
    """The bias that an embedding in a file carries, (dim,) float32.

    Raises ValueError for an embedding that is not the backbone's plus one row, and for a row that is not the bias's.
    """
    where, given = found.file.with_name("config.json"), found.config[FOLDED]
    own = target.embedding
    numbers = isinstance(given, list) and all(isinstance(number, float) for number in given)
    found_one = embedding is not None and embedding.shape == own.shape and str(embedding.dtype) in EPSILONS
    if not numbers or len(given) != own.shape[1] or not found_one:
        raise ValueError(
            f"{where}: {FOLDED} is for an {EMBEDDING} of shape {own.shape} and has {own.shape[1]} numbers; one of them "
            "is missing or of another kind"
        )

    def shifts():
        for rows in own.stretches():
            theirs = embedding.read_rows(*rows).astype(np.float64)
            yield theirs, theirs - own.read_rows(*rows).astype(np.float64)

    shift = sum(each.sum(0) for _, each in shifts()) / own.num_rows
    largest = max(np.abs(theirs).max() for theirs, _ in shifts())
    apart = max(np.abs(each - shift).max() for _, each in shifts())
    rounding = EPSILONS[str(embedding.dtype)] * largest
    if not apart <= rounding:  # true for nan
        raise ValueError(
            f"{found.file}: {EMBEDDING} is not that of {target} plus a bias; pass --backbone with the right one"
        )
    bias = np.array(given, np.float32)
    weight = exact(found.tensors["fc.weight"])[:, : len(bias)]
    rounded = 0.1 * np.abs(bias).max() + np.abs(weight).sum(1) * rounding  # of both sides, and of the embedding
    if not np.all(np.abs(weight @ shift - bias) <= rounded):  # true for nan
        raise ValueError(f"{where}: {FOLDED} is not the bias that {EMBEDDING} carries; correct one")
    return in_memory(bias)


# The Llama layer, which EAGLE-3 has too ------------------------------------------------------------------------------


def layer_table(layer: str, sizes: BackboneConfig, num_in: int) -> list[Piece]:
    """The pieces of a decoder layer whose attention reads rows of ``num_in``. layer: the prefix of its names."""
    c = sizes
    dim, inner, queries, keys = (
        c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    )  # fmt: skip
    attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
    return [
        Piece(f"{attention}q_proj.weight", "block.q.weight", (queries, num_in)),
        Piece(f"{attention}k_proj.weight", "block.kv.weight", (keys, num_in)),
        Piece(f"{attention}v_proj.weight", "block.kv.weight", (keys, num_in), keys),
        Piece(f"{attention}o_proj.weight", "block.o.weight", (dim, queries)),
        Piece(f"{layer}post_attention_layernorm.weight", "block.mlp_norm.weight", (dim,)),
        Piece(f"{mlp}gate_proj.weight", "block.gate_up.weight", (inner, dim)),
        Piece(f"{mlp}up_proj.weight", "block.gate_up.weight", (inner, dim), inner),
        Piece(f"{mlp}down_proj.weight", "block.down.weight", (dim, inner)),
    ]


def layer_config(target: Target, dtype: np.dtype, scalings: tuple) -> dict:
    """The config of a Llama of one layer with the backbone's sizes."""
    c = target.config
    scaling = scaling_of(c, str(target), scalings)
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
        "head_dim": c.head_dim,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        # EAGLE's own code takes a scaling of two fields, by this name of the kind.
        "rope_scaling": {"type": LINEAR, "factor": c.rope_scaling["factor"]} if scaling == LINEAR else c.rope_scaling,
        "max_position_embeddings": c.max_positions,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "bos_token_id": c.bos_id,
        "eos_token_id": list(c.eos_ids),
        "pad_token_id": None,
        "torch_dtype": str(dtype),
    }


def check_layer_config(found, config: dict, target: Target, scalings: tuple) -> None:
    """Raises ValueError naming where the config of a file's layer contradicts the backbone, whose sizes ours has."""
    where = found.file.with_name("config.json")
    if not config:
        raise ValueError(f"{where} is missing; it has the number of attention heads and the rotary embedding")
    theirs, own = parse_config(config, None, str(where)), target.config
    wrong = [f"{key} {getattr(theirs, key)} (backbone: {getattr(own, key)})" for key in SAME
             if getattr(theirs, key) != getattr(own, key)]  # fmt: skip
    if config.get("qkv_bias"):
        wrong.append("qkv_bias true (ours has none)")
    if theirs.num_layers != 1:
        wrong.append(f"{theirs.num_layers} layers (ours has 1)")
    if wrong:
        raise ValueError(f"{where} does not fit {target}: {', '.join(wrong)}; pass --backbone with the right one")
    scaling_of(theirs, str(where), scalings)


def scaling_of(config: BackboneConfig, where: str, known: tuple) -> str | None:
    """The kind of rope scaling. Raises ValueError for one that is not among the known ones."""
    kind = (config.rope_scaling or {}).get("rope_type")
    if kind not in known:
        raise ValueError(f"{where}: rope scaling {kind} is unknown to the code that reads this format")
    return kind
