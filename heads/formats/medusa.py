"""Medusa's networks (arXiv 2401.10774) under three systems' names: its own code's, vLLM's and TensorRT-LLM's.

They compute what our MLP head computes, x_k = x + SiLU(A_k x + b_k) and logits_k = W_k x_k; only the names and the
place of the language-model heads differ:

    ours                  Medusa         vLLM                 TensorRT-LLM
    blocks.k.j.linear     k.j.linear     blocks.k.layers.j    medusa_heads.k.medusa_layers.j.linear
    lm_heads.k            k.L            lm_heads.k           medusa_heads.k.lm_head

L is the number of blocks. A shared language-model head is Medusa's "version": "2", which has none, and vLLM's
"original_lm_head", whose file carries the backbone's once.
"""

from __future__ import annotations

import abc
import re
from typing import ClassVar

import numpy as np

from backbone.files.lazy import LazyTensor
from backbone.formats.cast import FLOATS
from heads.formats import equations
from heads.formats.contents import HeadWeights, Piece, Target, expect, gather, zeros
from heads.formats.files import MEDUSA_PT, MEDUSA_SAFETENSORS, MODEL_SAFETENSORS, TENSORRT, Found
from heads.formats.own import default_options, imported_from
from heads.formats.published import (
    Float64,
    PublishedFormat,
    base_model,
    count_conflicts,
    exact,
    original_config,
    tied_blocks_differ,
)

HEAD = "mlp"
OWN, SHARED = "own", "shared"
VERSIONS = {OWN: "1", SHARED: "2"}  # of Medusa's config.json
MAX_DRAFT_LEN = 63  # nodes of the published trees without the root
SILU = "silu"
SECTIONS = ("mapping", "quantization")  # of TensorRT-LLM's config.json


class MedusaFormat(PublishedFormat):
    """block, lm: names of a block's linear map and of a depth's language-model head; heads_key, layers_key: the keys of
    config.json for the number of depths and of blocks per depth."""

    head = HEAD
    block: ClassVar[str]
    lm: ClassVar[str]
    heads_key: ClassVar[str]
    layers_key: ClassVar[str]

    def match_block(self, name: str) -> re.Match | None:
        """Depth and layer of a block's weight; None for the name of another tensor."""
        pattern = re.escape(self.block).replace(r"\{depth\}", r"(\d+)").replace(r"\{layer\}", r"(\d+)")
        return re.fullmatch(rf"{pattern}\.weight", name)

    def recognize(self, found: Found) -> bool:
        return any(self.match_block(name) for name in self.own_part(found)[0])

    def table(self, options, sizes):
        dim, pieces = sizes.hidden_size, []
        for depth in range(options["num_depths"]):
            for layer in range(options["num_layers"]):
                theirs, ours = self.block.format(depth=depth, layer=layer), f"blocks.{depth}.{layer}.linear"
                pieces += [
                    Piece(f"{theirs}.weight", f"{ours}.weight", (dim, dim)),
                    Piece(f"{theirs}.bias", f"{ours}.bias", (dim,)),
                ]
            if options["lm_head"] == OWN:
                lm = self.lm.format(depth=depth, num_layers=options["num_layers"])
                pieces.append(Piece(lm, f"lm_heads.{depth}.weight", (sizes.vocab_size, dim)))
        return pieces

    def read(self, found, target):
        tensors, notes = self.own_part(found)
        blocks = [match for match in map(self.match_block, tensors) if match]
        if not blocks:
            raise ValueError(
                f"{found.file} holds no residual block ({self.block}.weight); ours has at least one per depth"
            )
        num_depths, num_layers = (1 + max(int(match[group]) for match in blocks) for group in (1, 2))
        names = [self.lm.format(depth=depth, num_layers=num_layers) for depth in range(num_depths)]
        present = [name for name in names if name in tensors]
        options = default_options(
            HEAD, num_depths=num_depths, num_layers=num_layers, lm_head=OWN if present else SHARED
        )
        notes = [*found.notes, *notes, *self.conflicts(found, options)]
        vocabulary = tensors[present[0]].num_rows if present else None
        target.check_sizes(found.file, tensors[blocks[0].string].num_rows, vocabulary)
        pieces = self.table(options, target.config)
        pieces, missing = self.without_biases(found, tensors, pieces)
        tensors = self.without_extras(found, tensors, options, target)
        expect(found.file, tensors, {piece.theirs: piece.shape for piece in pieces})
        ours = gather(pieces, tensors) | {piece.ours: zeros(piece.shape) for piece in missing}
        return HeadWeights(HEAD, options, ours, imported_from(self.name, found, notes), notes=notes)

    def conflicts(self, found: Found, options: dict) -> list[str]:
        """Notes on where config.json contradicts the tensors, which decide. Raises ValueError for settings under which
        ours would compute something else."""
        return count_conflicts(found, {self.heads_key: options["num_depths"], self.layers_key: options["num_layers"]})

    def without_biases(self, found, tensors, pieces):
        """(pieces in the file, pieces of biases that it leaves out because they are zero)."""
        return pieces, []

    def without_extras(self, found, tensors, options, target) -> dict[str, LazyTensor]:
        """The tensors of the table, after the others were checked."""
        return tensors

    def check_holds(self, weights):
        kind = weights.options["lm_head"]
        if kind not in (OWN, SHARED):
            raise ValueError(
                f"{self.name} has no language-model head of low rank (this one's lm_head is {kind}); pass --merge to "
                "write W + B A for each depth, which is read back as lm_head=own"
            )

    def logits(self, found, target, inputs):
        tensors, c = Float64(self.own_part(found)[0]), target.config
        hidden = inputs.of(c.hidden_size, c.vocab_size, 0).hidden.astype(np.float64)
        return self.equation(tensors, hidden, target)

    @abc.abstractmethod
    def equation(self, tensors: Float64, hidden: np.ndarray, target: Target) -> list[np.ndarray]:
        """What the file computes. hidden: (rows, dim) -> (rows, vocab) per depth."""


class Medusa(MedusaFormat):
    """The files of the original code. With several blocks per depth, that code repeats one block, so only equal blocks
    are written; files of other trainers may hold different ones and are read as they are."""

    name = "medusa"
    sentence = "Medusa's own medusa_lm_head.pt or .safetensors with config.json (also Text Generation Inference)"
    files = (MEDUSA_PT, MEDUSA_SAFETENSORS)
    block, lm = "{depth}.{layer}.linear", "{depth}.{num_layers}.weight"
    heads_key, layers_key = "medusa_num_heads", "medusa_num_layers"

    def conflicts(self, found, options):
        notes = super().conflicts(found, options)
        stated, version = found.config.get("version"), VERSIONS[options["lm_head"]]
        if stated is not None and str(stated) != version:
            content = "language-model heads" if options["lm_head"] == OWN else "no language-model heads"
            notes.append(f"config.json says version {stated}, the tensors hold {content}: read as version {version}")
        return notes

    def read(self, found, target):
        weights = super().read(found, target)
        different = tied_blocks_differ(weights, 0)
        if different:
            weights.notes.append(
                f"{different} differs from that of block 0; Medusa's own code would use only the last block"
            )
        return weights

    def check_numbers(self, weights):
        different = tied_blocks_differ(weights, 0)
        if different:
            raise ValueError(
                f"Medusa's own code repeats one block, but {different} differs from that of block 0; only the last "
                "block would be loaded; vllm-medusa and tensorrt-llm-medusa store each block"
            )

    def config(self, weights, dtype, target):
        """vLLM reads the folder too, given the sizes and that there are biases. Version 2 has no language-model heads,
        and vLLM would draft with whatever was in their memory: a vocabulary of no token makes it refuse the file."""
        options, c = weights.options, target.config
        refused = {}
        if options["lm_head"] == SHARED:
            refused["truncated_vocab_size"] = 0
            weights.notes.append("version 2 is for Medusa's legacy code; vLLM serves this head as vllm-medusa")
        return {
            self.heads_key: options["num_depths"],
            self.layers_key: options["num_layers"],
            "base_model_name_or_path": base_model(weights, target, original_config(weights, self.name)),
            "version": VERSIONS[options["lm_head"]],
            "hidden_size": c.hidden_size,
            "vocab_size": c.vocab_size,
            "medusa_fc_bias": True,
            **refused,
        }

    def equation(self, tensors, hidden, target):
        return equations.medusa(tensors, hidden, lambda: exact(target.lm_head))


class VLLMMedusa(MedusaFormat):
    """What vLLM's MedusaModel reads. It drafts a chain of each head's best guess, and has biases only where config.json
    says ``medusa_fc_bias``."""

    name = "vllm-medusa"
    sentence = "vLLM's Medusa draft model: model.safetensors with config.json"
    files = (MODEL_SAFETENSORS,)
    block, lm = "blocks.{depth}.layers.{layer}", "lm_heads.{depth}.weight"
    heads_key, layers_key = "num_heads", "num_hidden_layers"
    prefix = "medusa_heads."  # vLLM drops it from any name
    first, whole = "lm_heads.0.weight", "lm_head.weight"  # original_lm_head reads either as the backbone's

    def own_part(self, found):
        tensors = {name.removeprefix(self.prefix): tensor for name, tensor in found.tensors.items()}
        if found.config.get("original_lm_head") and self.first in tensors and self.whole not in tensors:
            tensors[self.whole] = tensors.pop(self.first)
        return tensors, []

    def conflicts(self, found, options):
        config = found.config
        vocabulary, scored = config.get("vocab_size"), config.get("truncated_vocab_size")
        if scored is not None and scored != vocabulary:
            raise ValueError(
                f"{found.file}: its heads score {scored} tokens of {vocabulary} (truncated_vocab_size with a "
                f"token_map); our {HEAD} head scores all of them, so it cannot be converted"
            )
        if config.get("logit_scale") not in (None, 1.0):
            raise ValueError(f"{found.file}: its logit_scale is {config['logit_scale']}; ours is always 1")
        return super().conflicts(found, options)

    def without_biases(self, found, tensors, pieces):
        absent = [piece for piece in pieces if piece.theirs.endswith(".bias") and piece.theirs not in tensors]
        biased, stated = any(name.endswith(".bias") for name in tensors), found.config.get("medusa_fc_bias", False)
        if biased and not stated:
            raise ValueError(f"{found.file} holds biases, but its config.json does not set medusa_fc_bias; correct one")
        if stated:
            return pieces, []
        return [piece for piece in pieces if piece not in absent], absent

    def without_extras(self, found, tensors, options, target):
        """vLLM ignores a token_map of the complete vocabulary."""
        tensors = {name: tensor for name, tensor in tensors.items() if name != "token_map"}
        original, shared = bool(found.config.get("original_lm_head")), self.whole in tensors
        if original != shared or (original and options["lm_head"] == OWN):
            holds = [self.whole] * shared + ["one language-model head per depth"] * (options["lm_head"] == OWN)
            raise ValueError(
                f"{found.file}: its config.json says original_lm_head {str(original).lower()}, and it holds "
                f"{' and '.join(holds) or 'no language-model head'}; correct one"
            )
        if shared:
            target.check_same(found.file, self.whole, tensors.pop(self.whole), target.lm_head)
        elif options["lm_head"] == SHARED:
            raise ValueError(f"{found.file}: {self.first} is missing; expected one language-model head per depth")
        return tensors

    def extras(self, weights, target):
        if weights.options["lm_head"] == OWN:
            return {}
        target.check_belongs(weights)
        return {self.whole: target.lm_head}

    def config(self, weights, dtype, target):
        options, c = weights.options, target.config
        return {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": c.hidden_size,
            "vocab_size": c.vocab_size,
            "truncated_vocab_size": c.vocab_size,
            self.heads_key: options["num_depths"],
            self.layers_key: options["num_layers"],
            "medusa_fc_bias": True,
            "original_lm_head": options["lm_head"] == SHARED,
            "max_paths": MAX_DRAFT_LEN + 1,
            "topk": 10,
            "torch_dtype": str(dtype),
        }

    def equation(self, tensors, hidden, target):
        return equations.vllm_medusa(tensors, hidden)


class TensorRTMedusa(MedusaFormat):
    """The heads in a TensorRT-LLM checkpoint, whose other tensors are the backbone's. It always has a language-model
    head per depth, and its dtype is that of config.json."""

    name = "tensorrt-llm-medusa"
    sentence = "the heads of a TensorRT-LLM Medusa checkpoint: rank0.safetensors with config.json"
    files = (TENSORRT,)
    dtype = FLOATS["float16"]
    block, lm = "medusa_heads.{depth}.medusa_layers.{layer}.linear", "medusa_heads.{depth}.lm_head.weight"
    heads_key, layers_key = "num_medusa_heads", "num_medusa_layers"
    backbone_part = re.compile(r"^(transformer\.|lm_head\.)")

    def own_part(self, found):
        own = {name: tensor for name, tensor in found.tensors.items() if not self.backbone_part.match(name)}
        left = len(found.tensors) - len(own)
        return own, [f"{left} tensors of the backbone in {found.file.name} were not read"] if left else []

    def conflicts(self, found, options):
        config = found.config
        mapping, quantization = (value if isinstance(value := config.get(key), dict) else {} for key in SECTIONS)
        ranks = mapping.get("world_size")
        if ranks not in (None, 1):
            raise ValueError(
                f"{found.file}: it is split over {ranks} ranks; convert it with --tp_size 1 --pp_size 1 first"
            )
        quantized = quantization.get("quant_algo")
        if quantized:
            raise ValueError(
                f"{found.file}: its weights are quantized ({quantized}); expected float32, float16 or bfloat16"
            )
        if config.get("hidden_act") not in (None, SILU):
            raise ValueError(
                f"{found.file}: its activation is {config['hidden_act']}, ours is {SILU}, so it cannot be converted"
            )
        return super().conflicts(found, options)

    def check_holds(self, weights):
        super().check_holds(weights)
        if weights.options["lm_head"] != OWN:
            raise ValueError(
                f"{self.name} has a language-model head per depth, this head shares the backbone's; pass --merge to "
                "write a copy for each depth, which is read back as lm_head=own"
            )

    def config(self, weights, dtype, target):
        options, c = weights.options, target.config
        return {
            "architecture": "MedusaForCausalLM",
            "dtype": str(dtype),
            "logits_dtype": "float32",
            "vocab_size": c.vocab_size,
            "max_position_embeddings": c.max_positions,
            "hidden_size": c.hidden_size,
            "intermediate_size": c.intermediate_size,
            "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.num_kv_heads,
            "head_size": c.head_dim,
            "hidden_act": SILU,
            "norm_epsilon": c.rms_norm_eps,
            "position_embedding_type": "rope_gpt_neox",
            "rotary_base": c.rope_theta,
            "rotary_scaling": c.rope_scaling,
            "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
            "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
            "max_draft_len": MAX_DRAFT_LEN,
            self.heads_key: options["num_depths"],
            self.layers_key: options["num_layers"],
            "model_type": c.model_type,
        }

    def equation(self, tensors, hidden, target):
        return equations.tensorrt_medusa(tensors, hidden)
