"""The memory of one backbone, measured in a separate process, and the calls that its passes consist of."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from backbone.cache import KVCache
from backbone.config import BackboneConfig
from backbone.model import Backbone
from bench.clock.memory import peak_rss, reset_peak, rss, run_apart
from bench.clock.shapes import build_backbone, cache_bytes, config_from, weight_bytes
from bench.record.engine import Memory
from ops.row_plan import RowPlan
from runtime import jt
from runtime.files.documents import parse_json


def footprint(name: str, config: BackboneConfig, dtype: str, rows: list[int], length: int) -> Memory:
    """Build the backbone in a separate process, run a pass of each number of rows near the end of a cache of ``length``
    rows, and return what that took. Raises ValueError if the process fails, as for its memory."""
    task = {"name": name, "config": dataclasses.asdict(config), "dtype": dtype, "rows": rows, "length": length}
    return Memory.model_validate(run_apart("bench.clock.footprint", task, f"building {name} in {dtype}"))


def weigh(name: str, config: BackboneConfig, dtype: str, rows: list[int], length: int) -> Memory:
    """What ``footprint`` returns, of this process."""
    jt.zeros((1,)).sync()
    before, known = rss(), reset_peak()
    backbone = build_backbone(name, config, dtype)
    cache = backbone.new_cache(length)
    for call in pass_calls(backbone, cache, rows, [length - max(rows)]).values():
        call()
    peak = peak_rss() if known else None
    jt.gc()
    return describe_memory(config, dtype, length, before, peak, rss())


def describe_memory(
    config: BackboneConfig, dtype: str, length: int, before: int, peak: int | None, after: int, **where: Any
) -> Memory:
    """The bytes that were held before a backbone with a cache of ``length`` rows was built, at the peak while it ran,
    and after."""
    weights, rows = weight_bytes(config, dtype), cache_bytes(config, dtype, length)
    growth = None if peak is None else max(0, peak - before)
    return Memory(
        weight_bytes=weights,
        cache_bytes=rows,
        before_bytes=before,
        peak_bytes=peak,
        after_bytes=after,
        growth_bytes=growth,
        ratio=None if growth is None else growth / (weights + rows),
        late_kernels=None,
        **where,
    )


def pass_calls(backbone: Backbone, cache: KVCache, rows: list[int], contexts: list[int]) -> dict[tuple, Callable]:
    """("pass", rows, context) -> a pass over these rows, with all logits, after this many cached ones. The caches share
    one memory and differ in their length."""
    calls = {}
    for context in contexts:
        view = cache_view(cache, context)
        for count in rows:
            tokens, plan = pass_tokens(backbone, count), RowPlan.chain(count)
            calls["pass", count, context] = lambda t=tokens, p=plan, c=view: backbone.forward(
                t, cache=c, attend=p
            ).logits.sync(True)
    return calls


def cache_view(cache: KVCache, context: int) -> KVCache:
    """The memory of a cache with ``context`` rows in it."""
    view = copy.copy(cache)
    view.reserve(context)
    view.commit(np.arange(context))
    return view


def pass_tokens(backbone: Backbone, count: int) -> np.ndarray:
    """The tokens of a pass, (1, count)."""
    return (np.arange(count, dtype=np.int32) % backbone.config.vocab_size)[None]


if __name__ == "__main__":
    task = parse_json(sys.argv[1], "the task")
    print(weigh(**{**task, "config": config_from(task["config"])}).model_dump_json())
