"""What the kernels and a backbone pass cost on this machine, beside what Jittor's own operations cost.

    python bench/kernels.py --out kernels.json

Every figure is a median over repeats, in milliseconds, after a warm-up of the same shape. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from backbone.model import load_backbone
from bench.record.schema import check_writable, write_atomically
from ops.attention import attention
from ops.linear import PackedLinear
from ops.row_plan import RowPlan
from ops.training import (
    cross_entropy,
    outer_product,
    trainable_linear,
)
from runtime import jt
from runtime.entry import run_entry

ROWS = (1, 2, 4, 8, 16, 32, 64)
PREFIX = 200  # rows in the cache before the pass that is timed


def median_ms(function, repeats: int) -> float:
    """Median milliseconds of a call; ``function`` waits for its own result."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times) * 1e3, 4)


def pass_times(repeats: int) -> dict[str, float]:
    """A pass of the embedded backbone over ``rows`` rows behind a prefix, logits of all rows included."""
    backbone = load_backbone()
    ids = np.random.default_rng(0).integers(3, backbone.config.vocab_size, (1, PREFIX)).astype(np.int32)
    cache = backbone.new_cache(backbone.config.max_positions)
    backbone.forward(ids, cache=cache, logits=None).hidden.sync(True)
    cache.commit(np.arange(PREFIX))
    result = {}
    for rows in ROWS:
        plan, tokens = RowPlan.chain(rows), ids[:, :rows]
        result[str(rows)] = median_ms(
            lambda t=tokens, p=plan: backbone.forward(t, cache=cache, attend=p).logits.sync(True), repeats
        )
    return result


def product_times(repeats: int, num_out: int, num_in: int) -> dict[str, float]:
    """The packed float16 product (num_out, num_in) for a few rows."""
    rng = np.random.default_rng(0)
    linear = PackedLinear(rng.standard_normal((num_out, num_in)).astype(np.float16))
    inputs = {rows: jt.array(rng.standard_normal((rows, num_in)).astype(np.float32)) for rows in ROWS}
    return {str(rows): median_ms(lambda x=x: linear(x).sync(True), repeats) for rows, x in inputs.items()}


def training_times(repeats: int, rows: int, dim: int, vocab: int) -> dict[str, float]:
    """One depth of a head's loss, forward and back."""
    rng = np.random.default_rng(0)
    x = jt.array(rng.standard_normal((rows, dim)).astype(np.float32))
    weight = jt.array(rng.standard_normal((vocab, dim)).astype(np.float32) * 0.05)
    upstream = jt.array(rng.standard_normal((rows, vocab)).astype(np.float32))
    targets = jt.array(rng.integers(0, vocab, rows).astype(np.int32))

    def step(product, loss):
        losses, _ = loss(product(x, weight), targets)
        for gradient in jt.grad(losses.sum(), [x, weight]):
            gradient.sync(True)

    return {
        "loss_and_gradients": median_ms(lambda: step(trainable_linear, cross_entropy), repeats),
        "weight_gradient": median_ms(lambda: outer_product(upstream, x).sync(True), repeats),
    }


def attention_times(repeats: int, heads: int, dim: int, own: int) -> dict[str, float]:
    """Attention of every second token of ten packed conversations, forward and back.

    own: further keys of each row, as after so many drafted tokens.
    """
    lengths = np.array([50, 80, 120, 150, 180, 200, 236, 250, 270, 512])
    num_tokens, plan = int(lengths.sum()), RowPlan.sequences(lengths)
    first, count = (jt.array(plan.meta_array[::2, column].copy()) for column in (2, 3))
    rng = np.random.default_rng(0)
    rows = first.shape[0]
    shapes = [(rows, heads, dim), *[(num_tokens, heads, dim)] * 2, *[(rows, own, heads, dim)] * 2]
    inputs = [jt.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]
    upstream = jt.array(rng.standard_normal(shapes[0]).astype(np.float32))
    jt.sync_all()

    def step(function):
        q, k, v, own_k, own_v = inputs
        y = function(q, k, v, first, count, own_k, own_v)
        jt.sync(jt.grad((y * upstream).sum(), inputs))

    return {
        "attention_and_gradients": median_ms(lambda: step(attention), repeats),
    }


def main(arguments) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench/kernels.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=50, metavar="N", help="timed calls (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="write the JSON here too")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {options.repeats}")
    if options.out:
        check_writable(options.out)
    result = {
        "schema_version": 1,
        "kind": "kernels",
        "provenance": runtime.provenance(),
        "backbone_pass_ms": pass_times(options.repeats),
        "product_4096x256_ms": product_times(options.repeats, 4096, 256),
        "product_4096x4096_ms": product_times(max(5, options.repeats // 5), 4096, 4096),
        "training_1024x256x4096_ms": training_times(max(5, options.repeats // 5), 1024, 256, 4096),
        "attention_1024x4x64_ms": attention_times(max(5, options.repeats // 5), 4, 64, 6),
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.out:
        write_atomically(options.out, text)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
