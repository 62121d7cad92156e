"""Times the passes of a backbone by rows and context, beside what the machine could do at best.

A clock that stops when a call returns stops on a GPU when its kernels are launched: every timed call waits for the
device, but those that measure the launching itself.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

import runtime
from backbone.cache import KVCache
from backbone.config import BackboneConfig
from backbone.model import Backbone
from bench.clock.engine_record import Bounded, Host, Matrix, Memory, Pass, Peer, Shape, Time
from bench.clock.footprint import footprint, kernels_since, pass_calls
from bench.clock.machine import Readings, free_memory
from bench.clock.shapes import (
    ITEM_BYTES,
    TINY,
    build_backbone,
    cache_bytes,
    check_memory,
    largest_matrix,
    pass_bytes,
    pass_flops,
    shape_config,
    usual_contexts,
    weight_bytes,
)
from bench.measure.gauges import available_memory, interleave, rss, spread_ms
from bench.measure.measure import loaded_kernels
from bench.peers import torch_llama
from decoding.generate import generate_autoregressive
from ops.linear import PackedLinear
from ops.row_plan import RowPlan
from runtime import jt, synchronize, warm

DOUBTFUL = 1.5  # transformers' time in turns with ours over its trial's
PROMPT = 40  # tokens, of the text that transformers and our engine both continue
QUEUED = 8  # passes that are handed over before the first is waited for
WHOLE = 128  # a cache's rows are a multiple of this


@dataclass
class Work:
    """What is asked of every shape. rows, contexts: ascending, contexts None for the shape's usual ones; tokens: of the
    text that both engines continue; transformers: whether to measure it."""

    rows: list[int]
    contexts: list[int] | None
    repeats: int
    dtype: str
    tokens: int
    transformers: bool


@dataclass
class Timed:
    """A shape's raw figures: seconds by ("pass", rows, context), ("linear", rows), "ours" and "theirs", and on a GPU
    ("host", rows) and ("queued", rows). choice: how transformers ran; None where it was not measured."""

    name: str
    config: BackboneConfig
    dtype: str
    seconds: dict
    memory: Memory
    readings: Readings
    choice: torch_llama.Choice | None = field(default=None)


def asked_contexts(config: BackboneConfig, work: Work) -> list[int]:
    """The contexts of a shape, fitting or not."""
    return work.contexts or usual_contexts(config)


def cache_rows(config: BackboneConfig, work: Work) -> int:
    """Rows of the cache that all contexts share: room for the longest one and its pass, rounded up to whole 128."""
    needed = max(fitting_contexts(config, work)) + max(work.rows)
    return min(config.max_positions, -(-needed // WHOLE) * WHOLE)


def fitting_contexts(config: BackboneConfig, work: Work) -> list[int]:
    """The contexts behind which the most rows still have positions."""
    return [each for each in asked_contexts(config, work) if each + max(work.rows) <= config.max_positions]


def check_shapes(names: list[str], work: Work) -> list[str]:
    """Make sure that every shape can be measured, before the first is; returns notes on contexts that are left out.

    Raises ValueError for an unknown shape, one without a context that fits, and one that the memory does not hold.
    """
    notes = []
    for name in names:
        config = shape_config(name)
        contexts, asked = fitting_contexts(config, work), asked_contexts(config, work)
        longest = max(work.rows)
        if not contexts:
            raise ValueError(
                f"{name} has {config.max_positions} positions: none of the contexts {asked} leaves room for {longest} "
                "rows; give a smaller --contexts or --rows"
            )
        left_out = [context for context in asked if context not in contexts]
        if left_out:
            notes.append(f"{name}: contexts {left_out} left out: {config.max_positions} positions, {longest} rows")
        check_memory(name, config, work.dtype, cache_rows(config, work), free_memory())
    return notes


def time_shape(name: str, work: Work, threads: int, notes: list[str]) -> Timed:
    """Weigh a backbone, on the CPU in a process of its own, then build it here and time its passes, its largest product
    and transformers in turns."""
    config, on_gpu = shape_config(name), runtime.device == "cuda"
    contexts, length = fitting_contexts(config, work), cache_rows(config, work)
    memory = None if on_gpu else footprint(name, config, work.dtype, work.rows, length)
    gc.collect()
    jt.gc()  # what an earlier shape left behind
    before, host_before = device_bytes(), rss()
    backbone = build_backbone(name, config, work.dtype)
    cache = backbone.new_cache(length)
    fill(cache, config)
    functions = {key: waiting(call) for key, call in pass_calls(backbone, cache, work.rows, contexts).items()}
    for call in functions.values():
        call()
    if on_gpu:
        memory = device_memory(config, work.dtype, length, before, host_before)
        functions |= host_calls(backbone, cache, work.rows, contexts[0])
    functions |= linear_calls(config, work)
    readings = Readings()
    functions["machine"] = readings.sample
    choice = None
    if work.transformers and on_gpu:
        notes.append("transformers is measured on the CPU alone: it was left out")
    elif work.transformers:
        ours, choice = peer_calls(name, backbone, cache, contexts[0], work, threads, notes)
        functions |= {"ours": ours, "theirs": choice.call} if choice else {}
    for call in functions.values():
        call()
    warm()
    kernels = loaded_kernels()
    seconds = interleave(functions, work.repeats)
    memory = memory.model_copy(update={"late_kernels": kernels_since(kernels)})
    readings.release()
    if choice:
        choice.call.close()
        notes.extend(doubt(name, choice.best_ms, spread_ms(seconds["theirs"])["ms"]))
    return Timed(name, config, work.dtype, seconds, memory, readings, choice)


def waiting(call: Callable) -> Callable:
    """The call, then waiting until the device has done all that it was given; on the CPU that costs a microsecond."""

    def wait():
        result = call()
        synchronize()
        return result

    return wait


def device_bytes() -> int:
    """Bytes of the device's memory that Jittor holds, in use or for reuse; 0 on the CPU."""
    return jt.get_mem_info().total_cuda_used


def device_memory(config: BackboneConfig, dtype: str, length: int, before: int, host_before: int) -> Memory:
    """What building a backbone and running its passes has taken of the device since it held ``before`` bytes and this
    process ``host_before``. Jittor keeps the blocks that it has taken, so what it holds now is the most it held."""
    held, after = weight_bytes(config, dtype) + cache_bytes(config, dtype, length), device_bytes()
    growth = max(0, after - before)
    return Memory(
        weight_bytes=weight_bytes(config, dtype),
        cache_bytes=cache_bytes(config, dtype, length),
        before_bytes=before,
        peak_bytes=after,
        after_bytes=after,
        growth_bytes=growth,
        ratio=growth / held,
        late_kernels=None,
        where="device",
        host_growth_bytes=max(0, rss() - host_before),
    )


def host_calls(backbone: Backbone, cache: KVCache, rows: list[int], context: int) -> dict[tuple, Callable]:
    """("host", rows) -> seconds until a pass of so many rows behind ``context`` is handed over; ("queued", rows) ->
    seconds a pass where ``QUEUED`` of them are handed over before the last is waited for.

    The tokens lie on the device before: copying them there waits for all that came before.
    """
    view = copy.copy(cache)
    view.reserve(context)
    view.commit(np.arange(context))
    calls = {}
    for count in rows:
        plan = RowPlan.chain(count)
        tokens = jt.array((np.arange(count, dtype=np.int32) % backbone.config.vocab_size)[None])
        tokens.sync()

        def hand_over(tokens=tokens, plan=plan):
            return backbone.forward(tokens, cache=view, attend=plan).logits.sync()

        def host(hand_over=hand_over) -> float:
            begun = time.perf_counter()
            logits = hand_over()
            spent = time.perf_counter() - begun
            logits.sync(True)
            return spent

        def queued(hand_over=hand_over) -> float:
            begun = time.perf_counter()
            given = [hand_over() for _ in range(QUEUED)]
            given[-1].sync(True)
            return (time.perf_counter() - begun) / QUEUED

        calls["host", count], calls["queued", count] = host, queued
    return calls


def describe_host(seconds: dict, context: int) -> list[Host]:
    """By rows, what ``host_calls`` found beside the passes behind the same context.

    Worked example: a pass of 5 ms, 1 ms until its call returns, 4.5 ms a pass when queued: the host is ahead, and the
    device waits for 10% of a lone pass. Of 5 ms until the call returns, 5 ms queued: it waits all the time.
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


def doubt(name: str, trial_ms: float, measured_ms: float) -> list[str]:
    """A note where transformers took much longer in turns with ours than in its trial: threads that do not sleep suffer
    most from other work, and the comparison then flatters us."""
    if measured_ms < DOUBTFUL * trial_ms:
        return []
    times = measured_ms / trial_ms
    return [f"{name}: transformers took {times:.1f} times its trial: not quiet, do not trust the speedup"]


def fill(cache: KVCache, config: BackboneConfig) -> None:
    """Random keys and values in every row of the cache, the same in every layer, made where the cache lies. The padding
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
    """("linear", rows) -> the product of so many rows with the shape's largest matrix."""
    _, num_out, num_in = largest_matrix(config)
    random = np.random.default_rng(0)
    linear = PackedLinear((random.random((num_out, num_in), np.float32) - 0.5).astype(work.dtype))
    calls = {}
    for rows in work.rows:
        x = jt.array(random.standard_normal((rows, num_in), np.float32))
        calls["linear", rows] = lambda x=x: linear(x).sync(True)
    return calls


def peer_calls(
    name: str, backbone: Backbone, cache: KVCache, context: int, work: Work, threads: int, notes: list[str]
) -> tuple[Callable | None, torch_llama.Choice | None]:
    """(our call, transformers' fastest) of the same work: a text for the embedded backbone, else one row behind
    ``context``. No choice, and a note, where transformers cannot be measured."""
    reason = torch_llama.missing()
    if reason:
        notes.append(reason)
        return None, None
    config = backbone.config
    dtypes = [d for d in torch_llama.DTYPES if torch_llama.fits(config, d, available_memory())]
    for dtype in sorted(set(torch_llama.DTYPES) - set(dtypes)):
        notes.append(f"{name}: no memory for transformers in {dtype}")
    if name == TINY:
        from backbone.model import EMBEDDED

        prompt = np.random.default_rng(0).integers(3, config.vocab_size, PROMPT)
        room = backbone.new_cache(min(config.max_positions, PROMPT + work.tokens + 1))

        def ours():
            return generate_autoregressive(backbone, prompt, max_new_tokens=work.tokens, cache=room).token_ids

        task = torch_llama.text_task(EMBEDDED, prompt, work.tokens, threads)
    else:
        (ours,) = pass_calls(backbone, cache, [1], [context]).values()
        task = torch_llama.step_task(config, context, threads)
    choice = torch_llama.choose(task, dtypes)
    if choice is None:
        notes.append(f"{name}: transformers runs in none of {', '.join(dtypes) or 'its types'} here")
    return ours, choice


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
        if kind == "pass":
            (context,) = rest
            flops, moved = pass_flops(c, rows, context), pass_bytes(c, timed.dtype, rows, context)
            roofline = 1e-6 * max(moved / bandwidth, flops / peak)
            own = {"context": context, "roofline_ms": roofline}
            passes.append(Pass(**bounded(rows, spread_ms(samples), flops, moved, bounds.read_gb_s, peak), **own))
        elif kind == "linear":
            weights = num_out * num_in
            linear.append(
                Bounded(**bounded(rows, spread_ms(samples), 2 * rows * weights, item * weights, bounds.read_gb_s, peak))
            )
    return Shape(
        name=timed.name,
        dtype=timed.dtype,
        num_layers=c.num_layers,
        hidden_size=c.hidden_size,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.intermediate_size,
        vocab_size=c.vocab_size,
        weight_bytes=timed.memory.weight_bytes,
        fits_in_cache=fits,
        bounds=bounds,
        passes=passes,
        largest_matrix=Matrix(name=matrix, num_out=num_out, num_in=num_in),
        linear=linear,
        transformers=describe_peer(timed, work) if timed.choice else None,
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
    """transformers beside ours, per token of a text or per pass of a row."""
    is_text, choice = timed.name == TINY, timed.choice
    per = work.tokens if is_text else 1
    ours, theirs = (Time(**spread_ms(timed.seconds[side], per)) for side in ("ours", "theirs"))
    return Peer(
        what="generate" if is_text else "step",
        versions=torch_llama.versions(),
        dtype=choice.dtype,
        sleeping=choice.sleeping,
        trials_ms={name: None if ms is None else ms / per for name, ms in choice.trials_ms.items()},
        context=PROMPT if is_text else fitting_contexts(timed.config, work)[0],
        tokens=per,
        theirs=theirs,
        ours=ours,
        speedup=theirs.ms / ours.ms,
    )
