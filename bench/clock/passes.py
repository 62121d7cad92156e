"""Times the passes of a backbone by rows and context, beside what the machine allows.

A GPU call returns when its kernels are launched, so every timed call waits for the device, except those that measure
the launching itself.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import runtime
from backbone.cache import KVCache
from backbone.config import BackboneConfig
from backbone.model import Backbone
from bench.clock.footprint import cache_view, describe_memory, footprint, pass_calls, pass_tokens
from bench.clock.machine import Readings, free_memory
from bench.clock.memory import rss
from bench.clock.shapes import (
    ITEM_BYTES,
    TINY,
    build_backbone,
    check_memory,
    largest_matrix,
    pass_bytes,
    pass_flops,
    shape_config,
    usual_contexts,
)
from bench.clock.timing import interleave, spread_ms
from bench.measure.warmup import kernels_since, loaded_kernels
from bench.record.engine import Bounded, Host, Matrix, Memory, Pass, Peer, Shape, Time
from decoding.generate import generate_autoregressive
from ops.linear import PackedLinear
from ops.row_plan import RowPlan
from runtime import jt, synchronize, warm

DOUBTFUL = 1.5  # transformers' time in turns with ours over its trial's
PROMPT = 40  # tokens, of the text that transformers and our engine both continue
QUEUED = 8  # passes that are launched before the first is waited for
# The sizes of a shape that its record holds.
SIZES = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size")
ROW_UNIT = 128  # a cache's rows are a multiple of this


@dataclass
class Work:
    """What is measured of every shape. rows, contexts: ascending, contexts None for the shape's usual ones; tokens: of
    the text that both engines continue; find_peer: of ``bench.peers.torch_llama``, to measure it beside ours."""

    rows: list[int]
    contexts: list[int] | None
    repeats: int
    dtype: str
    tokens: int
    find_peer: Callable | None = None


@dataclass
class Timed:
    """A shape's raw figures: seconds by ("pass", rows, context), ("linear", rows), "ours" and "theirs", and on a GPU
    ("host", rows) and ("queued", rows). peer: a ``bench.peers.torch_llama.Choice``, None if none was measured."""

    name: str
    config: BackboneConfig
    dtype: str
    seconds: dict
    memory: Memory
    readings: Readings
    peer: Any = None


def cache_rows(config: BackboneConfig, work: Work) -> int:
    """Rows of the cache that all contexts share: room for the longest one and its pass, in units of ROW_UNIT."""
    needed = max(fitting_contexts(config, work)) + max(work.rows)
    return min(config.max_positions, -(-needed // ROW_UNIT) * ROW_UNIT)


def fitting_contexts(config: BackboneConfig, work: Work) -> list[int]:
    """The contexts after which the most rows still have positions."""
    return [each for each in work.contexts or usual_contexts(config) if each + max(work.rows) <= config.max_positions]


def check_shapes(names: list[str], work: Work) -> list[str]:
    """Check that every shape can be measured, before the first is; returns notes on contexts that are left out.

    Raises ValueError for an unknown shape, one without a context that fits, and one that does not fit into memory.
    """
    notes = []
    for name in names:
        config = shape_config(name)
        contexts, longest = fitting_contexts(config, work), max(work.rows)
        left_out = [each for each in work.contexts or usual_contexts(config) if each not in contexts]
        if not contexts:
            raise ValueError(
                f"{name} has {config.max_positions} positions: none of the contexts {left_out} leaves room for "
                f"{longest} rows; give a smaller --contexts or --rows"
            )
        if left_out:
            notes.append(f"{name}: contexts {left_out} left out: {config.max_positions} positions, {longest} rows")
        check_memory(name, config, work.dtype, cache_rows(config, work), free_memory())
    return notes


def time_shape(name: str, work: Work, threads: int, notes: list[str]) -> Timed:
    """Measure the memory of a backbone, on the CPU in a separate process, then build it here and time its passes, its
    largest product and the peer in turns."""
    config, on_gpu = shape_config(name), runtime.device == "cuda"
    contexts, length = fitting_contexts(config, work), cache_rows(config, work)
    memory = None if on_gpu else footprint(name, config, work.dtype, work.rows, length)
    gc.collect()
    jt.gc()  # what an earlier shape left
    before, host_before = device_bytes(), rss()
    backbone = build_backbone(name, config, work.dtype)
    cache = backbone.new_cache(length)
    fill(cache, config)
    functions = {key: waiting(call) for key, call in pass_calls(backbone, cache, work.rows, contexts).items()}
    for call in functions.values():
        call()
    if on_gpu:
        held, grown = device_bytes(), {"where": "device", "host_growth_bytes": max(0, rss() - host_before)}
        memory = describe_memory(config, work.dtype, length, before, held, held, **grown)
        functions |= host_calls(backbone, cache, work.rows, contexts[0])
    functions |= linear_calls(config, work)
    readings = Readings()
    functions["machine"] = readings.sample
    peer = None
    if work.find_peer and on_gpu:
        notes.append("transformers is measured on the CPU only: it was left out")
    elif work.find_peer:
        prompt = text_prompt(config) if name == TINY else None
        peer = work.find_peer(name, config, prompt, work.tokens, contexts[0], threads, notes)
        if peer:
            functions |= {"ours": our_call(name, backbone, cache, contexts[0], work.tokens), "theirs": peer}
    for call in functions.values():
        call()
    warm()
    kernels = loaded_kernels()
    seconds = interleave(functions, work.repeats)
    memory = memory.model_copy(update={"late_kernels": kernels_since(kernels)})
    readings.release()
    if peer:
        peer.close()
        times = spread_ms(seconds["theirs"])["ms"] / peer.best_ms
        if times >= DOUBTFUL:  # threads that do not sleep suffer most from other work, which favors ours
            notes.append(f"{name}: transformers took {times:.1f} times its trial: not quiet, do not trust the speedup")
    return Timed(name, config, work.dtype, seconds, memory, readings, peer)


def waiting(call: Callable) -> Callable:
    """The call, then waiting until the device has finished; on the CPU that costs a microsecond."""

    def wait():
        result = call()
        synchronize()
        return result

    return wait


def device_bytes() -> int:
    """Bytes of the device's memory that Jittor holds, in use or for reuse: it frees none, so this is the peak too. 0 on
    the CPU."""
    return jt.get_mem_info().total_cuda_used


def host_calls(backbone: Backbone, cache: KVCache, rows: list[int], context: int) -> dict[tuple, Callable]:
    """("host", rows) -> seconds until a pass of these rows after ``context`` is launched; ("queued", rows) -> seconds
    per pass if ``QUEUED`` of them are launched before the last is waited for.

    The tokens are on the device before: copying them waits for earlier work.
    """
    view, calls = cache_view(cache, context), {}
    for count in rows:
        plan, tokens = RowPlan.chain(count), jt.array(pass_tokens(backbone, count))
        tokens.sync()

        def launch(tokens=tokens, plan=plan):
            return backbone.forward(tokens, cache=view, attend=plan).logits.sync()

        def host(launch=launch) -> float:
            begun = time.perf_counter()
            logits = launch()
            spent = time.perf_counter() - begun
            logits.sync(True)
            return spent

        def queued(launch=launch) -> float:
            begun = time.perf_counter()
            given = [launch() for _ in range(QUEUED)]
            given[-1].sync(True)
            return (time.perf_counter() - begun) / QUEUED

        calls["host", count], calls["queued", count] = host, queued
    return calls


def describe_host(seconds: dict, context: int) -> list[Host]:
    """By rows, the figures of ``host_calls`` beside the passes after the same context.

    Worked example: a pass of 5 ms, 1 ms until its call returns, 4.5 ms per pass if queued: the host is ahead, and the
    device waits for 10% of a lone pass. With 5 ms until the call returns and 5 ms queued, it waits all the time.
    """
    found = []
    for kind, rows in (key[:2] for key in seconds if isinstance(key, tuple) and key[0] == "host"):
        lone, call = spread_ms(seconds["pass", rows, context]), spread_ms(seconds[kind, rows])
        queued = spread_ms(seconds["queued", rows])
        hidden = call["ms"] < queued["ms"]
        waits = max(0.0, lone["ms"] - queued["ms"]) if hidden else min(call["ms"], lone["ms"])
        share = waits / lone["ms"]
        found.append(
            Host(rows=rows, context=context, call=Time(**call), queued=Time(**queued), hidden=hidden, share=share)
        )
    return found


def fill(cache: KVCache, config: BackboneConfig) -> None:
    """Fill every row of the cache with random keys and values, the same in every layer, made on its device. The padding
    stays zero."""
    layers, *plane = cache.data.shape
    jt.set_global_seed(0)
    drawn = jt.randn(*plane[:-1], config.head_dim)
    if plane[-1] > config.head_dim:
        drawn = jt.concat([drawn, jt.zeros((*plane[:-1], plane[-1] - config.head_dim))], dim=-1)
    drawn = drawn.astype(cache.data.dtype)
    for layer in range(layers):
        cache.data[layer] = drawn
        cache.data.sync()  # so that it is written in place


def linear_calls(config: BackboneConfig, work: Work) -> dict[tuple, Callable]:
    """("linear", rows) -> the product of these rows with the shape's largest matrix."""
    _, num_out, num_in = largest_matrix(config)
    random = np.random.default_rng(0)
    linear = PackedLinear((random.random((num_out, num_in), np.float32) - 0.5).astype(work.dtype))
    calls = {}
    for rows in work.rows:
        x = jt.array(random.standard_normal((rows, num_in), np.float32))
        calls["linear", rows] = lambda x=x: linear(x).sync(True)
    return calls


def our_call(name: str, backbone: Backbone, cache: KVCache, context: int, tokens: int) -> Callable:
    """The work that a peer does too: a text on the embedded backbone, else one row after ``context``."""
    if name != TINY:
        (call,) = pass_calls(backbone, cache, [1], [context]).values()
        return call
    config, prompt = backbone.config, text_prompt(backbone.config)
    room = backbone.new_cache(min(config.max_positions, PROMPT + tokens + 1))
    return lambda: generate_autoregressive(backbone, prompt, max_new_tokens=tokens, cache=room).token_ids


def text_prompt(config: BackboneConfig) -> np.ndarray:
    """The prompt of that text, (PROMPT,)."""
    return np.random.default_rng(0).integers(3, config.vocab_size, PROMPT)


def describe(timed: Timed, work: Work) -> Shape:
    """The shape as a record holds it, its times beside the bounds that were read in turns with them."""
    c, seconds, item = timed.config, timed.seconds, ITEM_BYTES[timed.dtype]
    bounds, cache = timed.readings.bounds(), timed.readings.cache_bytes
    fits = None if cache is None else pass_bytes(c, timed.dtype, 1, 0) <= cache
    bandwidth = bounds.cache_read_gb_s if fits else bounds.read_gb_s
    peak = bounds.peak_gflop_s(timed.dtype)
    passes, linear, first = [], [], fitting_contexts(c, work)[0]
    matrix, num_out, num_in = largest_matrix(c)
    for (kind, rows, *rest), samples in ((key, s) for key, s in seconds.items() if isinstance(key, tuple)):
        time = spread_ms(samples)
        if kind == "pass":
            flops, moved = pass_flops(c, rows, *rest), pass_bytes(c, timed.dtype, rows, *rest)
            figures = bounded(rows, time, flops, moved, bounds.read_gb_s, peak)
            roofline = 1e-6 * max(moved / bandwidth, flops / peak)
            passes.append(Pass(**figures, context=rest[0], roofline_ms=roofline))
        elif kind == "linear":
            weights = num_out * num_in
            figures = bounded(rows, time, 2 * rows * weights, item * weights, bounds.read_gb_s, peak)
            linear.append(Bounded(**figures))
    return Shape(
        name=timed.name,
        dtype=timed.dtype,
        **{name: getattr(c, name) for name in SIZES},
        weight_bytes=timed.memory.weight_bytes,
        fits_in_cache=fits,
        bounds=bounds,
        passes=passes,
        largest_matrix=Matrix(name=matrix, num_out=num_out, num_in=num_in),
        linear=linear,
        transformers=describe_peer(timed, work) if timed.peer else None,
        memory=timed.memory,
        host=describe_host(seconds, first),
    )


def bounded(rows: int, time: dict[str, float], flops: int, moved: int, read_gb_s: float, peak_gflop_s: float) -> dict:
    """A time and its shares of the two bounds. Worked example: 2e9 bytes in 100 ms are 20 GB/s, half of 40."""
    seconds = time["ms"] / 1e3
    return {
        **time,
        "rows": rows,
        "flops": flops,
        "bytes": moved,
        "bandwidth_share": moved / seconds / 1e9 / read_gb_s,
        "peak_share": flops / seconds / 1e9 / peak_gflop_s,
    }


def describe_peer(timed: Timed, work: Work) -> Peer:
    """The peer beside ours, per token of a text or per pass of a row."""
    is_text, peer = timed.name == TINY, timed.peer
    per = work.tokens if is_text else 1
    ours, theirs = (Time(**spread_ms(timed.seconds[side], per)) for side in ("ours", "theirs"))
    return Peer(
        what="generate" if is_text else "step",
        versions=peer.versions,
        dtype=peer.dtype,
        sleeping=peer.sleeping,
        trials_ms={name: None if ms is None else ms / per for name, ms in peer.trials_ms.items()},
        context=PROMPT if is_text else fitting_contexts(timed.config, work)[0],
        tokens=per,
        theirs=theirs,
        ours=ours,
        speedup=theirs.ms / ours.ms,
    )
