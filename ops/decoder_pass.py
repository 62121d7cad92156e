"""A pass of the frozen decoder in one call: embedding, layers, final norm, logits and their argmax.

Each layer of a Llama (arXiv 2302.13971, with grouped-query attention, arXiv 2305.13245) computes

    h = x + W_o attention(rope(W_q n1(x)), rope(W_k n1(x)), W_v n1(x))
    y = h + W_down (silu(W_gate n2(h)) * W_up n2(h))

A pass of the embedded backbone takes a tenth of a millisecond, and each operation handed to Jittor takes some
microseconds of it, so one call serves all layers. On CUDA the same call makes ten launches a layer. The equations
operation by operation are in ``tests/ops/references.py``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ops.kernel import launch, on_cpu
from ops.layer_weights import CPU_FILES, LAYER, LayerShape, LayerWeights
from ops.linear import PackedLinear
from ops.packing.tiles import input_bytes, num_slices
from ops.row_plan import RowPlan
from runtime import jt
from runtime.types import Var

# C++ text of the kernel: sizes and, on CUDA, how its queries are dealt out.
SHAPE = """
        gorgon::Shape s{in0_shape0, out0_shape1, (int64_t)data["heads"], in8_shape2, (int64_t)data["head_dim"],
                        (int64_t)data["inner"], in8_shape3};
"""
DEALT = """
        gorgon::Dealt dealt{{in{tiles}_p, (int64_t)data["stretch"], in{tiles}_shape1, (int64_t)data["parts"],
                             (int64_t)data["keys"], data["whole"] != 0}};
        gorgon::Workspace work(out{scratch}_p, out{scratch}->num);
"""
CUDA_FILES = ("linear.h", "norm.h", "attention.h", "attention_halves.h", "select.h", "pass.h")
# On CUDA: keys of a chunk of attention, as attention.h has it, and from how many tiles of queries on blocks take all
# keys of their queries: blocks are then enough for 132 multiprocessors, and what split keys leave would be large. Only
# the first of them decides bits.
CHUNK_KEYS, MANY_TILES = 128, 512


@dataclass
class Decoder:
    """The frozen weights of a decoder. embedding: (vocab, dim); norm: (dim,) float32, the final one."""

    layers: list[LayerWeights]
    embedding: Var
    norm: Var
    lm_head: PackedLinear


@dataclass
class PassOutput:
    """hidden: (rows, dim) float32, after the final norm. taken: (wanted layers, rows, dim) float32. logits: (logit
    rows, vocab) float32 and chosen: (logit rows,) int32, the index of each row's largest logit; None without any."""

    hidden: Var
    taken: Var
    logits: Var | None
    chosen: Var | None


@functools.lru_cache(maxsize=64)
def _places(wanted: tuple[int, ...], num_layers: int):
    """(num_layers + 1,) int32: the place of the state before layer i in ``taken``, -1 for none."""
    places = np.full(num_layers + 1, -1, np.int32)
    places[list(wanted)] = np.arange(len(wanted))
    return jt.array(places)


@dataclass(frozen=True)
class Work:
    """What the CUDA bodies need besides weights and cache. tiles: of the plan. data: numbers about them. scratch: bytes
    of the buffers that the layers share; ``Scratch`` in ``pass.h`` refuses any other number."""

    tiles: Var
    data: dict
    scratch: int


def aligned(*sizes: int) -> int:
    """Bytes of several buffers, each rounded up to a multiple of 256."""
    return sum(-(-size // 256) * 256 for size in sizes)


def plan_work(plan: RowPlan, s: LayerShape, weights: LayerWeights, cache, base: int) -> Work:
    """The work of a pass of ``plan`` over ``cache`` after ``base`` rows."""
    tiles = plan.tiles(s.num_heads // s.num_kv_heads)
    stretches, most, _ = tiles.table.shape
    keys = base + tiles.keys
    chunks, whole = -(-keys // CHUNK_KEYS), most * tiles.parts * s.num_kv_heads >= MANY_TILES
    if whole or chunks == 1:
        chunks = 0
    rows, dtype, padded = min(plan.num_rows, tiles.stretch), str(weights.packed.dtype), cache.shape[4]
    q_width, queries = s.num_heads * s.head_dim, rows * s.num_heads
    products = [
        (q_width + 2 * s.num_kv_heads * s.head_dim, s.hidden_size),
        (s.hidden_size, q_width),
        (2 * s.intermediate_size, s.hidden_size),
        (s.hidden_size, s.intermediate_size),
    ]
    scratch = aligned(
        4 * plan.num_rows * s.hidden_size,
        stretches * input_bytes(dtype, rows, s.hidden_size),
        input_bytes(dtype, rows, q_width),
        input_bytes(dtype, rows, s.intermediate_size),
        queries * padded * (4 if str(cache.dtype) == "float32" else 2),
        4 * rows * max(num_slices(*product) * product[0] for product in products),
        4 * chunks * queries * padded,
        4 * chunks * queries * 2,
    )
    return Work(
        tiles.table, {"stretch": tiles.stretch, "parts": tiles.parts, "keys": keys, "whole": int(whole)}, scratch
    )


def decoder_pass(
    decoder: Decoder, token_ids, plan: RowPlan, cosine, sine, cache, base: int, wanted=(), logit_rows: int = 0
) -> PassOutput:
    """One pass; writes the keys and values of the rows into ``cache`` in place.

    token_ids: (rows,) int32 Var. cosine, sine: (positions, head_dim / 2) float32. cache: (layers or 1, 2, kv_heads,
    max_length, head_dim rounded up to 16), already computed; with one plane all layers use it in turn, which is
    enough for a pass without a past. base: rows in the cache before this pass. wanted: ascending indices of states to
    return; 0 is the embedding, i the output of layer i. logit_rows: the last rows that get logits.
    """
    wanted, layers = tuple(wanted), decoder.layers
    rows, shape = token_ids.shape[0], layers[0].shape
    assert rows == plan.num_rows, (rows, plan.num_rows)
    assert 0 <= logit_rows <= rows, (logit_rows, rows)
    dim, vocab = shape.hidden_size, decoder.lm_head.num_out
    first = 10
    per_layer = len(layers[0].inputs)
    listed = ",\n        ".join(layer.source(first + i * per_layer) for i, layer in enumerate(layers))
    shapes = [
        (rows, dim),
        (max(1, len(wanted)), rows if wanted else 1, dim),
        (max(1, logit_rows), vocab if logit_rows else 1),
        (max(1, logit_rows),),
    ]
    dtypes = ["float32", "float32", "float32", "int32"]
    inputs = [
        token_ids,
        plan.meta,
        plan.extras,
        decoder.embedding,
        decoder.norm,
        decoder.lm_head.packed,
        cosine,
        sine,
        cache,
        _places(wanted, len(layers)),
        *[each for layer in layers for each in layer.inputs],
    ]
    data = {**shape.data(), "base": base, "vocab": vocab, "logit_rows": logit_rows}
    source = f"""
        {SHAPE}
        gorgon::Plan plan{{in1_p, in2_p, in2_shape1, (int64_t)data["base"]}};
        auto* embedding = gorgon::raw(in3_p);
        gorgon::Ends<std::remove_const_t<std::remove_reference_t<decltype(*embedding)>>> ends{{
            in0_p, embedding, in4_p, gorgon::raw(in5_p), (int64_t)data["vocab"], (int64_t)data["logit_rows"], in9_p}};
        std::vector<{LAYER.format(packed=first + 1)}> layers = {{
        {listed}}};
        """
    cuda = f"""
        {DEALT.format(tiles=len(inputs), scratch=len(shapes))}
        gorgon::decoder_pass<{cache.shape[4]}>(s, plan, dealt, ends, layers, in6_p, in7_p, (float)data["eps"],
                                              gorgon::raw(in8_p), in8_shape0 > 1 ? in8_stride0 : 0, work, out0_p,
                                              out1_p, out2_p, out3_p);
        """
    if not on_cpu():
        work = plan_work(plan, shape, layers[0], cache, base)
        split, head = num_slices(vocab, dim), str(decoder.lm_head.packed.dtype)
        around = aligned(
            input_bytes(head, logit_rows, dim),
            4 * split * min(logit_rows, work.data["stretch"]) * vocab if split > 1 else 0,
            4 * logit_rows,
        )
        shapes.append((work.scratch + around,))
        dtypes.append("uint8")
        inputs.append(work.tiles)
        data |= work.data
    hidden, taken, logits, chosen = launch(
        shapes,
        dtypes,
        inputs,
        cpu=source
        + """gorgon::decoder_pass(s, plan, ends, layers, in6_p, in7_p, (float)data["eps"], gorgon::raw(in8_p),
                             in8_shape0 > 1 ? in8_stride0 : 0, out0_p, out1_p, out2_p, out3_p);
        """,
        cuda=source + cuda,
        cpu_files=CPU_FILES,
        cuda_files=CUDA_FILES,
        data=data,
    )[:4]
    return PassOutput(hidden, taken if wanted else None, *((logits, chosen) if logit_rows else (None, None)))
