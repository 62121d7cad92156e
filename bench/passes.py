"""Times the passes of a backbone by rows and context, beside what the machine could do at best."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from backbone.cache import KVCache
from backbone.config import BackboneConfig
from backbone.model import Backbone
from bench.engine_record import Bounded, Bounds, Matrix, Memory, Pass, Peer, Shape, Time
from bench.footprint import footprint, kernels_since, pass_calls
from bench.gauges import available_memory, interleave, spread_ms
from bench.machine import Readings
from bench.measure import loaded_kernels
from bench.peers import torch_llama
from bench.shapes import (
    ITEM_BYTES,
    TINY,
    build_backbone,
    check_memory,
    largest_matrix,
    pass_bytes,
    pass_flops,
    shape_config,
)
from decoding.generate import generate_autoregressive
from ops.linear import PackedLinear
from runtime import jt, warm

DOUBTFUL = 1.5  # transformers' time in turns with ours over its trial's
PROMPT = 40  # tokens, of the text that transformers and our engine both continue


@dataclass
class Work:
    """What is asked of every shape. rows, contexts: ascending; tokens: of the text that both engines continue;
    transformers: whether to measure it."""

    rows: list[int]
    contexts: list[int]
    repeats: int
    dtype: str
    tokens: int
    transformers: bool


@dataclass
class Timed:
    """A shape's raw figures: seconds by ("pass", rows, context), ("linear", rows), "ours" and "theirs". choice: how
    transformers ran; None where it was not measured."""

    name: str
    config: BackboneConfig
    dtype: str
    seconds: dict
    memory: Memory
    readings: Readings
    choice: torch_llama.Choice | None


def fitting_contexts(config: BackboneConfig, work: Work) -> list[int]:
    """The contexts behind which the most rows still have positions."""
    return [context for context in work.contexts if context + max(work.rows) <= config.max_positions]


def check_shapes(names: list[str], work: Work) -> list[str]:
    """Make sure that every shape can be measured, before the first is; returns notes on contexts that are left out.

    Raises ValueError for an unknown shape, one without a context that fits, and one that the memory does not hold.
    """
    notes = []
    for name in names:
        config = shape_config(name)
        contexts = fitting_contexts(config, work)
        longest = max(work.rows)
        if not contexts:
            raise ValueError(
                f"{name} has {config.max_positions} positions: none of the contexts {work.contexts} leaves room for "
                f"{longest} rows; give a smaller --contexts or --rows"
            )
        left_out = [context for context in work.contexts if context not in contexts]
        if left_out:
            notes.append(f"{name}: contexts {left_out} left out: {config.max_positions} positions, {longest} rows")
        check_memory(name, config, work.dtype, max(contexts) + longest, available_memory())
    return notes


def time_shape(name: str, work: Work, threads: int, notes: list[str]) -> Timed:
    """Weigh a backbone in a process of its own, then build it here and time its passes, its largest product and
    transformers in turns."""
    config = shape_config(name)
    contexts = fitting_contexts(config, work)
    length = max(contexts) + max(work.rows)
    memory = footprint(name, config, work.dtype, work.rows, length)
    gc.collect()
    jt.gc()  # what an earlier shape left behind
    backbone = build_backbone(name, config, work.dtype)
    cache = backbone.new_cache(length)
    fill(cache, config)
    functions = pass_calls(backbone, cache, work.rows, contexts) | linear_calls(config, work)
    readings = Readings()
    functions["machine"] = readings.sample
    choice = None
    if work.transformers:
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


def doubt(name: str, trial_ms: float, measured_ms: float) -> list[str]:
    """A note where transformers took much longer in turns with ours than in its trial: threads that do not sleep suffer
    most from other work, and the comparison then flatters us."""
    if measured_ms < DOUBTFUL * trial_ms:
        return []
    times = measured_ms / trial_ms
    return [f"{name}: transformers took {times:.1f} times its trial: not quiet, do not trust the speedup"]


def fill(cache: KVCache, config: BackboneConfig) -> None:
    """Random keys and values in every row of the cache, the same in every layer."""
    rows = cache.data.data[..., : config.head_dim]  # the Var's own memory; the padding stays zero
    rows[:] = np.random.default_rng(0).standard_normal(rows.shape[1:], np.float32)


def linear_calls(config: BackboneConfig, work: Work) -> dict[tuple, Callable]:
    """("linear", rows) -> the product of so many rows with the shape's largest matrix."""
    _, num_out, num_in = largest_matrix(config)
    random = np.random.default_rng(0)
    linear = PackedLinear((random.random((num_out, num_in), np.float32) - 0.5).astype(work.dtype))
    calls = {}
    for rows in work.rows:
        x = jt.array(random.standard_normal((rows, num_in), np.float32))
        calls["linear", rows] = lambda x=x: linear(x).sync()
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
    passes, linear = [], []
    matrix, num_out, num_in = largest_matrix(c)
    for (kind, rows, *rest), samples in ((key, s) for key, s in seconds.items() if isinstance(key, tuple)):
        if kind == "pass":
            (context,) = rest
            flops, moved = pass_flops(c, rows, context), pass_bytes(c, timed.dtype, rows, context)
            roofline = 1e-6 * max(moved / bandwidth, flops / bounds.fma_gflop_s)
            own = {"context": context, "roofline_ms": roofline}
            passes.append(Pass(**bounded(rows, spread_ms(samples), flops, moved, bounds), **own))
        else:
            weights = num_out * num_in
            linear.append(Bounded(**bounded(rows, spread_ms(samples), 2 * rows * weights, item * weights, bounds)))
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
    )


def bounded(rows: int, time: dict[str, float], flops: int, moved: int, bounds: Bounds) -> dict:
    """A time and its shares. Worked example: 2e9 bytes in 100 ms are 20 GB/s, half of 40."""
    seconds = time["ms"] / 1e3
    return {
        **time,
        "rows": rows,
        "flops": flops,
        "bytes": moved,
        "bandwidth_share": moved / seconds / 1e9 / bounds.read_gb_s,
        "peak_share": flops / seconds / 1e9 / bounds.fma_gflop_s,
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
