"""The memory of one backbone, measured in a separate process, and the calls that its passes consist of."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Callable

import numpy as np

from backbone.cache import KVCache
from backbone.config import BackboneConfig
from backbone.model import Backbone
from bench.clock.memory import peak_rss, reset_peak, rss, run_apart
from bench.clock.shapes import build_backbone, cache_bytes, config_from, weight_bytes
from bench.record.engine import Memory
from ops.row_plan import RowPlan
from runtime import jt


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
    held, growth = weight_bytes(config, dtype) + cache_bytes(config, dtype, length), None
    if peak is not None:
        growth = max(0, peak - before)
    return Memory(
        weight_bytes=weight_bytes(config, dtype),
        cache_bytes=cache_bytes(config, dtype, length),
        before_bytes=before,
        peak_bytes=peak,
        after_bytes=rss(),
        growth_bytes=growth,
        ratio=None if growth is None else growth / held,
        late_kernels=None,
    )


def pass_calls(backbone: Backbone, cache: KVCache, rows: list[int], contexts: list[int]) -> dict[tuple, Callable]:
    """("pass", rows, context) -> a pass over these rows, with all logits, after this many cached ones. The caches share
    one memory and differ in their length."""
    calls = {}
    for context in contexts:
        view = copy.copy(cache)
        view.reserve(context)
        view.commit(np.arange(context))
        for count in rows:
            tokens, plan = (np.arange(count, dtype=np.int32) % backbone.config.vocab_size)[None], RowPlan.chain(count)
            calls["pass", count, context] = lambda t=tokens, p=plan, c=view: backbone.forward(
                t, cache=c, attend=p
            ).logits.sync(True)
    return calls


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(weigh(**{**task, "config": config_from(task["config"])}).model_dump_json())
