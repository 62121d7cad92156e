"""Rows of key-value caches, moved and written in place."""

from __future__ import annotations

import numpy as np

from ops.decoder_pass import CUDA_FILES
from ops.kernel import launch
from ops.layer_weights import CPU_FILES
from runtime import jt


def keep_rows(cache, sources: np.ndarray, targets: np.ndarray) -> None:
    """Move cache rows from ``sources`` to ``targets``, (moved,) int32 each, in place, in every layer, in this order:
    no row may be a target before it has been a source."""
    call = """
        gorgon::keep_rows(gorgon::raw(in0_p), in0_shape0 * in0_shape1 * in0_shape2, in0_shape3, in0_shape4, in1_p,
                          in1_p + in1_shape1, in1_shape1);
        """
    done = launch(
        (1,),
        "int32",
        [cache, jt.array(np.stack([sources, targets]).astype(np.int32))],
        cpu=call + "out0_p[0] = 0;\n        ",
        cuda=call,
        cpu_files=CPU_FILES,
        cuda_files=CUDA_FILES,
    )
    done.sync()


def write_rows(cache, rows, base: int) -> None:
    """Write ``rows`` into cache[base : base + n], in place, at once.

    cache: (capacity, ...) float32, already computed; rows: (n, ...) float32. Whatever reads the cache must be computed
    before, or requested afterwards: nothing orders a pending reader and this. Raises ValueError when the rows do not
    fit.
    """
    count = rows.shape[0]
    if tuple(rows.shape[1:]) != tuple(cache.shape[1:]) or base < 0 or base + count > cache.shape[0]:
        raise ValueError(f"rows {tuple(rows.shape)} do not fit into a cache {tuple(cache.shape)} at row {base}")
    if count == 0:
        return
    launch(
        (1,),
        "int32",
        [cache, rows],
        cpu="""
        memcpy(in0_p + (int64_t)data["base"] * in0_stride0, in1_p, in1->num * sizeof(float));
        out0_p[0] = 0;
        """,
        cuda="""
        gorgon::write_rows(in0_p + (int64_t)data["base"] * in0_stride0, in1_p, in1->num, out0_p);
        """,
        cuda_files=["rotary.h"],
        data={"base": base},
    ).sync()
