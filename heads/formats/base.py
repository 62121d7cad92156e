"""The interface of a format of heads."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import ClassVar

import numpy as np

from backbone.files.lazy import LazyTensor
from heads.formats.contents import FLOAT32, Casting, HeadWeights, Piece, Target
from heads.formats.files import Found
from heads.formats.inputs import Inputs


class Format(abc.ABC):
    """name, sentence: as the command line shows them; dtype: written by default."""

    name: ClassVar[str]
    sentence: ClassVar[str]
    dtype: ClassVar[np.dtype] = FLOAT32

    @abc.abstractmethod
    def recognize(self, found: Found) -> bool:
        """Whether an opened file has this format."""

    def own_part(self, found: Found) -> tuple[dict[str, LazyTensor], list[str]]:
        """The tensors that are the head's, and notes about the others."""
        return found.tensors, []

    @abc.abstractmethod
    def read(self, found: Found, target: Target) -> HeadWeights:
        """The head in a file. Raises ValueError for what ours cannot compute, for a damaged file, and for every tensor
        that is missing, unknown or of another backbone."""

    @abc.abstractmethod
    def check_out(self, out: Path, overwrite: bool) -> Path:
        """The path that will be written. Raises ValueError when something is in the way."""

    @abc.abstractmethod
    def write(self, weights: HeadWeights, out: Path, casting: Casting, target: Target) -> None:
        """Write a head. Raises ValueError with the reason for one that the format cannot hold."""

    def pieces(self, weights: HeadWeights, target: Target) -> list[Piece]:
        """Where each of its tensors is in ours; empty for a format with our names."""
        return []

    @abc.abstractmethod
    def logits(self, found: Found, target: Target, inputs: Inputs) -> list[np.ndarray]:
        """What the file's own tensors compute: one (rows, vocab) per depth."""
