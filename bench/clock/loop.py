"""What the decoding loop costs outside the kernels, whether its timers add up to the wall clock, and whether its memory
grows. On the embedded backbone, whose passes are so short that everything around them shows."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import pandas as pd

from backbone.config import BackboneConfig
from backbone.model import Backbone, load_backbone
from backbone.tokenizer import load_tokenizer
from bench.clock.footprint import pass_calls
from bench.clock.memory import rss
from bench.clock.shapes import TINY, random_weights
from bench.clock.timing import interleave, spread_ms
from bench.measure.attempts import Setup
from bench.measure.warmup import kernels_since, loaded_kernels, warm_up
from bench.record.engine import Loop, Soak, Stages, Time
from decoding.generate import Generation, generate, generate_autoregressive
from decoding.tree import default_tree
from heads.base import Head
from heads.registry import available, build, head_class
from runtime.interrupt import check_interrupt

DEPTHS, NODES = 3, 16
PROMPT = 40  # tokens
LONGEST_PROMPT = 200  # of the soak
STAGES = ("prefill_s", "draft_s", "verify_s", "accept_s", "cache_s", "host_s")  # they add up to the total


def cheap_head() -> str:
    """The first registered head that drafts all depths at once and does not change the backbone."""
    for name in available():
        kind = head_class(name)
        if kind.parallel and kind.trained and kind.decoding_backbone is Head.decoding_backbone:
            return name
    raise ValueError("no registered head drafts all depths at once; the loop is measured with such a head")


def measure_loop(dtype: str, tokens: int, repeats: int, soak_steps: int) -> Loop:
    """Decode texts of ``tokens`` tokens without a head and with a tree, in turns; then ``soak_steps`` steps.

    The head is untrained: drafting is as much work as with a trained one. Raises ValueError if a text does not fit
    after its prompt.
    """
    backbone = load_backbone(dtype=dtype)
    room = backbone.config.max_positions - PROMPT - NODES
    if tokens > room:
        raise ValueError(f"--tokens {tokens} do not fit after a prompt of {PROMPT}: the backbone has room for {room}")
    name, tree = cheap_head(), default_tree(NODES, DEPTHS)
    head = build(name, {"num_depths": DEPTHS}, backbone)
    head.eval()
    cache = backbone.new_cache(backbone.config.max_positions)
    warm_up(Setup(backbone, load_tokenizer(), cache, tokens, head=head, tree=tree))
    empty = empty_pass(backbone.config, dtype, repeats)
    kernels = loaded_kernels()
    prompt = np.random.default_rng(0).integers(3, backbone.config.vocab_size, PROMPT)
    calls = {
        1: lambda ids, n: generate_autoregressive(backbone, ids, max_new_tokens=n, cache=cache),
        NODES: lambda ids, n: generate(backbone, head, ids, tree, max_new_tokens=n, cache=cache),
    }
    samples = time_texts(calls, prompt, tokens, repeats)
    soak = run_soak(calls, backbone.config, soak_steps) if soak_steps else None
    return Loop(
        backbone=TINY,
        dtype=dtype,
        head=name,
        empty_pass=empty,
        autoregressive=stages(1, samples[1]),
        tree=stages(NODES, samples[NODES]),
        late_kernels=kernels_since(kernels),
        soak=soak,
    )


def empty_pass(config: BackboneConfig, dtype: str, repeats: int) -> Time:
    """One row through as many layers with next to nothing to compute."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "num_kv_heads": 1, "head_dim": 16}
    small = dataclasses.replace(config, vocab_size=16, **sizes)
    backbone = Backbone(small, random_weights(small, dtype), dtype)
    calls = pass_calls(backbone, backbone.new_cache(2), [1], [1])
    return Time(**spread_ms(interleave(calls, repeats)["pass", 1, 1]))


def time_texts(
    calls: dict[int, Callable], prompt: np.ndarray, tokens: int, repeats: int
) -> dict[int, list[tuple[float, Generation]]]:
    """nodes -> (wall-clock seconds, generation) of each repeat, in turns after a warm-up."""
    samples: dict[int, list] = {nodes: [] for nodes in calls}
    for repeat in range(repeats + 1):
        for nodes in sorted(calls, reverse=repeat % 2 == 1):
            start = time.perf_counter()
            generation = calls[nodes](prompt, tokens)
            wall = time.perf_counter() - start
            if repeat:
                samples[nodes].append((wall, generation))
            check_interrupt()
    return samples


def stages(nodes: int, samples: list[tuple[float, Generation]]) -> Stages:
    """Per step, the median over the repeats of each stage; the gap is the largest of all repeats.

    Worked example: stages of 1, 2, 3, 1, 1 and 1.8 s, 9.8 together, in a call of 10 s: a gap of 2 percent.
    """
    timers = pd.DataFrame([dataclasses.asdict(generation.timers) for _, generation in samples])
    walls, generations = zip(*samples, strict=True)
    steps = [generation.num_passes for generation in generations]
    gaps = 100 * (1 - timers[list(STAGES)].sum(axis=1) / walls)
    per_step = (1e3 * timers[list(STAGES[1:])]).div(steps, axis=0)
    outside = per_step[["accept_s", "cache_s", "host_s"]]
    decoded = pd.Series([len(generation.token_ids) - 1 for generation in generations])
    return Stages(
        nodes=nodes,
        tokens=len(generations[0].token_ids),
        steps=steps[0],
        tokens_per_s=(decoded / (timers["total_s"] - timers["prefill_s"])).median(),
        step_ms=per_step.sum(axis=1).median(),
        **{f"{stage.removesuffix('_s')}_ms": ms for stage, ms in per_step.median().items()},
        outside_ms=outside.sum(axis=1).median(),
        wall_gap_percent=max(gaps, key=abs),
    )


def run_soak(calls: dict[int, Callable], config: BackboneConfig, steps: int) -> Soak:
    """Decode texts from prompts of random lengths until the cache is full, with and without a head in turns, until
    ``steps`` passes are done. The first two texts are the warm-up."""
    random = np.random.default_rng(1)

    def text(index: int) -> int:
        prompt = random.integers(3, config.vocab_size, random.integers(1, LONGEST_PROMPT))
        check_interrupt()
        return calls[sorted(calls)[index % len(calls)]](prompt, config.max_positions).num_passes

    for index in range(2):
        text(index)
    kernels, start, middle, done, texts = loaded_kernels(), rss(), None, 0, 0
    while done < steps:
        done += text(texts)
        texts += 1
        if middle is None and 2 * done >= steps:
            middle = rss()
    sizes = {"start_bytes": start, "middle_bytes": middle, "end_bytes": rss()}
    return Soak(steps=done, texts=texts, late_kernels=kernels_since(kernels), **sizes)
