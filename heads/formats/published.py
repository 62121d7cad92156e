"""Formats of other systems: a table of names, a config.json, and tensors that are read strictly."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from backbone.config import BackboneConfig
from backbone.files.lazy import LazyTensor
from heads.formats.base import Format
from heads.formats.contents import Casting, HeadWeights, Piece, Target, expect, scatter
from heads.formats.files import Found, check_folder, folder_and_file, write_folder


class PublishedFormat(Format):
    """A format of another system: a folder with a weight file and a config.json.

    head: the name of the head of ours that it can hold; files: possible names of its weight file, the default first;
    integers: names of our tensors that are token ids.
    """

    head: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    integers: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def table(self, options: dict, sizes: BackboneConfig) -> list[Piece]:
        """Where each of its tensors is in ours."""

    def elsewhere(self, options: dict, sizes: BackboneConfig) -> list[Piece]:
        """Our tensors that a file holds in another form or not at all; ``theirs`` is only their name in a report."""
        return []

    @abc.abstractmethod
    def check_holds(self, weights: HeadWeights) -> None:
        """Raises ValueError with the reason for a head whose options it cannot hold."""

    def check_numbers(self, weights: HeadWeights) -> None:
        """Raises ValueError with the reason for a head whose values it cannot hold."""

    def extras(self, weights: HeadWeights, target: Target) -> dict[str, LazyTensor]:
        """Tensors that it has and ours does not, by name."""
        return {}

    @abc.abstractmethod
    def config(self, weights: HeadWeights, dtype: np.dtype, target: Target) -> dict:
        """Its config.json."""

    def pieces(self, weights: HeadWeights, target: Target) -> list[Piece]:
        return self.table(weights.options, target.config) + self.elsewhere(weights.options, target.config)

    def check_out(self, out: Path, overwrite: bool) -> Path:
        folder, file = folder_and_file(out, self.files)
        check_folder(folder, overwrite)
        return folder / file

    def write(self, weights: HeadWeights, out: Path, casting: Casting, target: Target) -> None:
        if weights.head != self.head:
            raise ValueError(f"{self.name} holds a head {self.head}; {weights.head} computes something else")
        self.check_holds(weights)
        pieces = self.table(weights.options, target.config)
        shapes: dict[str, tuple[int, ...]] = {}
        for piece in self.pieces(weights, target):
            rows = shapes.get(piece.ours, (0,))[0] + piece.shape[0]
            shapes[piece.ours] = (rows, *piece.shape[1:])
        self._check_width(weights, target)
        expect("the head", weights.tensors, shapes, self.integers)
        self.check_numbers(weights)
        tensors = {**scatter(pieces, weights.tensors), **self.extras(weights, target)}
        folder, file = folder_and_file(out, self.files)
        config = {**original_config(weights, self.name), **self.config(weights, casting.dtype, target)}
        write_folder(folder, file, casting.apply(tensors), config)

    def _check_width(self, weights: HeadWeights, target: Target) -> None:
        sizes = weights.config.get("backbone", {})
        if sizes.get("hidden_size"):
            target.check_sizes("the head", sizes["hidden_size"], sizes.get("vocab_size"))


def original_config(weights: HeadWeights, name: str) -> dict:
    """The config.json of a head that was imported from this format, with the fields that we do not use."""
    imported = weights.config.get("imported", {})
    return dict(imported.get("config", {})) if imported.get("format") == name else {}


def base_model(weights: HeadWeights, target: Target, known: dict) -> str:
    """``base_model_name_or_path``: as it was, else the folder of the backbone, absolute: a server runs elsewhere."""
    trained_on = None if target.path else weights.config.get("backbone", {}).get("path")
    return known.get("base_model_name_or_path") or str(Path(trained_on or target.directory).resolve())


def count_conflicts(found: Found, counts: Mapping[str, int]) -> list[str]:
    """Notes on keys of config.json that contradict the tensors. counts: what the tensors hold, by key."""
    return [
        f"config.json says {key} {found.config[key]}, the tensors hold {count}: read as {count}"
        for key, count in counts.items()
        if found.config.get(key) not in (None, count)
    ]


def tied_blocks_differ(weights: HeadWeights, first: int) -> str | None:
    """The first tensor of a depth's blocks ``first`` + 1, .. that differs from block ``first``; None if none does.

    Published training and loading code repeats one block where ours has several, so it can only use equal ones.
    """
    for depth in range(weights.options["num_depths"]):
        for layer in range(first + 1, weights.options["num_layers"]):
            for part in ("weight", "bias"):
                name, tied = (f"blocks.{depth}.{j}.linear.{part}" for j in (layer, first))
                if not np.array_equal(weights.tensors[name].read(), weights.tensors[tied].read()):
                    return name
    return None


class Float64(Mapping):
    """Tensors as float64 arrays, each read on access."""

    def __init__(self, tensors: Mapping[str, LazyTensor]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name].read().astype(np.float64)

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:  # the default would read the tensor
        return name in self._tensors


def exact(tensor: LazyTensor) -> np.ndarray:
    """A tensor of the backbone as float64."""
    return tensor.read().astype(np.float64)
