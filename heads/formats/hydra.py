"""Hydra's own files (arXiv 2402.05109), of the grounded "mlp" architecture.

Its head i computes R x + r + SiLU(L x + b) over x = [h; e_{t+1}; .. e_{t+1+i}], then residual blocks and a
language-model head with a bias. Ours is the same, with R and L as the upper and lower half of one matrix, except that
it has no bias in the language-model head and norms the embeddings. So a file is read when the biases of its
language-model heads are zero, and a head of ours is written when it has no norm.
"""

from __future__ import annotations

import re

import numpy as np

from heads.formats import equations
from heads.formats.contents import HeadWeights, Piece, expect, gather, zeros
from heads.formats.files import HYDRA_PT
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

HEAD = "hydra"
OWN = "own"
NORM = "token_norm"  # our option; false leaves the embeddings as they are
FIRST = re.compile(r"^hydra_mlp\.(\d+)\.(\d+)\.linear\.weight$")
EMBEDDING = "input_embed_fn.weight"  # in the file because the published module borrows it
# Settings under which a file computes the same as ours.
SETTINGS = {"hydra_head_arch": "mlp", "grounded_heads": True, "hidden_state_offset": 0}


class Hydra(PublishedFormat):
    name, sentence = "hydra", "Hydra's own hydra_lm_head.pt with config.json, grounded mlp heads"
    head, files = HEAD, (HYDRA_PT,)

    def recognize(self, found):
        return any(FIRST.match(name) for name in found.tensors)

    def table(self, options, sizes):
        dim, pieces = sizes.hidden_size, []
        for depth in range(options["num_depths"]):
            theirs, ours, wide = f"hydra_mlp.{depth}", f"blocks.{depth}", (depth + 2) * dim
            for half, first in (("res_connection", 0), ("linear", dim)):
                pieces += [
                    Piece(f"{theirs}.0.{half}.weight", f"{ours}.0.linear.weight", (dim, wide), first),
                    Piece(f"{theirs}.0.{half}.bias", f"{ours}.0.linear.bias", (dim,), first),
                ]
            for layer in range(1, options["num_layers"]):
                pieces += [
                    Piece(f"{theirs}.{layer}.linear.weight", f"{ours}.{layer}.linear.weight", (dim, dim)),
                    Piece(f"{theirs}.{layer}.linear.bias", f"{ours}.{layer}.linear.bias", (dim,)),
                ]
            pieces.append(Piece(f"hydra_lm_head.{depth}.weight", f"lm_heads.{depth}.weight", (sizes.vocab_size, dim)))
        return pieces

    def read(self, found, target):
        for key, supported in SETTINGS.items():
            if found.config.get(key) != supported:
                value = found.config.get(key, "missing")
                raise ValueError(f"{found.file}: {key} of config.json is {value}; only {supported} is supported")
        blocks = [match for match in map(FIRST.match, found.tensors) if match]
        if not blocks:
            raise ValueError(f"{found.file} holds no hydra_mlp.0.0.linear.weight: it is not Hydra's")
        num_depths, num_layers = (1 + max(int(match[group]) for match in blocks) for group in (1, 2))
        options = default_options(HEAD, num_depths=num_depths, num_layers=num_layers, lm_head=OWN, **{NORM: False})
        tensors, notes = dict(found.tensors), list(found.notes)
        notes += count_conflicts(found, {"hydra_num_heads": num_depths, "hydra_num_layers": num_layers})
        lm = tensors.get("hydra_lm_head.0.weight")
        target.check_sizes(found.file, tensors[blocks[0].string].num_rows, lm.num_rows if lm else None)
        if EMBEDDING in tensors:
            target.check_same(found.file, EMBEDDING, tensors.pop(EMBEDDING), target.embedding)
        pieces = self.table(options, target.config)
        biases = self.biases(num_depths, target)
        expect(found.file, tensors, {piece.theirs: piece.shape for piece in pieces} | biases)
        for name in biases:
            if np.any(tensors[name].read()):
                raise ValueError(f"{found.file}: {name} is not zero; our language-model heads have no bias")
        imported = imported_from(self.name, found, notes)
        return HeadWeights(HEAD, options, gather(pieces, tensors), imported, notes=notes)

    def biases(self, num_depths, target) -> dict[str, tuple[int]]:
        """Names and shapes of the tensors that a file has and ours does not."""
        return {f"hydra_lm_head.{depth}.bias": (target.config.vocab_size,) for depth in range(num_depths)}

    def check_holds(self, weights):
        options = weights.options
        if options.get("draft_vocab_size"):
            raise ValueError("Hydra's language-model heads score every token, this head's score a draft vocabulary")
        if options.get("prefix_layer"):
            raise ValueError("Hydra's mlp heads have no prefix layer, and Hydra++ norms its output; ours does not")
        if options.get(NORM, True):
            raise ValueError("this head norms the embeddings (token_norm.weight), Hydra's does not: cannot be written")
        if options["lm_head"] != OWN:
            raise ValueError(
                f"Hydra has a language-model head per depth, this one's lm_head is {options['lm_head']}; pass --merge "
                "to write them in full, which is read back as lm_head=own"
            )

    def check_numbers(self, weights):
        different = tied_blocks_differ(weights, 1)
        if different:
            raise ValueError(
                f"Hydra's own code repeats one residual block, but {different} differs from that of block 1; only the "
                "last block would be loaded"
            )

    def extras(self, weights, target):
        return {name: zeros(shape) for name, shape in self.biases(weights.options["num_depths"], target).items()}

    def config(self, weights, dtype, target):
        return {
            "hydra_num_heads": weights.options["num_depths"],
            "hydra_num_layers": weights.options["num_layers"],
            **SETTINGS,
            "base_model_name_or_path": base_model(weights, target, original_config(weights, self.name)),
        }

    def logits(self, found, target, inputs):
        tensors, c = Float64(found.tensors), target.config
        drawn = inputs.of(c.hidden_size, c.vocab_size, equations.count(tensors, "hydra_lm_head.{}.weight"))
        return equations.hydra(tensors, drawn.hidden.astype(np.float64), drawn.token_ids, exact(target.embedding))
