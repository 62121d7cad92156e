"""A trainable decoder layer, and the drafting loop of heads that are one such layer over features and tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heads.base import Head, HeadOutput
from heads.layers import Linear, RMSNorm
from ops.attention import attention, rotary
from ops.cache_rows import write_rows
from runtime import jt


class DecoderBlock(jt.Module):
    """One Llama decoder layer (arXiv 2302.13971) whose attention input is the caller's business:

        h = r + W_o attention(rope(W_q u), rope(W_k u), W_v u)
        y = h + W_down (silu(W_gate n(h)) * W_up n(h))

    r: (rows, dim), the residual stream; u: (rows, num_in), what attention looks at. The sizes and the rotary embedding
    are the backbone's. Queries may be fewer than keys, and a row may have keys that only it sees.
    """

    def __init__(self, backbone, num_in: int | None = None):
        super().__init__()
        c = backbone.config
        num_in = num_in or c.hidden_size
        self.num_heads, self.num_kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        self.rotary_tables = backbone.rotary_tables
        self.q = Linear(num_in, c.num_heads * c.head_dim, bias=False)
        self.kv = Linear(num_in, 2 * c.num_kv_heads * c.head_dim, bias=False)
        self.o = Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)
        self.mlp_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.gate_up = Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def tables(self, positions: np.ndarray):
        """cos and sin for these positions, (rows, head_dim / 2) each. positions: (rows,) int."""
        cosine, sine = self.rotary_tables(int(positions.max()) + 1)
        index = jt.array(positions.astype(np.int32))
        return cosine[index], sine[index]

    def keys_values(self, u, tables):
        """Keys, turned, and values. u: (rows, num_in) -> two of (rows, kv_heads, head_dim)."""
        kv = self.kv(u).reshape(u.shape[0], 2, self.num_kv_heads, self.head_dim)
        return rotary(kv[:, 0], *tables), kv[:, 1]

    def execute(self, r, u, tables, k, v, first, count, own_k=None, own_v=None):
        """r: (rows, dim); u: (rows, num_in); k, v: (tokens, kv_heads, head_dim); row i sees the keys first[i] ..
        first[i] + count[i] - 1 and its own, (rows, own, kv_heads, head_dim). Returns y: (rows, dim)."""
        rows = r.shape[0]
        q = rotary(self.q(u).reshape(rows, self.num_heads, self.head_dim), *tables)
        h = r + self.o(attention(q, k, v, first, count, own_k, own_v).reshape(rows, -1))
        gate_up = self.gate_up(self.mlp_norm(h))
        inner = gate_up.shape[1] // 2
        gate, up = gate_up[:, :inner], gate_up[:, inner:]
        return h + self.down(gate * gate.sigmoid() * up)

    def over(self, r, u, lengths: np.ndarray, positions: np.ndarray):
        """A batch of sequences. r: (tokens, dim), u: (tokens, num_in), sequences of these lengths behind each other;
        positions: (num,) int, the rows whose output is wanted. Returns y (num, dim) and the ``Context`` of the rows."""
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        everywhere = np.arange(len(starts)) - starts  # each row's position within its sequence
        k, v = self.keys_values(u, self.tables(everywhere))
        here = everywhere[positions]
        context = Context(k, v, starts[positions].astype(np.int32), (here + 1).astype(np.int32), here)
        wanted = jt.array(np.asarray(positions, np.int32))
        return self(r[wanted], u[wanted], self.tables(here), k, v, context.first, context.count), context

    def extend(self, cache: HeadCache, r, u):
        """New rows of one text. r: (rows, dim), u: (rows, num_in). Adds them to the cache, returns the last one's y,
        (1, dim)."""
        here = cache.length + np.arange(r.shape[0])
        tables = self.tables(here)
        cache.append(*self.keys_values(u, tables))
        last = len(here) - 1
        tables = tuple(table[last:] for table in tables)
        return self(r[last:], u[last:], tables, cache.keys, cache.values, *cache.seen_by(1))


@dataclass
class Context:
    """What some rows of a batch see: k, v: (tokens, kv_heads, head_dim); first, count, here: (rows,), the first key a
    row sees, how many, and its position within its sequence."""

    k: object
    v: object
    first: np.ndarray
    count: np.ndarray
    here: np.ndarray


class HeadCache:
    """Keys and values of a head's own layer for one text; grows as needed."""

    def __init__(self, block: DecoderBlock, capacity: int = 512):
        self.shape, self.length = (block.num_kv_heads, block.head_dim), 0
        self._allocate(capacity)

    def _allocate(self, capacity: int) -> None:
        self.capacity = capacity
        self.keys, self.values = (jt.zeros((capacity, *self.shape)) for _ in range(2))
        jt.sync([self.keys, self.values])  # they are written in place: each needs memory of its own

    def append(self, k, v) -> None:
        """Add rows. k, v: (rows, kv_heads, head_dim)."""
        rows = k.shape[0]
        if self.length + rows > self.capacity:
            old = self.keys, self.values
            self._allocate(max(2 * self.capacity, self.length + rows))
            for cache, part in zip((self.keys, self.values), old, strict=True):
                write_rows(cache, part[: self.length], 0)
        write_rows(self.keys, k, self.length)
        write_rows(self.values, v, self.length)
        self.length += rows

    def seen_by(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """(first, count) of rows that see all of it."""
        return np.zeros(rows, np.int32), np.full(rows, self.length, np.int32)


class LayerHead(Head):
    """A head that is one decoder layer over pairs (feature, next token), autoregressive on its own output.

    Position t pairs its feature with token t + 1; the layer's output y_t scores token t + 2 and stands in for the
    feature of t + 1, which the backbone has not computed yet. So depth k >= 1 pairs y of depth k - 1 with the token
    drafted there. It sees the pairs of the text up to t, and the k pairs of its own draft.

    A subclass says what a feature is, how a pair enters the layer and how an output becomes logits.
    """

    def context(self, features):
        """The features of a batch, (batch * seq, dim)."""
        return features.hidden.reshape(-1, self.dim)

    def pair(self, feature, token_ids):
        """feature: (rows, dim), token_ids: (rows,) -> r (rows, dim), u (rows, num_in), see ``DecoderBlock``."""
        raise TypeError(f"{type(self).__name__} does not define pair")

    def logits(self, y):
        """y: (rows, dim) -> (rows, vocab)."""
        raise TypeError(f"{type(self).__name__} does not define logits")

    def project(self, y):
        """``logits`` for the loss: themselves, or the ``Projection`` that they would be."""
        return self.logits(y)

    def unroll(self, feature, lengths: np.ndarray, token_ids: np.ndarray, positions: np.ndarray, num_depths: int):
        """The layer's outputs at the wanted positions under the true tokens, one (num, dim) per depth.

        feature: (tokens, dim); lengths: of the sequences; token_ids, positions: as ``execute`` takes them.
        """
        tokens = np.asarray(token_ids)
        r, u = self.pair(feature, self.following(tokens, np.arange(feature.shape[0]), 0))
        y, seen = self.block.over(r, u, lengths, positions)
        outputs = [y]
        own: list[tuple] = []
        for depth in range(1, num_depths):
            tables = self.block.tables(seen.here + depth)
            r, u = self.pair(outputs[-1], self.following(tokens, positions, depth))
            own.append(self.block.keys_values(u, tables))
            own_k, own_v = (jt.stack([each[i] for each in own], 1) for i in (0, 1))
            outputs.append(self.block(r, u, tables, seen.k, seen.v, seen.first, seen.count, own_k, own_v))
        return outputs

    def execute(self, features, token_ids, positions) -> HeadOutput:
        lengths = self.sequence_lengths(features)
        outputs = self.unroll(self.context(features), lengths, token_ids, np.asarray(positions), self.num_depths)
        return HeadOutput([self.project(y) for y in outputs])

    def begin(self, features, token_ids, state=None):
        cache = HeadCache(self.block) if state is None else state[0]
        y = self.block.extend(cache, *self.pair(self.context(features), token_ids[0]))
        return cache, 0, y, None, None

    def step(self, state, token_ids, parents):
        cache, depth, y, own_k, own_v = state
        if depth > 0:  # the root's pair is the last one that begin has seen
            r, u = self.pair(y[parents], token_ids)
            nodes = r.shape[0]
            tables = self.block.tables(np.full(nodes, cache.length - 1 + depth))
            new = (part.unsqueeze(1) for part in self.block.keys_values(u, tables))
            old = (own_k, own_v)
            own_k, own_v = (
                part if kept is None else jt.concat([kept[parents], part], 1)
                for kept, part in zip(old, new, strict=True)
            )
            y = self.block(r, u, tables, cache.keys, cache.values, *cache.seen_by(nodes), own_k, own_v)
        return self.logits(y), (cache, depth + 1, y, own_k, own_v)
