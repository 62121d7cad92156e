"""Compares a backbone before and after a conversion: every number, and the model's logits."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backbone.files.lazy import LazyTensor
from backbone.formats.cast import widened
from backbone.formats.source import Source, open_source, recognize

SEED, ROWS = 0, 32  # of the token ids whose logits are compared
LOGITS = "logits"
# Half the distance from 1 to the next number, and the smallest number above 0. Constants, because finfo measures them,
# and kernels compiled with -Ofast make the processor flush tiny float32 numbers to 0.
PRECISION = {
    "float16": (2.0**-11, 2.0**-24),
    "bfloat16": (2.0**-8, 2.0**-133),
    "float32": (2.0**-24, 2.0**-149),
    "float64": (2.0**-53, 2.0**-1074),
}


@dataclass(frozen=True)
class Comparison:
    """One tensor on both sides. ``largest``: the largest difference, ``allowed``: the largest that passes."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    largest: float
    allowed: float

    @property
    def passes(self) -> bool:
        """Whether the difference is allowed; NaN is not."""
        return self.largest <= self.allowed

    def line(self, width: int) -> str:
        """A row of the table."""
        kind = self.dtypes[0] if len(set(self.dtypes)) == 1 else " -> ".join(self.dtypes)
        verdict = "" if self.passes else f"  above the allowed {self.allowed:.3g}"
        return f"{self.name:{width}} {self.shape!s:>18} {kind:>20} {self.largest:12.6g}{verdict}"


def unit_roundoff(dtype: np.dtype) -> float:
    """The largest relative error of rounding to nearest; 0 for integers."""
    return PRECISION.get(dtype.name, (0.0, 0.0))[0]


def compare(name: str, before: LazyTensor, after: LazyTensor, tolerance: float | None) -> Comparison:
    """The largest difference between two tensors of one shape.

    tolerance: the largest that passes, as a share of the largest magnitude in the tensor; None: 0 where the types are
    equal, else the rounding of the narrower type.
    """
    largest, magnitude = 0.0, 0.0
    for start, stop in before.stretches():
        first, second = widened(before.read_rows(start, stop)), widened(after.read_rows(start, stop))
        with np.errstate(invalid="ignore"):
            same = (first == second) | (np.isnan(first) & np.isnan(second))
            difference = np.abs(np.where(same, 0, first - second))
        largest = max(largest, float(np.where(np.isnan(difference), np.inf, difference).max(initial=0.0)))
        magnitude = max(magnitude, float(np.abs(first[np.isfinite(first)]).max(initial=0.0)))
    floor = 0.0
    if tolerance is None:
        narrow = max((before.dtype, after.dtype), key=unit_roundoff)
        tolerance = 0.0 if before.dtype == after.dtype else unit_roundoff(narrow)
        # Near zero, numbers are a fixed step apart: rounding costs half of that.
        floor = PRECISION[narrow.name][1] / 2 if tolerance else 0.0
    dtypes = (before.dtype.name, after.dtype.name)
    return Comparison(name, before.shape, dtypes, largest, tolerance * magnitude + floor)


def _logits(source: Source, dtype: str) -> np.ndarray:
    """(rows, vocab) float32 of token ids drawn with a fixed seed."""
    from backbone.model import Backbone, load_backbone  # late: it loads Jittor, which comparing numbers does not need

    if recognize(source.path) == source.layout:
        backbone = load_backbone(source.path, dtype)
    else:  # read in a format that was named, not recognized
        backbone = Backbone(source.config, {name: tensor.read() for name, tensor in source.tensors.items()}, dtype)
    rows = min(ROWS, source.config.max_positions)
    token_ids = np.random.default_rng(SEED).integers(0, source.config.vocab_size, (1, rows)).astype(np.int32)
    return backbone.forward(token_ids).logits.numpy()[0]


def compare_logits(before: Source, after: Source, tolerance: float | None) -> Comparison:
    """The logits of both sides, computed in float16 where all weights are, else in float32.

    tolerance: as in ``compare``, of the largest logit. Where types differ, every residual branch (two a layer), the
    embedding and the language-model head may add the rounding of one matrix.
    """
    sides = (before, after)
    kinds = [{tensor.dtype for tensor in side.tensors.values()} for side in sides]
    dtype = "float16" if all(kind == {np.dtype(np.float16)} for kind in kinds) else "float32"
    logits = []
    for side in sides:
        logits.append(_logits(side, dtype))
        gc.collect()  # one model at a time
    difference = float(np.abs(logits[0] - logits[1]).max())
    if tolerance is None:
        narrow = max(unit_roundoff(kind) for kind in set.union(*kinds))
        tolerance = 0.0 if kinds[0] == kinds[1] else narrow * (2 * before.config.num_layers + 2)
    allowed = tolerance * float(np.abs(logits[0]).max())
    return Comparison(LOGITS, logits[0].shape, (dtype, dtype), difference, allowed)


def verify(
    source: Path | str,
    source_format: str | None,
    out: Path | str,
    out_format: str,
    tolerance: float | None = None,
    show: Callable[[str], None] = print,
) -> bool:
    """Print a table of every tensor on both sides, then of the logits. True when all differences are allowed.

    tolerance: the largest difference, as a share of the largest magnitude of the tensor or of the logits; None: 0 where
    types are equal, else the rounding of the narrower one. Raises ValueError where a side cannot be read.
    """
    before, after = open_source(source, source_format), open_source(out, out_format)
    width = max(map(len, before.tensors))
    show(f"{'tensor':{width}} {'shape':>18} {'dtype':>20} {'largest diff':>12}")
    results = []
    for name, tensor in before.tensors.items():
        results.append(compare(name, tensor, after.tensors[name], tolerance))
        show(results[-1].line(width))
    results.append(compare_logits(before, after, tolerance))
    show(results[-1].line(width))
    failed = [result.name for result in results if not result.passes]
    if failed:
        show(f"{len(failed)} of {len(results)} differ by more than the tolerance: {', '.join(failed[:10])}")
    else:
        show(f"all {len(results)} within the tolerance")
    return not failed
