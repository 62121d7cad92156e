"""One Llama decoder layer over a key-value cache: one kernel on the CPU, ten launches in one call on CUDA.

    h = x + W_o attention(rope(W_q n1(x)), rope(W_k n1(x)), W_v n1(x))
    y = h + W_down (silu(W_gate n2(h)) * W_up n2(h))

(Llama, arXiv 2302.13971, with grouped-query attention, arXiv 2305.13245.) ``reference_decoder_layer`` reads like these
equations; ``decoder_layer`` computes the same in one call, with weights packed for the bodies that run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ops.kernel import launch, on_cpu
from ops.layer_weights import HEADER, LAYER, LayerShape, LayerWeights
from ops.tiles import input_bytes, num_slices
from runtime import jt

# C++ text shared by the kernels over layers.
SHAPE = """
        gorgon::Shape s{{{rows}, {hidden}, (int64_t)data["heads"], in{cache}_shape2, (int64_t)data["head_dim"],
                        (int64_t)data["inner"], in{cache}_shape3}};
"""
CUDA_FILES = ("linear.h", "norm.h", "attention.h", "attention_halves.h", "select.h", "pass.h")
DEALT = """
        gorgon::Dealt dealt{{in{tiles}_p, (int64_t)data["stretch"], in{tiles}_shape1, (int64_t)data["parts"],
                             (int64_t)data["keys"], data["whole"] != 0}};
        gorgon::Workspace work(out{scratch}_p, out{scratch}->num);
"""
# On CUDA: rows that go through a layer together; keys of a chunk of attention, as attention.h has it; queries that an
# mma takes; and how many times those there have to be for blocks to take all keys of their queries: blocks are then
# enough for 132 multiprocessors, and what split keys leave would be large. Only the second of them decides bits.
STRETCH, CHUNK_KEYS, TILE_QUERIES, MANY_TILES = 512, 128, 16, 512
NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Tiles:
    """How the queries of a pass are dealt out to blocks on CUDA. A tile's rows begin at the same slot.

    table: (stretches, most tiles of one, 4) int32: the first query, counted within the stretch; how many, 0 past the
    end; and, base apart, the keys that all rows have in common for as long as they go on, and the most keys of a row.
    parts: a tile has up to 16 * parts queries. keys: the most that any row sees, base apart.
    """

    table: object
    parts: int
    keys: int


class RowPlan:
    """Which keys each row of a pass sees, and where it writes its own. Made once per tree, used every pass.

    All offsets count from the cache length at the time of the pass. A row sees ``contiguous`` cache slots (the
    prefix, and its ancestors while they follow it without a gap), then the slots in ``extras``, in this order.

    Worked example, a root with two children, the second of which has one child: parents [-1, 0, 0, 2] give
    positions [0, 1, 1, 2]; ancestors and self [0], [0 1], [0 2], [0 2 3]; contiguous [1, 2, 1, 1] and extras
    [], [], [2], [2 3].
    """

    def __init__(self, parents: np.ndarray, positions: np.ndarray | None = None):
        parents = np.asarray(parents, np.int64)
        rows = len(parents)
        if parents.ndim != 1 or rows == 0 or (parents >= np.arange(rows)).any() or (parents < -1).any():
            raise ValueError(f"attend must name an earlier row or -1 for every row, got {parents.tolist()}")
        depths, contiguous = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        extras: list[list[int]] = []
        for row, parent in enumerate(parents):
            depths[row] = depths[parent] + 1 if parent >= 0 else 0
            before = contiguous[parent] if parent >= 0 else 0
            rest = extras[parent] if parent >= 0 else []
            joins = not rest and before == row
            contiguous[row] = before + 1 if joins else before
            extras.append([] if joins else [*rest, row])
        self._build(depths if positions is None else np.asarray(positions), np.arange(rows), 0, contiguous, extras)

    def _build(self, positions, slots, starts, contiguous, extras) -> None:
        rows = len(positions)
        table = np.full((rows, max(1, max(len(e) for e in extras))), -1, np.int32)
        for row, extra in enumerate(extras):
            table[row, : len(extra)] = extra
        meta = np.stack([positions, slots, np.broadcast_to(starts, (rows,)), contiguous], 1)
        self._hold(meta.astype(np.int32), table)

    def _hold(self, meta: np.ndarray, extras: np.ndarray) -> None:
        """meta: (rows, 4) int32: position, slot, start, contiguous; extras: (rows, width) int32, -1 past the end."""
        self.num_rows, self.positions = len(meta), meta[:, 0]
        self.meta_array, self.extras_array = meta, extras
        self.meta, self.extras = jt.array(meta), jt.array(extras)
        self.max_position = int(self.positions.max())
        self._tiles: dict[int, Tiles] = {}

    @classmethod
    def chain(cls, num_rows: int) -> RowPlan:
        """Rows that follow each other, as in a prompt."""
        plan = cls.__new__(cls)
        rows = np.arange(num_rows)
        plan._build(rows, rows, 0, rows + 1, [[]] * num_rows)
        return plan

    @classmethod
    def sequences(cls, lengths) -> RowPlan:
        """Several causal sequences behind each other, none of which sees another. lengths: (sequences,)."""
        plan = cls.__new__(cls)
        lengths = np.asarray(lengths, np.int64)
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        rows = np.arange(lengths.sum())
        plan._build(rows - starts, rows, starts, rows - starts + 1, [[]] * len(rows))
        return plan

    @classmethod
    def lanes(cls, lengths, capacity: int) -> RowPlan:
        """One new row for each of several sequences, each in its own stretch of ``capacity`` cache slots."""
        starts = np.arange(len(lengths)) * capacity
        return cls.behind([cls.single()] * len(starts), starts, lengths)

    @staticmethod
    @functools.cache
    def single() -> RowPlan:
        """One row."""
        return RowPlan.chain(1)

    @classmethod
    def behind(cls, plans: Sequence[RowPlan], starts, lengths) -> RowPlan:
        """Several plans in one pass, each behind a sequence of its own: that of plan i begins at slot ``starts[i]`` and
        has ``lengths[i]`` rows. For a pass over a cache whose own length is 0.

        Worked example, two chains of 2 rows behind 3 rows from slot 0 and 5 rows from slot 20: positions [3 4 5 6],
        slots [3 4 25 26], starts [0 0 20 20], contiguous [4 5 6 7].
        """
        plan, lengths = cls.__new__(cls), np.asarray(lengths, np.int32)
        begins = np.asarray(starts, np.int32)
        counts = np.array([each.num_rows for each in plans])
        length, begin = np.repeat(lengths, counts), np.repeat(begins, counts)
        meta = np.concatenate([each.meta_array for each in plans])
        meta = meta + np.stack([length, begin + length, begin, length], 1)
        width = max(each.extras_array.shape[1] for each in plans)
        extras = np.full((len(meta), width), -1, np.int32)
        for row, each in zip(np.cumsum(counts) - counts, plans, strict=True):
            extras[row : row + each.num_rows, : each.extras_array.shape[1]] = each.extras_array
        extras = np.where(extras < 0, -1, extras + (begin + length)[:, None])
        plan._hold(meta.astype(np.int32), extras.astype(np.int32))
        return plan

    def tiles(self, group: int) -> Tiles:
        """The queries of a key-value head that ``group`` query heads share, row by row, in tiles.

        Worked example, tiles of 16 queries, group 4: the tree of the class's example has one tile, [0, 16, 1, 3]: rows
        2 and 3 have extras behind 1 common key, row 3 sees 3 keys. Two chains of 2 rows behind prefixes of 3 and 5 have
        the tiles [0, 8, none, 5] and [8, 8, none, 7].
        """
        if group not in self._tiles:
            starts, contiguous = self.meta_array[:, 2], self.meta_array[:, 3]
            more = (self.extras_array >= 0).sum(1)
            keys, shared = contiguous + more, np.where(more > 0, contiguous, NO_LIMIT)
            rows = np.arange(self.num_rows)
            begins = np.flatnonzero((rows % STRETCH == 0) | np.append(True, starts[1:] != starts[:-1]))
            ends = np.append(begins[1:], self.num_rows)
            longest = int((ends - begins).max()) * group
            parts = min(4, 1 << max(0, (-(-longest // TILE_QUERIES) - 1).bit_length()))
            stretches: list[list] = [[] for _ in range(-(-self.num_rows // STRETCH))]
            for begin, end in zip(begins * group, ends * group, strict=True):
                for first in range(begin, end, TILE_QUERIES * parts):
                    last = min(end, first + TILE_QUERIES * parts)
                    seen, stretch = slice(first // group, (last - 1) // group + 1), first // group // STRETCH
                    tile = (first - stretch * STRETCH * group, last - first, shared[seen].min(), keys[seen].max())
                    stretches[stretch].append(tile)
            table = np.zeros((len(stretches), max(map(len, stretches)), 4), np.int32)
            for place, tiles in enumerate(stretches):
                table[place, : len(tiles)] = tiles
            self._tiles[group] = Tiles(jt.array(table), parts, int(keys.max()))
        return self._tiles[group]

    def mask(self, base: int, num_slots: int) -> np.ndarray:
        """The same as a boolean matrix (rows, num_slots): True where the row may look. For the reference."""
        seen = np.zeros((self.num_rows, num_slots), bool)
        for row, (_, _, start, contiguous) in enumerate(self.meta_array):
            seen[row, start : start + contiguous + base] = True
            extra = self.extras_array[row]
            seen[row, base + extra[extra >= 0]] = True
        return seen


def reference_rms_norm(x, weight, eps: float):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467). x: (rows, dim) float32."""
    return x * jt.rsqrt(x.sqr().mean(-1, keepdims=True) + eps) * weight


def reference_rope(x, cosine, sine):
    """Rotary embedding (arXiv 2104.09864), half-split layout. x: (rows, heads, d); cosine, sine: (rows, d / 2)."""
    half = x.shape[-1] // 2
    a, b = x[:, :, :half], x[:, :, half:]
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    return jt.concat([a * cosine - b * sine, b * cosine + a * sine], -1)


def reference_decoder_layer(x, w: LayerWeights, plan: RowPlan, cosine, sine, cache, layer: int, base: int):
    """Plain Jittor. Takes weights as (out, in); returns (y (rows, dim), the layer's new cache plane)."""
    s = w.shape
    rows, q_width, kv_width = x.shape[0], s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    positions = jt.array(plan.positions + base)
    cosine, sine = cosine[positions], sine[positions]

    def linear(x, weight):
        return jt.nn.matmul_transpose(x, weight.float32())

    qkv = linear(reference_rms_norm(x, w.norm1, s.eps), w.qkv)
    q = reference_rope(qkv[:, :q_width].reshape(rows, s.num_heads, s.head_dim), cosine, sine)
    k = reference_rope(qkv[:, q_width : q_width + kv_width].reshape(rows, s.num_kv_heads, s.head_dim), cosine, sine)
    v = qkv[:, q_width + kv_width :].reshape(rows, s.num_kv_heads, s.head_dim)
    slots = jt.array(plan.meta_array[:, 1] + base)
    plane = cache[layer]  # (2, kv_heads, max_length, padded head_dim)
    # Unlike NumPy, Jittor leaves the indexed dimension in its place: (kv_heads, rows, head_dim).
    plane[0, :, slots, : s.head_dim] = k.transpose(1, 0, 2).cast(plane.dtype)
    plane[1, :, slots, : s.head_dim] = v.transpose(1, 0, 2).cast(plane.dtype)
    group = s.num_heads // s.num_kv_heads
    keys, values = plane[0, :, :, : s.head_dim].float32(), plane[1, :, :, : s.head_dim].float32()
    seen = jt.array(plan.mask(base, plane.shape[2]).astype(np.float32))
    heads = []
    for h in range(s.num_heads):
        scores = jt.nn.matmul_transpose(q[:, h], keys[h // group]) / s.head_dim**0.5
        heads.append(jt.matmul(jt.nn.softmax(scores * seen - 1e9 * (1 - seen), -1), values[h // group]))
    h = x + linear(jt.concat(heads, -1), w.o)
    gate_up = linear(reference_rms_norm(h, w.norm2, s.eps), w.gate_up)
    gate, up = gate_up[:, : s.intermediate_size], gate_up[:, s.intermediate_size :]
    return h + linear(gate * gate.sigmoid() * up, w.down), plane


@dataclass(frozen=True)
class Work:
    """What the CUDA bodies need beyond weights and cache. tiles: those of the plan. data: the numbers that go with
    them. scratch: bytes for the buffers that the layers share, as ``Scratch`` in ``pass.h`` takes them, which refuses
    any other number."""

    tiles: object
    data: dict
    scratch: int


def aligned(*sizes: int) -> int:
    """Bytes of buffers behind each other, each a multiple of 256."""
    return sum(-(-size // 256) * 256 for size in sizes)


def plan_work(plan: RowPlan, s: LayerShape, weights: LayerWeights, cache, base: int, own_state: bool) -> Work:
    """For a pass of ``plan`` over ``cache`` behind ``base`` rows. own_state: whether the scratch holds x too."""
    tiles = plan.tiles(s.num_heads // s.num_kv_heads)
    stretches, most, _ = tiles.table.shape
    keys = base + tiles.keys
    chunks, whole = -(-keys // CHUNK_KEYS), most * tiles.parts * s.num_kv_heads >= MANY_TILES
    if whole or chunks == 1:
        chunks = 0
    rows, dtype, padded = min(plan.num_rows, STRETCH), str(weights.packed.dtype), cache.shape[4]
    q_width, queries = s.num_heads * s.head_dim, rows * s.num_heads
    products = [
        (q_width + 2 * s.num_kv_heads * s.head_dim, s.hidden_size),
        (s.hidden_size, q_width),
        (2 * s.intermediate_size, s.hidden_size),
        (s.hidden_size, s.intermediate_size),
    ]
    scratch = aligned(
        4 * plan.num_rows * s.hidden_size if own_state else 0,
        stretches * input_bytes(dtype, rows, s.hidden_size),
        input_bytes(dtype, rows, q_width),
        input_bytes(dtype, rows, s.intermediate_size),
        queries * padded * (4 if str(cache.dtype) == "float32" else 2),
        4 * rows * max(num_slices(*product) * product[0] for product in products),
        4 * chunks * queries * padded,
        4 * chunks * queries * 2,
    )
    return Work(tiles.table, {"stretch": STRETCH, "parts": tiles.parts, "keys": keys, "whole": int(whole)}, scratch)


def decoder_layer(x, w: LayerWeights, plan: RowPlan, cosine, sine, cache, layer: int, base: int):
    """One layer; writes the keys and values of the rows into ``cache`` in place.

    x: (rows, dim) float32; cosine, sine: (positions, head_dim / 2) float32; cache: (layers, 2, kv_heads, max_length,
    head_dim rounded up to 16) float16 or float32, already computed; base: rows in the cache before this pass.
    Returns y: (rows, dim) float32.
    """
    assert x.shape[0] == plan.num_rows, (x.shape, plan.num_rows)
    inputs = [x, plan.meta, plan.extras, cosine, sine, cache, *w.inputs]
    work = None if on_cpu() else plan_work(plan, w.shape, w, cache, base, own_state=False)
    source = f"""
        {SHAPE.format(rows="in0_shape0", hidden="in0_shape1", cache=5)}
        gorgon::Plan plan{{in1_p, in2_p, in2_shape1, (int64_t)data["base"]}};
        auto* cache = gorgon::raw(in5_p) + (int64_t)data["layer"] * in5_stride0;
        {LAYER.format(packed=7)} layer{w.source(6)};
        """
    found = launch(
        tuple(x.shape) if work is None else [tuple(x.shape), (work.scratch,)],
        "float32" if work is None else ["float32", "uint8"],
        inputs if work is None else [*inputs, work.tiles],
        cpu=source
        + """gorgon::decoder_layer(s, plan, in0_p, layer, in3_p, in4_p, (float)data["eps"], cache, out0_p);
        """,
        cuda=source
        + DEALT.format(tiles=len(inputs), scratch=1)
        + f"""
        gorgon::decoder_layer<{cache.shape[4]}>(s, plan, dealt, in0_p, layer, in3_p, in4_p, (float)data["eps"], cache,
                                               work, out0_p);
        """,
        cpu_files=HEADER,
        cuda_files=CUDA_FILES,
        data={**w.shape.data(), "layer": layer, "base": base, **({} if work is None else work.data)},
    )
    return found if work is None else found[0]


def rms_norm(x, weight, eps: float):
    """x / sqrt(mean(x^2) + eps) * weight. x: (rows, dim) float32, weight: (dim,) float32."""
    return launch(
        tuple(x.shape),
        "float32",
        [x, weight],
        cpu='gorgon::rms_norm_share(in0_p, in0_shape0, in0_shape1, in1_p, (float)data["eps"], out0_p, 0, 1);',
        cuda='gorgon::rms_norm(in0_p, in0_shape0, in0_shape1, in1_p, (float)data["eps"], out0_p);',
        cuda_files=["linear.h", "norm.h"],
        data={"eps": eps},
    )


def keep_rows(cache, sources: np.ndarray, targets: np.ndarray) -> None:
    """Move cache rows from ``sources`` to ``targets``, (moved,) int32 each, in place, in every layer, in this order:
    no row may be a target before it has been a source."""
    call = """
        gorgon::keep_rows(gorgon::raw(in0_p), in0_shape0 * in0_shape1 * in0_shape2, in0_shape3, in0_shape4, in1_p,
                          in1_p + in1_shape1, in1_shape1);
        """
    done = launch(
        (1,),
        "int32",
        [cache, jt.array(np.stack([sources, targets]).astype(np.int32))],
        cpu=call + "out0_p[0] = 0;\n        ",
        cuda=call,
        cpu_files=HEADER,
        cuda_files=CUDA_FILES,
    )
    done.sync()
