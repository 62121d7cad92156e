"""EAGLE-3 (arXiv 2503.01840) under two names: its own files, which vLLM reads, and those of the speculators library.

    theirs                                    ours
    fc [l; m; h]                              fuse
    input_layernorm of e, hidden_norm of g    token_norm, feature_norm; the residual is g before its norm
    the layer, post_attention_layernorm       block, mlp_norm
    lm_head norm(y)                           the same, over the draft vocabulary
    d2t[i] + i; t2d                           drafted[i]; the tokens that are drafted, as a mask

The layer is ``midlayer.`` in EAGLE-3's own files and ``layers.0.`` in those of speculators, which also carry the
backbone's embedding. d2t and t2d are left out where every token is drafted: vLLM then has no place for them.
"""

from __future__ import annotations

import abc
from typing import ClassVar

import numpy as np

from backbone.files.lazy import LazyTensor, in_memory
from heads.formats import equations
from heads.formats.contents import HeadWeights, Piece, expect, gather
from heads.formats.eagle import (
    COMPARED_DEPTHS,
    EMBEDDING,
    HIDDEN_NORM,
    LAYER,
    LINEAR,
    LLAMA3,
    PLAIN,
    check_layer_config,
    layer_config,
    layer_table,
)
from heads.formats.files import MODEL_BIN, MODEL_SAFETENSORS, Found
from heads.formats.own import default_options, imported_from
from heads.formats.published import Float64, PublishedFormat, base_model, exact, original_config
from heads.fused_layers import fused_layers
from runtime.files.shown import shown

HEAD = "eagle3"
D2T, T2D = "d2t", "t2d"
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
METHOD = "eagle3"  # speculators' name of the architecture, and vLLM's of the method
SCALINGS = (PLAIN, LINEAR, LLAMA3)
# Switches of other variants of the layer, and the value under which it is ours. vLLM looks for them here or there.
SWITCHES = {"norm_before_fc": False, "fc_norm": False, "norm_output": False, "use_aux_hidden_state": True}


class Eagle3Format(PublishedFormat):
    """layer: the prefix of the layer's names; before_residual: what a missing norm_before_residual means."""

    head = HEAD
    integers = ("drafted",)
    layer: ClassVar[str]
    before_residual: ClassVar[bool] = False

    @abc.abstractmethod
    def layer_part(self, found: Found) -> dict:
        """The part of config.json that describes the decoder layer."""

    @abc.abstractmethod
    def num_depths(self, config: dict) -> tuple[int | None, str]:
        """Tokens to draft, None where the file does not say, and a note on it."""

    def table(self, options, sizes):
        dim, size = sizes.hidden_size, options["draft_vocab_size"] or sizes.vocab_size
        return [
            Piece("fc.weight", "fuse.weight", (dim, 3 * dim)),
            Piece(f"{self.layer}input_layernorm.weight", "token_norm.weight", (dim,)),
            Piece(self.layer + HIDDEN_NORM, "feature_norm.weight", (dim,)),
            *layer_table(self.layer, sizes, 2 * dim),
            Piece("norm.weight", "norm.weight", (dim,)),
            Piece("lm_head.weight", "lm_head.weight", (size, dim)),
        ]

    def elsewhere(self, options, sizes):
        size = options["draft_vocab_size"]
        return [Piece(f"{D2T} + arange", "drafted", (size,))] if size else []

    def read(self, found, target):
        tensors, config = dict(found.tensors), found.config
        where = found.file.with_name("config.json")
        lm_head = tensors.get("lm_head.weight")
        if "fc.weight" not in tensors or lm_head is None:
            raise ValueError(f"{found.file} holds no fc.weight and lm_head.weight: it is not EAGLE-3's")
        target.check_sizes(found.file, tensors["fc.weight"].num_rows, None)
        check_layer_config(found, {**self.layer_part(found), "architectures": None}, target, SCALINGS)
        self._check_switches(config, target, where)
        if EMBEDDING in tensors:
            target.check_same(found.file, EMBEDDING, tensors.pop(EMBEDDING), target.embedding)
        drafted = drafted_tokens(found, tensors.pop(D2T, None), tensors.pop(T2D, None), target)
        depths, note = self.num_depths(config)
        size = 0 if drafted is None else len(drafted)
        known = {"num_depths": depths} if depths else {}
        options = default_options(HEAD, token_residual=False, draft_vocab_size=size, **known)
        pieces = self.table(options, target.config)
        expect(found.file, tensors, {piece.theirs: piece.shape for piece in pieces})
        ours = gather(pieces, tensors) | ({} if drafted is None else {"drafted": in_memory(drafted)})
        notes = [*found.notes, note.format(options["num_depths"])]
        return HeadWeights(HEAD, options, ours, imported_from(self.name, found, notes), notes=notes)

    def _check_switches(self, config: dict, target, where) -> None:
        """Raises ValueError naming a setting under which a file computes something else than ours."""
        inner = config.get("eagle_config") or {}
        if not isinstance(inner, dict):
            raise ValueError(f"{where}: eagle_config is {shown(inner)}, expected an object")
        given = {**{key: inner[key] for key in (*SWITCHES, LAYER_IDS) if key in inner}, **config}
        wrong = [
            f"{key} {shown(given[key], 30)}"
            for key, ours in SWITCHES.items()
            if given.get(key) is not None and bool(given[key]) != ours
        ]
        if given.get("norm_before_residual", self.before_residual):
            wrong.append("norm_before_residual true or missing")
        width = given.get("target_hidden_size")
        if width not in (None, target.config.hidden_size):
            wrong.append(f"target_hidden_size {shown(width, 30)}")
        num_layers = target.config.num_layers
        own = fused_layers(num_layers)
        ids = given.get(LAYER_IDS) or inner.get(LAYER_IDS) or default_layers(num_layers)
        if not isinstance(ids, list | tuple):
            raise ValueError(f"{where}: {LAYER_IDS} is {shown(ids)}, expected a list of layers")
        if list(ids) != list(own):
            wrong.append(f"layers {shown(list(ids))} (ours fuses {list(own)})")
        if wrong:
            raise ValueError(f"{where}: {', '.join(wrong)}: our eagle3 computes something else, so it cannot be read")

    def check_holds(self, weights):
        if weights.options.get("token_residual"):
            raise ValueError(
                "this head adds the token to the residual stream (token_residual, residual.weight), which EAGLE-3's "
                "layer does not: it cannot be written; train one with --head.token_residual false"
            )

    def extras(self, weights, target):
        target.check_belongs(weights)
        fused = fused_layers(target.config.num_layers)
        if len(set(fused)) < len(fused):
            raise ValueError(
                f"this head fuses the layers {fused} of {target}, one of them twice; a server passes each layer on "
                "once, so it cannot be written"
            )
        if "drafted" not in weights.tensors:
            return {}
        drafted = weights.tensors["drafted"].read().astype(np.int64)
        mask = np.zeros(target.config.vocab_size, bool)
        mask[drafted] = True
        return {D2T: in_memory(drafted - np.arange(len(drafted))), T2D: in_memory(mask)}

    def logits(self, found, target, inputs):
        c, tensors = target.config, dict(Float64(found.tensors))
        layers = fused_layers(c.num_layers)
        drawn = inputs.of(c.hidden_size, c.vocab_size, COMPARED_DEPTHS, dict.fromkeys(layers))
        fused = np.concatenate([drawn.layers[index] for index in layers], 1).astype(np.float64)
        config, embedding = self.layer_part(found), exact(target.embedding)
        return equations.eagle3(tensors, config, self.layer, fused, drawn.token_ids, embedding, COMPARED_DEPTHS)


class Eagle3(Eagle3Format):
    name, sentence = "eagle3", "EAGLE-3's own pytorch_model.bin or model.safetensors with a one-layer Llama config"
    files = (MODEL_BIN, MODEL_SAFETENSORS)
    layer = "midlayer."

    def recognize(self, found):
        return {"fc.weight", self.layer + HIDDEN_NORM} <= found.tensors.keys()

    def layer_part(self, found):
        return found.config

    def num_depths(self, config):
        return None, "EAGLE-3 has no fixed depth: num_depths is {}, our default"

    def extras(self, weights, target):
        num_layers = target.config.num_layers
        fused, fixed = fused_layers(num_layers), default_layers(num_layers)
        if fused != fixed:
            weights.notes.append(
                f"this head fuses the layers {fused}, which config.json says to vLLM; EAGLE-3's own code fuses {fixed} "
                f"of {num_layers} whatever it says"
            )
        if (target.config.rope_scaling or {}).get("rope_type") == LLAMA3:
            weights.notes.append(f"rope scaling {LLAMA3} is known to vLLM; EAGLE-3's own code refuses it")
        return super().extras(weights, target)

    def config(self, weights, dtype, target):
        layers = list(fused_layers(target.config.num_layers))
        return {
            **layer_config(target, dtype, SCALINGS),
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": weights.options["draft_vocab_size"] or target.config.vocab_size,
            "bias": False,
            "eagle_config": {"use_aux_hidden_state": True, LAYER_IDS: layers},
        }


class Speculators(Eagle3Format):
    """What the speculators library (vllm-project) saves and vLLM serves by the folder alone."""

    name, sentence = "speculators", "an eagle3 model of the speculators library: model.safetensors with config.json"
    files = (MODEL_SAFETENSORS,)
    layer = LAYER
    before_residual = True

    def recognize(self, found):
        return {"fc.weight", self.layer + HIDDEN_NORM} <= found.tensors.keys()

    def layer_part(self, found):
        where, part = found.file.with_name("config.json"), found.config.get("transformer_layer_config")
        kind = found.config.get("speculators_model_type")
        if kind != METHOD or not isinstance(part, dict):
            raise ValueError(
                f"{where}: expected speculators_model_type {METHOD} and an object transformer_layer_config, got {kind} "
                f"and {type(part).__name__}"
            )
        return part

    def num_depths(self, config):
        try:
            depths = config["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
        except (LookupError, TypeError):
            depths = None
        if not isinstance(depths, int) or depths < 1:
            return None, "config.json names no speculative_tokens: num_depths is {}, our default"
        return depths, "num_depths is {}, the speculative_tokens of config.json"

    def extras(self, weights, target):
        return {EMBEDDING: target.embedding, **super().extras(weights, target)}

    def config(self, weights, dtype, target):
        try:
            known = original_config(weights, self.name)["speculators_config"]["verifier"]["name_or_path"]
        except (LookupError, TypeError):
            known = None
        verifier = base_model(weights, target, {"base_model_name_or_path": known})
        proposal = {
            "proposal_type": "greedy",
            "speculative_tokens": weights.options["num_depths"],
            "verifier_accept_k": 1,
            "accept_tolerance": 0.0,
        }
        return {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": METHOD,
            "draft_vocab_size": weights.options["draft_vocab_size"] or target.config.vocab_size,
            "norm_before_residual": False,
            "target_hidden_size": None,
            LAYER_IDS: list(fused_layers(target.config.num_layers)),
            "speculators_config": {
                "algorithm": METHOD,
                "default_proposal_method": proposal["proposal_type"],
                "proposal_methods": [proposal],
                "verifier": {"name_or_path": verifier, "architectures": ["LlamaForCausalLM"]},
            },
            "transformer_layer_config": layer_config(target, dtype, SCALINGS),
            "torch_dtype": str(dtype),
        }


def default_layers(num_layers: int) -> tuple[int, int, int]:
    """The layers that EAGLE-3's own code fuses, and vLLM where config.json names none."""
    return 2, num_layers // 2, num_layers - 3


def drafted_tokens(found, d2t: LazyTensor | None, t2d: LazyTensor | None, target) -> np.ndarray | None:
    """The draft vocabulary, (size,) int32 ascending; None where every token is drafted in order.

    Raises ValueError for tables that contradict each other, the language-model head or the backbone.
    """
    size, vocabulary = found.tensors["lm_head.weight"].num_rows, target.config.vocab_size
    if not size:
        raise ValueError(f"{found.file}: lm_head.weight has no rows; expected one for each token that is drafted")
    if d2t is None:
        if size != vocabulary:
            raise ValueError(f"{found.file}: {D2T} is missing; its language-model head has {size} rows of {vocabulary}")
        return None
    if d2t.shape != (size,) or d2t.dtype.kind not in "iu":
        raise ValueError(f"{found.file}: {D2T} is {d2t.dtype} {d2t.shape}; expected integers of shape ({size},)")
    drafted = d2t.read().astype(np.int64) + np.arange(size)
    mask = np.zeros(vocabulary, bool)
    if drafted[0] < 0 or drafted[-1] >= vocabulary or not np.all(np.diff(drafted) > 0):
        raise ValueError(f"{found.file}: {D2T} does not give {size} tokens from 0 to {vocabulary - 1} in order")
    mask[drafted] = True
    if t2d is not None and not np.array_equal(t2d.read().astype(bool), mask):
        raise ValueError(f"{found.file}: {D2T} and {T2D} name different tokens; correct one")
    return None if size == vocabulary else drafted.astype(np.int32)
