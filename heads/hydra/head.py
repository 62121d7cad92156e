"""Hydra (arXiv 2402.05109, section 3): Medusa's networks, made sequential by the embeddings of the drafted tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heads.base import Head, HeadOutput, at_least, option
from heads.decoder import DecoderBlock, HeadCache
from heads.draft_vocab import DraftVocabulary
from heads.layers import DepthLMHeads, Linear, LMHeadOptions, ResidualBlock, RMSNorm
from runtime import einops, jt


@dataclass
class Config(LMHeadOptions):
    """Options of the Hydra head."""

    num_depths: int = option(6, "tokens drafted after the root, one network each; deeper ones read more tokens")
    num_layers: int = option(1, "blocks per depth: the one that takes the tokens in, then residual ones")
    token_norm: bool = option(True, "norm the embeddings; false: as published, and as Hydra's files have it")
    prefix_layer: bool = option(False, "a decoder layer over the last hidden states before the networks, as in Hydra++")
    draft_vocab_size: int = option(
        0, "tokens it can draft, with lm_head=own: the most frequent of the training replies; 0: all"
    )


class InputBlock(jt.Module):
    """R x + r + SiLU(L x + b), (num_inputs dim) -> dim. R initially passes the first input through; all else is zero.

    R and L are the two halves of one matrix, because while drafting a second product costs more than its arithmetic.
    """

    def __init__(self, dim: int, num_inputs: int):
        super().__init__()
        self.dim = dim
        weight = np.zeros((2 * dim, num_inputs * dim))
        weight[:dim, :dim] = np.eye(dim)
        self.linear = Linear(num_inputs * dim, 2 * dim, weight=weight)

    def execute(self, x):
        """x: (rows, num_inputs dim) -> (rows, dim)."""
        y = self.linear(x)
        residual, new = y[:, : self.dim], y[:, self.dim :]
        return residual + new * new.sigmoid()


class HydraHead(DraftVocabulary, Head):
    """x_k = [h'; n(e_0); .. n(e_k)];  y = R_k x_k + r_k + SiLU(L_k x_k + b_k);  logits_k = W_k (residual blocks of y)

    h': the last hidden state h, or with ``prefix_layer`` a decoder layer's output over n_p(h) up to here, of which
    h is the residual; e_j: the embedding of the token chosen before depth j's guess, e_0 the root's; n: an RMSNorm, or
    the identity without ``token_norm``. Depth k has its own weights and k + 2 inputs. An untrained depth repeats the
    backbone's next-token guess.
    """

    Config = Config

    def __init__(self, config: Config, backbone):
        super().__init__(config, backbone)
        at_least(config, num_layers=1)
        self.token_norm = RMSNorm(self.dim) if config.token_norm else None
        if config.prefix_layer:
            self.prefix_norm, self.prefix = RMSNorm(self.dim), DecoderBlock(backbone)
        self.blocks = jt.nn.ModuleList(
            [
                jt.nn.Sequential(
                    InputBlock(self.dim, depth + 2), *[ResidualBlock(self.dim) for _ in range(config.num_layers - 1)]
                )
                for depth in range(config.num_depths)
            ]
        )
        sizes = config.rank, config.num_depths
        self.lm_heads = DepthLMHeads(config.lm_head, *sizes, backbone, self.lm_logits, config.draft_vocab_size)
        self.begin_with_first_tokens()

    def prepare(self, token_counts):
        if self.choose_tokens(token_counts):
            self.lm_heads.take_rows(self.drafted)

    def context(self, features, positions):
        """The h' that every depth reads, at the given positions, (num, dim)."""
        if not self.config.prefix_layer:
            return self.select(features.hidden, positions)
        h = einops.rearrange(features.hidden, "batch seq dim -> (batch seq) dim")
        return self.prefix.over(h, self.prefix_norm(h), self.sequence_lengths(features), positions)[0]

    def append(self, x, token_ids):
        """x: (rows, n dim), token_ids: (rows,) -> (rows, (n + 1) dim)."""
        e = self.embed(token_ids)
        return jt.concat([x, e if self.token_norm is None else self.token_norm(e)], 1)

    def execute(self, features, token_ids, positions) -> HeadOutput:
        x, logits = self.context(features, positions), []
        for depth in range(self.num_depths):
            x = self.append(x, self.following(np.asarray(token_ids), positions, depth))
            logits.append(self.lm_heads.project(self.blocks[depth](x), depth))
        return HeadOutput(logits)

    def begin(self, features, token_ids, state=None):
        h = features.hidden[0]
        if not self.config.prefix_layer:
            return h[h.shape[0] - 1 :], 0, None
        cache = HeadCache(self.prefix) if state is None else state[2]
        return self.prefix.extend(cache, h, self.prefix_norm(h)), 0, cache

    def step(self, state, token_ids, parents):
        x, depth, cache = state
        x = self.append(x[parents], token_ids)
        return self.lm_heads(self.blocks[depth](x), depth), (x, depth + 1, cache)
