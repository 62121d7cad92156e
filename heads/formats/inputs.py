"""The inputs of a comparison of two heads: hidden states and tokens that depend only on a seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAX_DEPTHS = 64  # tokens are drawn for this many, so that heads of different depths read the same ones


class Drawn(NamedTuple):
    """hidden: (rows, dim) float32; layers: the same by layer; token_ids: (rows + depths,) int32."""

    hidden: np.ndarray
    layers: dict[int, np.ndarray]
    token_ids: np.ndarray


@dataclass(frozen=True)
class Inputs:
    """One sequence of ``rows`` positions. The hidden states are standard normal, as after a final norm."""

    rows: int = 8
    seed: int = 0

    def of(self, dim: int, vocab_size: int, num_depths: int, layers: Iterable[int] = ()) -> Drawn:
        """The inputs of a head of these sizes. layers: indices of further hidden states."""
        random = np.random.default_rng(self.seed)
        hidden = random.standard_normal((self.rows, dim)).astype(np.float32)
        token_ids = random.integers(0, vocab_size, self.rows + MAX_DEPTHS).astype(np.int32)
        further = {index: random.standard_normal((self.rows, dim)).astype(np.float32) for index in layers}
        assert num_depths <= MAX_DEPTHS, num_depths
        return Drawn(hidden, further, token_ids[: self.rows + num_depths])
