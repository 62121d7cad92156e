"""What the formats of other systems share: a table of names, a config.json, and tensors that are read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from backbone.config import BackboneConfig
from backbone.files.lazy import LazyTensor
from heads.formats.contents import FLOAT32, Casting, HeadWeights, Piece, Target, expect, scatter
from heads.formats.files import Found, check_folder, folder_and_file, write_folder
from heads.formats.inputs import Inputs


class PublishedFormat:
    """A format of another system: a folder with a weight file and a config.json.

    head: the name of the head of ours that it can hold; files: what its weight file may be called, the first by
    default; dtype: what is written where nothing is asked for.
    """

    name: ClassVar[str]
    sentence: ClassVar[str]
    head: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    dtype = FLOAT32

    def recognise(self, found: Found) -> bool:
        """Whether an opened file has this format."""
        raise TypeError(f"{type(self).__name__} does not define recognise")

    def own_part(self, found: Found) -> tuple[dict[str, LazyTensor], list[str]]:
        """The tensors that are the head's, and what is to be said of the others."""
        return found.tensors, []

    def read(self, found: Found, target: Target) -> HeadWeights:
        """The head of a file. Raises ValueError for what ours cannot compute, and for every tensor that is missing,
        unknown or of another backbone."""
        raise TypeError(f"{type(self).__name__} does not define read")

    def table(self, options: dict, sizes: BackboneConfig) -> list[Piece]:
        """Where each of its tensors lies in ours."""
        raise TypeError(f"{type(self).__name__} does not define table")

    def check_holds(self, weights: HeadWeights) -> None:
        """Raises ValueError with the reason for a head whose options it cannot hold."""
        raise TypeError(f"{type(self).__name__} does not define check_holds")

    def check_numbers(self, weights: HeadWeights) -> None:
        """Raises ValueError with the reason for a head whose numbers it cannot hold."""

    def extras(self, weights: HeadWeights, target: Target) -> dict[str, LazyTensor]:
        """Tensors that it has and ours does not, by its names."""
        return {}

    def config(self, weights: HeadWeights, dtype: np.dtype, target: Target) -> dict:
        """Its config.json."""
        raise TypeError(f"{type(self).__name__} does not define config")

    def logits(self, found: Found, target: Target, inputs: Inputs) -> list[np.ndarray]:
        """The published equation on the file's own tensors: one (rows, vocab) per depth."""
        raise TypeError(f"{type(self).__name__} does not define logits")

    def pieces(self, weights: HeadWeights, target: Target) -> list[Piece]:
        """The table for this head."""
        return self.table(weights.options, target.config)

    def check_out(self, out: Path, overwrite: bool) -> Path:
        """The weight file that will be written. Raises ValueError when something is in the way."""
        folder, file = folder_and_file(out, self.files)
        check_folder(folder, overwrite)
        return folder / file

    def write(self, weights: HeadWeights, out: Path, casting: Casting, target: Target) -> None:
        """Write the folder. Raises ValueError for a head that the format cannot hold, naming the reason."""
        if weights.head != self.head:
            raise ValueError(
                f"{self.name} holds what the head {self.head} computes; {weights.head} computes something else"
            )
        self.check_holds(weights)
        pieces = self.table(weights.options, target.config)
        shapes: dict[str, tuple[int, ...]] = {}
        for piece in pieces:
            rows = shapes.get(piece.ours, (0,))[0] + piece.shape[0]
            shapes[piece.ours] = (rows, *piece.shape[1:])
        self._check_width(weights, target)
        expect("the head", weights.tensors, shapes)
        self.check_numbers(weights)
        tensors = {**scatter(pieces, weights.tensors), **self.extras(weights, target)}
        folder, file = folder_and_file(out, self.files)
        config = {**kept_config(weights, self.name), **self.config(weights, casting.dtype, target)}
        if config.get("base_model_name_or_path", "") is None:
            weights.notes.append("base_model_name_or_path of config.json is null: name the backbone's folder there")
        write_folder(folder, file, casting.apply(tensors), config)

    def _check_width(self, weights: HeadWeights, target: Target) -> None:
        sizes = weights.config.get("backbone", {})
        if sizes.get("hidden_size"):
            target.check_sizes("the head", sizes["hidden_size"], sizes.get("vocab_size"))


def kept_config(weights: HeadWeights, name: str) -> dict:
    """What the config.json of a head said when it came from this very format: fields that are not ours to know."""
    imported = weights.config.get("imported", {})
    return dict(imported.get("config", {})) if imported.get("format") == name else {}


def base_model(weights: HeadWeights, target: Target, known: dict) -> str | None:
    """What ``base_model_name_or_path`` is to say: as it said before, else the folder that was named."""
    return known.get("base_model_name_or_path") or target.path or weights.config.get("backbone", {}).get("path")


def tied_blocks_differ(weights: HeadWeights, first: int) -> str | None:
    """The first tensor of a depth's blocks ``first`` + 1, .. that is not the one of block ``first``; None if all are.

    Published training and loading code repeats one block where ours has several: such a file can be read only when
    they are the same.
    """
    for depth in range(weights.options["num_depths"]):
        for layer in range(first + 1, weights.options["num_layers"]):
            for part in ("weight", "bias"):
                name, wanted = (f"blocks.{depth}.{j}.linear.{part}" for j in (layer, first))
                if not np.array_equal(weights.tensors[name].whole(), weights.tensors[wanted].whole()):
                    return name
    return None


class Float64(Mapping):
    """Tensors as float64 arrays, each read when it is asked for."""

    def __init__(self, tensors: Mapping[str, LazyTensor]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name].whole().astype(np.float64)

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:  # the default would read the tensor
        return name in self._tensors


def exact(tensor) -> np.ndarray:
    """A tensor of the backbone as float64."""
    return tensor.whole().astype(np.float64)
