"""Compares both sides of a conversion, read from disk: each tensor, and the logits of the same inputs.

Our side computes with the head, a published one with its equation in NumPy on its own names, so that a tensor in the
wrong place shows even where both tables of names agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from backbone.files.lazy import LazyTensor
from backbone.formats.cast import widened
from heads.formats.contents import HeadWeights, Piece, Target, stretch
from heads.formats.files import Found
from heads.formats.inputs import Inputs

# Largest difference of logits as a part of the largest logit, by the coarsest type on either side. float32: sums of
# up to a few thousand products in another order. 16 bits: about twenty times the observed effect of rounding.
TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}
COMPUTED = "(computed)"  # not stored on a side: merged language-model heads, zero biases


@dataclass(frozen=True)
class Row:
    """One tensor on both sides. magnitude: the largest of the first; exact: the second is the first cast to its dtype,
    bit for bit."""

    names: tuple[str, str]
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    difference: float
    magnitude: float
    exact: bool

    def passes(self, tolerance: float | None) -> bool:
        """Whether it is exact or, with a tolerance, close enough. nan never is."""
        return self.exact or (tolerance is not None and self.difference <= tolerance * self.magnitude)


class Side:
    """One side. weights: read from ``found``, with merged language-model heads where the options say so."""

    def __init__(self, format, found: Found, weights: HeadWeights, target: Target):
        self.format, self.found, self.weights, self.target = format, found, weights, target
        self.stored = format.own_part(found)[0]
        identity = [Piece(name, name, tensor.shape) for name, tensor in weights.tensors.items()]
        self.pieces = format.pieces(weights, target) or identity

    def at(self, rows: Piece) -> tuple[str, LazyTensor] | None:
        """Name and values of the rows of ours that a piece of either side names; None where there are none."""
        for piece in self.pieces:
            offset = rows.first - piece.first
            if piece.ours == rows.ours and offset >= 0 and offset + rows.shape[0] <= piece.shape[0]:
                if piece.theirs in self.stored:
                    return piece.theirs, stretch(self.stored[piece.theirs], offset, rows.shape)
                return COMPUTED, stretch(self.weights.tensors[piece.ours], rows.first, rows.shape)
        return None

    def logits(self, inputs: Inputs) -> list[np.ndarray]:
        """Its logits: one (rows, vocab) per depth."""
        return self.format.logits(self.found, self.target, inputs)


def compare_tensors(first: Side, second: Side) -> list[Row]:
    """One row for every tensor of the side with more tensors."""
    pieces, others = sorted((first.pieces, second.pieces), key=len, reverse=True)
    cut = {piece.ours for piece in pieces}
    rows = []
    for piece in [*pieces, *(other for other in others if other.ours not in cut)]:
        sides = first.at(piece), second.at(piece)
        if None in sides:
            names = tuple("(missing)" if side is None else side[0] for side in sides)
            rows.append(Row(names, piece.shape, ("-", "-"), float("inf"), 0.0, False))
        else:
            (name_a, a), (name_b, b) = sides
            rows.append(Row((name_a, name_b), piece.shape, (str(a.dtype), str(b.dtype)), *difference(a, b)))
    return rows


def same_numbers(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where two arrays hold the same, nan included."""
    return (a == b) | (np.isnan(a) & np.isnan(b))


def difference(a: LazyTensor, b: LazyTensor) -> tuple[float, float, bool]:
    """Largest difference, largest magnitude of a, and whether b is a cast to its dtype."""
    largest, magnitude, exact = 0.0, 0.0, True
    for rows in a.stretches():
        given, found = widened(a.read_rows(*rows)), b.read_rows(*rows)
        with np.errstate(over="ignore", invalid="ignore"):
            exact &= np.array_equal(given.astype(b.dtype), found, equal_nan=True)
            apart = np.where(same_numbers(given, widened(found)), 0, np.abs(given - widened(found)))
            largest = np.maximum(largest, apart.max(initial=0))  # np.maximum propagates nan
        magnitude = np.maximum(magnitude, np.abs(given).max(initial=0))
    return float(largest), float(magnitude), bool(exact)


def verify(first: Side, second: Side, tolerance: float | None, inputs: Inputs | None = None) -> tuple[bool, list[str]]:
    """Whether both sides are the same head, and a report in lines.

    tolerance: largest difference that passes, relative to the largest magnitude of a tensor or of the logits of a
    depth; None: tensors must be exact, logits within TOLERANCES of the coarsest dtype.
    """
    inputs = inputs or Inputs()
    rows = compare_tensors(first, second)
    widths = [max(len(row.names[side]) for row in rows) for side in (0, 1)]
    lines = [f"tensors, {first.format.name} and {second.format.name}:"]
    for row in rows:
        names = "  ".join(name.ljust(width) for name, width in zip(row.names, widths, strict=True))
        types = row.dtypes[0] if len(set(row.dtypes)) == 1 else " to ".join(row.dtypes)
        verdict = "" if row.passes(tolerance) else "  DIFFERS"
        lines.append(f"  {names}  {_shape(row.shape)} {types}  largest difference {row.difference:.3g}{verdict}")
    dtypes = {dtype for row in rows for dtype in row.dtypes}
    coarsest = next((name for name in reversed(TOLERANCES) if name in dtypes), "float32")
    allowed = TOLERANCES[coarsest] if tolerance is None else tolerance
    logits, within = [side.logits(inputs) for side in (first, second)], True
    lines.append(f"logits, {inputs.rows} positions of seed {inputs.seed}, tolerance {allowed:g} of the largest:")
    for depth, (a, b) in enumerate(zip(*logits, strict=False)):
        largest = float(np.abs(a).max())
        with np.errstate(invalid="ignore"):  # what is not finite on both sides alike is no difference
            gap = float(np.where(same_numbers(a, b), 0, np.abs(a.astype(np.float64) - b)).max())
        fits = gap == 0 or gap <= allowed * largest  # false for nan
        within &= fits
        figures = f"largest difference {gap:.3g}, largest logit {largest:.3g}"
        lines.append(f"  depth {depth}: {figures}{'' if fits else '  DIFFERS'}")
    if not logits[0] or not logits[1]:
        within = False
        lines.append("  one side has no logits  DIFFERS")
    same = within and all(row.passes(tolerance) for row in rows)
    lines.append("verified: both sides are the same head" if same else "not verified: the sides differ")
    return same, lines


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
