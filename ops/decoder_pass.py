"""A whole pass of the frozen decoder in one call: embedding, layers, final norm, logits, their argmax.

A pass of the embedded backbone takes a tenth of a millisecond, and each operation handed to Jittor some microseconds of
it, so one call serves all layers; on CUDA it makes all launches. ``reference_decoder_pass`` is the same, layer by
layer, from the references.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ops.decoder_layer import (
    CUDA_FILES,
    DEALT,
    SHAPE,
    RowPlan,
    aligned,
    plan_work,
    reference_decoder_layer,
    reference_rms_norm,
)
from ops.kernel import launch, on_cpu
from ops.layer_weights import HEADER, LAYER, LayerWeights
from ops.linear import PackedLinear, reference_linear
from ops.select import argmax
from ops.tiles import input_bytes, num_slices
from runtime import jt


@dataclass
class Decoder:
    """The frozen weights of a decoder. embedding: (vocab, dim); norm: (dim,) float32, the final one."""

    layers: list[LayerWeights]
    embedding: object
    norm: object
    lm_head: PackedLinear


@dataclass
class PassOutput:
    """hidden: (rows, dim) float32, after the final norm. taken: (wanted layers, rows, dim) float32. logits: (logit
    rows, vocab) float32 and chosen: (logit rows,) int32, the index of each row's largest logit; None without any."""

    hidden: object
    taken: object
    logits: object | None
    chosen: object | None


@functools.lru_cache(maxsize=64)
def _places(wanted: tuple[int, ...], num_layers: int):
    """(num_layers + 1,) int32: where the state before layer i goes among the wanted ones, -1 for nowhere."""
    places = np.full(num_layers + 1, -1, np.int32)
    places[list(wanted)] = np.arange(len(wanted))
    return jt.array(places)


def reference_decoder_pass(decoder: Decoder, token_ids, plan, cosine, sine, cache, base: int, wanted, logit_rows: int):
    """Plain Jittor, weights as (out, in). Does not write ``cache``: returns (PassOutput, its new planes)."""
    x = decoder.embedding[token_ids].float32()
    states, planes = [x], []
    shared = cache.shape[0] == 1  # a pass without a cache needs one layer's keys at a time
    for index, layer in enumerate(decoder.layers):
        x, plane = reference_decoder_layer(x, layer, plan, cosine, sine, cache, 0 if shared else index, base)
        states.append(x)
        planes.append(plane)
    eps = decoder.layers[0].shape.eps
    hidden = reference_rms_norm(x, decoder.norm, eps)
    taken = jt.stack([states[i] for i in wanted]) if wanted else None
    if not logit_rows:
        return PassOutput(hidden, taken, None, None), planes
    logits = reference_linear(hidden[hidden.shape[0] - logit_rows :], decoder.lm_head.packed)
    return PassOutput(hidden, taken, logits, argmax(logits)), planes


def decoder_pass(
    decoder: Decoder, token_ids, plan: RowPlan, cosine, sine, cache, base: int, wanted=(), logit_rows: int = 0
) -> PassOutput:
    """One pass; writes the keys and values of the rows into ``cache`` in place.

    token_ids: (rows,) int32 Var. cosine, sine: (positions, head_dim / 2) float32. cache: (layers or 1, 2, kv_heads,
    max_length, head_dim rounded up to 16), already computed; with one plane all layers use it in turn, which is all
    that a pass without a past needs. base: rows in the cache before this pass. wanted: ascending indices of states to
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
        {SHAPE.format(rows="in0_shape0", hidden="out0_shape1", cache=8)}
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
        work = plan_work(plan, shape, layers[0], cache, base, own_state=True)
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
        cpu_files=HEADER,
        cuda_files=CUDA_FILES,
        data=data,
    )[:4]
    return PassOutput(hidden, taken if wanted else None, *((logits, chosen) if logit_rows else (None, None)))
