"""The memory of one backbone, in a process that holds nothing else, and the calls that a pass is made of."""

from __future__ import annotations

import copy
import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from backbone.cache import KVCache
from backbone.config import BackboneConfig
from backbone.model import Backbone
from bench.clock.engine_record import Memory
from bench.clock.shapes import build_backbone, cache_bytes, config_from, weight_bytes
from bench.measure.gauges import peak_rss, reset_peak, rss
from bench.measure.measure import loaded_kernels
from ops.row_plan import RowPlan
from runtime import jt

ROOT = Path(__file__).resolve().parents[2]


def footprint(name: str, config: BackboneConfig, dtype: str, rows: list[int], length: int) -> Memory:
    """Build the backbone in a process of its own, run a pass of each number of rows near the end of a cache of
    ``length`` rows, and say what that took. What other work left behind in this process would blur it.

    Raises ValueError when the process did not live to tell, as when the system ends it for its memory.
    """
    task = {"name": name, "config": dataclasses.asdict(config), "dtype": dtype, "rows": rows, "length": length}
    command = [sys.executable, "-m", "bench.clock.footprint", json.dumps(task)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode < 0:
        reason = "there is not enough memory" if done.returncode == -signal.SIGKILL else "see above"
        raise ValueError(f"building {name} in {dtype} was ended by signal {-done.returncode}: {reason}")
    if done.returncode:
        raise ValueError(f"building {name} in {dtype} failed; the reason stands above")
    return Memory.model_validate_json(done.stdout.splitlines()[-1])


def weigh(name: str, config: BackboneConfig, dtype: str, rows: list[int], length: int) -> Memory:
    """What ``footprint`` reports, of this process."""
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
    """("pass", rows, context) -> a pass of so many rows, all logits, behind so many cached ones. The caches share one
    memory and differ in their length."""
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


def kernels_since(before: int | None) -> int | None:
    """Kernels that this process has compiled or loaded since ``loaded_kernels`` gave ``before``. One that another
    process has compiled anew meanwhile leaves that count, so it may fall."""
    return None if before is None else max(0, loaded_kernels() - before)


def main() -> None:
    """Answer the question of ``footprint``, which stands in the first argument, on stdout."""
    task = json.loads(sys.argv[1])
    config = config_from(task["config"])
    print(weigh(task["name"], config, task["dtype"], task["rows"], task["length"]).model_dump_json())


if __name__ == "__main__":
    main()
