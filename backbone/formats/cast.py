"""Conversion of floating-point types while tensors stream, with the rounding it causes."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from backbone.files.lazy import LazyTensor

FLOATS: dict[str, np.dtype] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
KEEP = "keep"
ALL_FLOATS = (*FLOATS.values(), np.dtype(np.float64))


@dataclass
class Rounding:
    """The largest difference between a number before and after, and its tensor."""

    largest: float = 0.0
    name: str | None = None

    def note(self, name: str, difference: float) -> None:
        """Take one more difference into account."""
        if difference > self.largest:
            self.largest, self.name = difference, name


def widened(numbers: np.ndarray) -> np.ndarray:
    """The same numbers in a type that holds differences of them: float64 for 8 bytes a number, else float32."""
    return numbers.astype(np.float64 if numbers.dtype.itemsize == 8 else np.float32)


def cast(name: str, tensor: LazyTensor, dtype: np.dtype, rounding: Rounding) -> LazyTensor:
    """The tensor in another floating-point type, rounded to nearest; integers and booleans pass unchanged.

    Reading raises ValueError naming the tensor when a finite number becomes infinite.
    """
    if tensor.dtype == dtype or tensor.dtype not in ALL_FLOATS:
        return tensor

    def read_rows(start: int, stop: int) -> np.ndarray:
        before = tensor.read_rows(start, stop)
        with np.errstate(all="ignore"):
            after = before.astype(dtype)
            exact = widened(before)
            finite = np.isfinite(exact)
            error = np.abs(exact - after.astype(exact.dtype), where=finite, out=np.zeros_like(exact))
        if not np.isfinite(error).all():
            largest = np.abs(exact[finite]).max()
            raise ValueError(
                f"{name} holds {largest:.6g}, more than {dtype} can hold; choose --dtype bfloat16 or float32"
            )
        rounding.note(name, float(error.max(initial=0.0)))
        return after

    return LazyTensor(dtype, tensor.shape, read_rows)
