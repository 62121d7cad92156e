"""Draft heads in plain PyTorch, with the equations, parameters and names of our heads, so that both load one state.

What was faster on a CPU was chosen: only labeled positions reach the language-model head, attention reads conversations
padded to a batch while everything else runs on the rows end to end, and the norms and embeddings of all depths are
computed together. torch comes with requirements-dev.txt only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.config import BackboneConfig, rope_inverse_frequencies
from runtime.entry import suggest
from trainer.data.tokens import IGNORE, TokenizedData, labelled_positions


class Padding:
    """Rows of sequences stored end to end, as a padded batch and back. lengths: (sequences,) int64."""

    def __init__(self, lengths: Tensor):
        column = torch.arange(int(lengths.max()))
        real = column < lengths[:, None]
        self.index = torch.where(real, (lengths.cumsum(0) - lengths)[:, None] + column, 0)
        self.places = real.flatten().nonzero()[:, 0]

    def pad(self, rows: Tensor) -> Tensor:
        """(rows, ...) -> (sequences, longest, ...); the padding is the first row."""
        return rows[self.index]

    def unpad(self, padded: Tensor) -> Tensor:
        """(sequences, longest, ...) -> (rows, ...)."""
        return padded.flatten(0, 1)[self.places]


@dataclass
class Batch:
    """The conversations of a step, end to end. tokens: (tokens + depths,) int64, padded with 0; positions: (num,)
    int64, those whose draft is scored; text, drafts: the rows of the text and the positions as padded batches; here:
    (tokens,) int64, each row's place in its conversation; ends: (num,) int64, where the conversation of each position
    ends. rows, labels: per depth, the positions that have a label, and the labels."""

    tokens: Tensor
    positions: Tensor
    text: Padding
    drafts: Padding
    here: Tensor
    ends: Tensor
    rows: list[Tensor]
    labels: list[Tensor]

    @property
    def num_tokens(self) -> int:
        """Tokens of the text."""
        return len(self.here)

    def following(self, depths: int) -> Tensor:
        """The token that each depth reads before it guesses, (depths, num)."""
        return self.tokens[self.positions + 1 + torch.arange(depths)[:, None]]


def collate(data: TokenizedData, indices, num_depths: int) -> Batch:
    """The batch of these conversations, with the positions and labels of ``trainer.loss.make_batch``."""
    part = data.select(indices)
    positions, labels = labelled_positions(part, num_depths)
    positions = positions.astype(np.int64)
    ends = np.repeat(part.offsets[1:], part.lengths)
    counts = np.diff(np.searchsorted(positions, part.offsets))  # positions of each conversation
    at = torch.from_numpy(labels.astype(np.int64))
    rows = [(each != IGNORE).nonzero()[:, 0] for each in at]
    return Batch(
        tokens=torch.from_numpy(np.concatenate([part.token_ids, np.zeros(num_depths, np.int32)]).astype(np.int64)),
        positions=torch.from_numpy(positions),
        text=Padding(torch.from_numpy(part.lengths)),
        drafts=Padding(torch.from_numpy(counts)),
        here=torch.from_numpy(np.arange(len(ends)) - np.repeat(part.offsets[:-1], part.lengths)),
        ends=torch.from_numpy(ends[positions]),
        rows=rows,
        labels=[each[chosen] for each, chosen in zip(at, rows, strict=True)],
    )


class DraftHead(nn.Module):
    """What the heads share. A subclass defines what each depth feeds to its language-model head, and that head.

    config: options of our head by name; embedding, lm_head: (vocab, dim) float32, the backbone's, frozen.
    """

    supported: ClassVar[dict] = {}  # options of which only these values are implemented here

    def __init__(self, config: Mapping, backbone: BackboneConfig, embedding: Tensor, lm_head: Tensor):
        super().__init__()
        wrong = [f"{name}={config[name]!r}" for name, value in self.supported.items() if config[name] != value]
        if wrong:
            expected = ", ".join(f"{name}={value!r}" for name, value in self.supported.items())
            raise ValueError(f"the PyTorch head has no {', '.join(wrong)}, only {expected}; use the default options")
        self.num_depths, self.dim = config["num_depths"], backbone.hidden_size
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("lm_head", lm_head, persistent=False)

    def states(self, hidden: Tensor, batch: Batch) -> tuple[list[Tensor], Tensor | float]:
        """The input of each depth's language-model head at the positions, (num, dim) per depth, and a further loss.
        hidden: (tokens, dim) float32."""
        raise TypeError(f"{type(self).__name__} does not define states")

    def lm_weight(self, depth: int) -> Tensor:
        """(vocab, dim)."""
        return self.lm_head

    def loss(self, hidden: Tensor, batch: Batch, depth_weight: float, options=None) -> tuple[Tensor, Tensor]:
        """(the scalar to minimize, the mean cross-entropy of each depth (depths,)).

        options: of ``F.linear_cross_entropy``: None holds all logits, ``LinearCrossEntropyOptions`` a chunk of them.
        """
        states, further = self.states(hidden, batch)
        losses = torch.stack(
            [
                F.linear_cross_entropy(y[rows], self.lm_weight(k), labels, reduction="sum", options=options)
                / max(1, len(rows))
                for k, (y, rows, labels) in enumerate(zip(states, batch.rows, batch.labels, strict=False))
            ]
        )
        weights = depth_weight ** torch.arange(len(losses))
        return (losses * weights).sum() / weights.sum() + further, losses.detach()


class ResidualBlock(nn.Module):
    """x + SiLU(A x + b)."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class InputBlock(nn.Module):
    """R x + r + SiLU(L x + b), the two maps in one."""

    def __init__(self, num_in: int, dim: int):
        super().__init__()
        self.linear = nn.Linear(num_in, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        residual, new = self.linear(x).chunk(2, -1)
        return residual + F.silu(new)


class Medusa(DraftHead):
    """logits_k = W_k (x + SiLU(A_k x + b_k)), arXiv 2401.10774."""

    supported: ClassVar[dict] = {"lm_head": "own"}

    def __init__(self, config, backbone, embedding, lm_head):
        super().__init__(config, backbone, embedding, lm_head)
        depths, layers = range(self.num_depths), range(config["num_layers"])
        self.blocks = nn.ModuleList([nn.Sequential(*[ResidualBlock(self.dim) for _ in layers]) for _ in depths])
        self.lm_heads = nn.ModuleList([nn.Linear(self.dim, backbone.vocab_size, bias=False) for _ in depths])

    def states(self, hidden, batch):
        x = hidden[batch.positions]
        return [block(x) for block in self.blocks], 0.0

    def lm_weight(self, depth):
        return self.lm_heads[depth].weight


class Hydra(DraftHead):
    """x_k = [h; n(e_0); ..; n(e_k)]; logits_k = W_k blocks_k(x_k), arXiv 2402.05109."""

    supported: ClassVar[dict] = {"lm_head": "own", "prefix_layer": False}

    def __init__(self, config, backbone, embedding, lm_head):
        super().__init__(config, backbone, embedding, lm_head)
        dim, depths, more = self.dim, range(self.num_depths), range(config["num_layers"] - 1)
        self.token_norm = nn.RMSNorm(dim, eps=1e-6)
        self.blocks = nn.ModuleList(
            [nn.Sequential(InputBlock((k + 2) * dim, dim), *[ResidualBlock(dim) for _ in more]) for k in depths]
        )
        self.lm_heads = nn.ModuleList([nn.Linear(dim, backbone.vocab_size, bias=False) for _ in depths])

    def states(self, hidden, batch):
        tokens = self.token_norm(F.embedding(batch.following(self.num_depths), self.embedding))
        x = torch.cat([hidden[batch.positions], *tokens], 1)
        return [block(x[:, : (k + 2) * self.dim]) for k, block in enumerate(self.blocks)], 0.0

    def lm_weight(self, depth):
        return self.lm_heads[depth].weight


class GatedRNN(DraftHead):
    """s_0 = h; u = [n1(s_k); n2(e_k)]; s_{k+1} = g * s_k + (1 - g) * W_o (SiLU(W_a u + b_a) * (W_b u + b_b)), with
    g = sigmoid(W_g u + b_g); logits_k = LM(s_{k+1})."""

    supported: ClassVar[dict] = {"cell": "gated"}

    def __init__(self, config, backbone, embedding, lm_head):
        super().__init__(config, backbone, embedding, lm_head)
        self.inner = config["inner_size"]
        self.state_norm, self.token_norm = nn.RMSNorm(self.dim, eps=1e-6), nn.RMSNorm(self.dim, eps=1e-6)
        self.joint = nn.Linear(2 * self.dim, self.dim + 2 * self.inner)
        self.proposal_down = nn.Linear(self.inner, self.dim, bias=False)

    def states(self, hidden, batch):
        tokens = self.token_norm(F.embedding(batch.following(self.num_depths), self.embedding))
        state, states = hidden[batch.positions], []
        for e in tokens:
            joint = self.joint(torch.cat([self.state_norm(state), e], 1))
            gate, a, b = joint.split([self.dim, self.inner, self.inner], 1)
            gate = gate.sigmoid()
            state = gate * state + (1 - gate) * self.proposal_down(F.silu(a) * b)
            states.append(state)
        return states, 0.0


class DecoderBlock(nn.Module):
    """One Llama decoder layer: h = r + W_o attention(..); y = h + W_down (SiLU(W_gate n(h)) * W_up n(h))."""

    def __init__(self, c: BackboneConfig, num_positions: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        self.q = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=False)
        self.kv = nn.Linear(c.hidden_size, 2 * c.num_kv_heads * c.head_dim, bias=False)
        self.o = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)
        self.mlp_norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.gate_up = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        angles = torch.outer(torch.arange(num_positions).float(), torch.from_numpy(rope_inverse_frequencies(c)))
        self.register_buffer("cosine", angles.cos()[:, None], persistent=False)
        self.register_buffer("sine", angles.sin()[:, None], persistent=False)

    def turn(self, x: Tensor, here: Tensor) -> Tensor:
        """Rotary embedding. x: (rows, heads, head_dim), here: (rows,)."""
        cosine, sine = self.cosine[here], self.sine[here]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)

    def queries(self, u: Tensor, here: Tensor) -> Tensor:
        """u: (rows, dim) -> (rows, heads, head_dim)."""
        return self.turn(self.q(u).view(len(u), self.heads, self.head_dim), here)

    def keys_values(self, u: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
        """u: (rows, dim) -> two of (rows, heads, head_dim), key-value heads repeated for their queries."""
        k, v = self.kv(u).view(len(u), 2, self.kv_heads, self.head_dim).unbind(1)
        several = self.heads // self.kv_heads
        k, v = self.turn(k, here), v
        return (k, v) if several == 1 else (k.repeat_interleave(several, 1), v.repeat_interleave(several, 1))

    def finish(self, r: Tensor, attended: Tensor) -> Tensor:
        """r: (rows, dim), attended: (rows, heads, head_dim) -> y (rows, dim)."""
        h = r + self.o(attended.flatten(1))
        gate, up = self.gate_up(self.mlp_norm(h)).chunk(2, -1)
        return h + self.down(F.silu(gate) * up)


class DraftAttention:
    """Attention of the positions of a batch: to their conversation up to themselves and, deeper in the draft, to the
    keys of their own draft, as in the training of EAGLE-3 (arXiv 2503.01840)."""

    def __init__(self, batch: Batch, k: Tensor, v: Tensor):
        """k, v: (tokens, heads, head_dim), of the text."""
        self.drafts = batch.drafts
        self.k, self.v = (batch.text.pad(x).transpose(1, 2) for x in (k, v))  # (sequences, heads, longest, head_dim)
        last = self.drafts.pad(batch.here[batch.positions])
        unseen = torch.arange(self.k.shape[2]) > last[:, :, None]
        self.mask = torch.zeros(unseen.shape).masked_fill(unseen, -torch.inf)[:, None]  # for all heads

    def text_alone(self, q: Tensor) -> Tensor:
        """q: (num, heads, head_dim) -> the same shape."""
        q = self.drafts.pad(q).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, self.k, self.v, attn_mask=self.mask)
        return self.drafts.unpad(y.transpose(1, 2))

    def text_and_draft(self, q: Tensor, own_k: list[Tensor], own_v: list[Tensor]) -> Tensor:
        """own_k, own_v: per earlier depth, (num, heads, head_dim). One softmax over scores of both kinds: a mask over
        the keys of all drafts, for one call of scaled_dot_product_attention, took longer."""
        scale, longest = q.shape[-1] ** -0.5, self.k.shape[2]
        own_k, own_v = torch.stack(own_k, 2), torch.stack(own_v, 2)  # (num, heads, own, head_dim)
        own = self.drafts.pad((own_k * q[:, :, None]).sum(-1) * scale).transpose(1, 2)
        text = (self.drafts.pad(q * scale).transpose(1, 2) @ self.k.transpose(2, 3)) + self.mask
        weights = torch.cat([text, own], 3).softmax(3)
        attended = self.drafts.unpad((weights[..., :longest] @ self.v).transpose(1, 2))
        own = self.drafts.unpad(weights[..., longest:].transpose(1, 2))
        return attended + (own[..., None] * own_v).sum(2)


class Eagle(DraftHead):
    """x_t = W [e_{t+1}; f_t] + b; f'_{t+1} = layer(x_t; attention over n(x_0) .. n(x_t)); logits_0 = LM(f'_{t+1}); loss
    CE + feature_weight SmoothL1(f', f), arXiv 2401.15077; deeper depths read their own f'."""

    supported: ClassVar[dict] = {"noise": 0.0}

    def __init__(self, config, backbone, embedding, lm_head):
        super().__init__(config, backbone, embedding, lm_head)
        self.depths, self.feature_weight = min(config["trained_depths"], self.num_depths), config["feature_weight"]
        self.join = nn.Linear(2 * self.dim, self.dim)
        self.norm = nn.RMSNorm(self.dim, eps=backbone.rms_norm_eps)
        self.block = DecoderBlock(backbone, backbone.max_positions + self.depths)  # drafts reach past the text

    def pair(self, feature: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """(r, u), (rows, dim) each: the residual of the layer, and the input of its attention."""
        x = self.join(torch.cat([e, feature], 1))
        return x, self.norm(x)

    def states(self, hidden, batch):
        block, here = self.block, batch.here[batch.positions]
        r, u = self.pair(hidden, F.embedding(batch.tokens[1 : batch.num_tokens + 1], self.embedding))
        attention = DraftAttention(batch, *block.keys_values(u, batch.here))
        tokens = F.embedding(batch.following(self.depths), self.embedding)
        y = block.finish(r[batch.positions], attention.text_alone(block.queries(u[batch.positions], here)))
        states, own_k, own_v = [y], [], []
        for depth in range(1, self.depths):
            r, u = self.pair(states[-1], tokens[depth])
            k, v = block.keys_values(u, here + depth)
            own_k, own_v = [*own_k, k], [*own_v, v]
            attended = attention.text_and_draft(block.queries(u, here + depth), own_k, own_v)
            states.append(block.finish(r, attended))
        return states, self.feature_weight * self.feature_loss(states, hidden, batch)

    def feature_loss(self, states: list[Tensor], hidden: Tensor, batch: Batch) -> Tensor:
        """Mean over the depths of SmoothL1 to the features that follow, within the conversation."""
        loss = 0.0
        for depth, y in enumerate(states):
            later = batch.positions + depth + 1
            rows = (later < batch.ends).nonzero()[:, 0]
            total = F.smooth_l1_loss(y[rows], hidden[later[rows]], reduction="sum")
            loss = loss + total / max(1, len(rows) * self.dim)
        return loss / len(states)


HEADS = {"mlp": Medusa, "hydra": Hydra, "gated_rnn": GatedRNN, "eagle": Eagle}


def build_head(
    name: str, config: Mapping, backbone: BackboneConfig, embedding: np.ndarray, lm_head: np.ndarray
) -> DraftHead:
    """The PyTorch head of this name. embedding, lm_head: (vocab, dim) float32. Raises ValueError for a name or an
    option that is not implemented here."""
    if name not in HEADS:
        raise suggest("head of the comparison", name, HEADS)
    return HEADS[name](config, backbone, *(torch.from_numpy(np.ascontiguousarray(x)) for x in (embedding, lm_head)))
