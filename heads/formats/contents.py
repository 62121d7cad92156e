"""What a conversion passes from reader to writer: a head's parameters and the backbone that it belongs to."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from backbone.config import BackboneConfig, read_config
from backbone.files.lazy import LazyTensor, Shape, in_memory, join_rows
from backbone.formats.cast import FLOATS, Rounding, cast
from backbone.weights import EMBEDDING, LM_HEAD, check_names, open_tensors

FLOAT32 = FLOATS["float32"]


@dataclass
class HeadWeights:
    """A head in no format. head: its name; options: all fields of its Config; tensors: its parameters by our names.

    config: its checkpoint's config.json, or ``{"imported": ...}`` for a head from elsewhere. texts: other JSON files of
    the checkpoint, by file name. notes: what the reader decided or left out, one sentence each.
    """

    head: str
    options: dict
    tensors: dict[str, LazyTensor]
    config: dict
    texts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Casting:
    """The dtype that a conversion writes, and the rounding so far."""

    dtype: np.dtype
    rounding: Rounding = field(default_factory=Rounding)

    def apply(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """The tensors in that dtype. Reading raises ValueError naming one whose values it cannot hold."""
        return {name: cast(name, tensor, self.dtype, self.rounding) for name, tensor in tensors.items()}


class Target:
    """The backbone of a head; only what is used is read. path: a directory; None: the embedded one."""

    def __init__(self, path=None):
        self.path = str(path) if path else None

    def __str__(self) -> str:
        return f"the backbone {self.path or 'embedded here'}"

    # Loading a model starts Jittor, so these imports are inside functions.

    @property
    def directory(self) -> Path:
        """Its directory."""
        from backbone.model import EMBEDDED

        return Path(self.path) if self.path else EMBEDDED

    @functools.cached_property
    def config(self) -> BackboneConfig:
        """Its sizes. ValueError for a directory without a model."""
        return read_config(self.directory)

    @functools.cached_property
    def model(self):
        """The loaded backbone, in float16."""
        from backbone.model import load_backbone

        return load_backbone(self.path)

    @functools.cached_property
    def exact_model(self):
        """The backbone with its embedding and language-model head as stored: in float32 unless those are float16."""
        from backbone.model import load_backbone

        stored = {tensor.dtype for tensor in (self.embedding, self.lm_head)}
        return self.model if stored == {FLOATS["float16"]} else load_backbone(self.path, "float32")

    @functools.cached_property
    def _ends(self) -> dict[str, LazyTensor]:
        return {name: tensor for name, tensor in open_tensors(self.directory) if name in (EMBEDDING, LM_HEAD)}

    @property
    def embedding(self) -> LazyTensor:
        """(vocab, dim), as stored."""
        return self._ends[EMBEDDING]

    @property
    def lm_head(self) -> LazyTensor:
        """(vocab, dim), as stored."""
        return self._ends[EMBEDDING if self.config.tie_embeddings else LM_HEAD]

    def tokenizer_fingerprint(self) -> str | None:
        """None where the backbone's folder has no readable tokenizer."""
        from backbone.tokenizer import load_tokenizer

        try:
            return load_tokenizer(self.path).fingerprint
        except (OSError, ValueError):
            return None

    def check_belongs(self, weights: HeadWeights) -> None:
        """Raises ValueError for a head that was trained on another backbone; an imported one names none."""
        trained_on = weights.config.get("backbone", {})
        fingerprint = trained_on.get("fingerprint")
        if fingerprint is not None and fingerprint != self.model.fingerprint:
            raise ValueError(
                f"the head was trained on backbone {fingerprint} ({trained_on.get('path') or 'embedded'}), "
                f"{self} is {self.model.fingerprint}; pass --backbone with the right one"
            )

    def check_sizes(self, where, width: int, vocabulary: int | None) -> None:
        """Raises ValueError for a head of another width or, where it is known, another vocabulary."""
        own = self.config
        if width != own.hidden_size or vocabulary not in (None, own.vocab_size):
            theirs = f"width {width}" + (f" and vocabulary {vocabulary}" if vocabulary else "")
            raise ValueError(
                f"{where} belongs to a backbone of {theirs}; {self} has width {own.hidden_size} and vocabulary "
                f"{own.vocab_size}; pass --backbone with the right one"
            )

    def check_same(self, where, name: str, tensor: LazyTensor, own: LazyTensor) -> None:
        """Raises ValueError when a tensor in a head's file is not the backbone's in the dtype of that file."""
        if tensor.shape != own.shape:
            raise ValueError(f"{where}: {name} is {tensor.shape}, that of {self} is {own.shape}")
        worst = 0.0
        for rows in tensor.stretches():
            mine = own.read_rows(*rows).astype(tensor.dtype).astype(np.float32)
            apart = np.abs(tensor.read_rows(*rows).astype(np.float32) - mine).max(initial=0)
            worst = float(np.maximum(worst, apart))  # max() would lose a nan
        if not worst == 0:  # true for nan
            raise ValueError(
                f"{where}: {name} is not that of {self}, largest difference {worst:.3g}; "
                "pass --backbone with the right one"
            )


class Piece(NamedTuple):
    """Where a tensor of another format is in ours: ``theirs`` (of this shape) is rows ``first``, ``first`` + 1, .. of
    ``ours``. Tables of pieces serve both directions, so no name is written twice."""

    theirs: str
    ours: str
    shape: Shape
    first: int = 0


def stretch(tensor: LazyTensor, first: int, shape: Shape) -> LazyTensor:
    """The rows of a tensor from ``first`` on, of this shape."""
    return LazyTensor(tensor.dtype, shape, lambda start, stop: tensor.read_rows(first + start, first + stop))


def gather(pieces: Iterable[Piece], theirs: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Our tensors from theirs, all float32."""
    parts: dict[str, list[Piece]] = {}
    for piece in pieces:
        parts.setdefault(piece.ours, []).append(piece)
    ours = {}
    for name, pieces_of in parts.items():
        pieces_of.sort(key=lambda piece: piece.first)
        tensors = [widen(piece.theirs, theirs[piece.theirs]) for piece in pieces_of]
        ours[name] = tensors[0] if len(tensors) == 1 else join_rows(tensors)
    return ours


def scatter(pieces: Iterable[Piece], ours: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Their tensors from ours."""
    return {piece.theirs: stretch(ours[piece.ours], piece.first, piece.shape) for piece in pieces}


def widen(name: str, tensor: LazyTensor) -> LazyTensor:
    """The tensor in float32, which holds every number of 16 bits."""
    return cast(name, tensor, FLOAT32, Rounding())


def zeros(shape: Shape) -> LazyTensor:
    """A tensor of zeros, which a format leaves out."""
    return in_memory(np.zeros(shape, np.float32))


def expect(
    where, tensors: Mapping[str, LazyTensor], shapes: Mapping[str, Shape], integers: Collection[str] = ()
) -> None:
    """Raises ValueError naming every tensor that is missing, unknown, of another shape, or not floating point; those
    named in ``integers`` are int32."""
    try:
        check_names({name: tensor.shape for name, tensor in tensors.items()}, shapes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    for name in shapes:
        expected = {"int32": np.dtype(np.int32)} if name in integers else FLOATS
        if tensors[name].dtype not in expected.values():
            raise ValueError(f"{where}: {name} is {tensors[name].dtype}; expected one of {', '.join(expected)}")


def with_own_lm_heads(weights: HeadWeights, target: Target) -> HeadWeights:
    """The same head with a complete language-model head per depth: W + B A in float32 for low rank, a copy of the
    backbone's for a shared one. Raises ValueError for a head of another backbone."""
    if weights.options.get("lm_head", "own") == "own":
        return weights
    target.check_belongs(weights)
    tensors = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith("lm_heads.")}
    for depth in range(weights.options["num_depths"]):
        name = f"lm_heads.{depth}."
        down, up = (weights.tensors.get(f"{name}{part}.weight") for part in ("down", "up"))
        tensors[f"{name}weight"] = _sum(target.lm_head, up, down)
    note = f"its {weights.options['lm_head']} language-model heads are written in full, one per depth; read back as own"
    options = {**weights.options, "lm_head": "own"}
    return HeadWeights(weights.head, options, tensors, weights.config, weights.texts, [*weights.notes, note])


def _sum(base: LazyTensor, up: LazyTensor | None, down: LazyTensor | None) -> LazyTensor:
    """base + up down, (vocab, dim) float32, the sum in float64."""

    def read_rows(start: int, stop: int) -> np.ndarray:
        rows = base.read_rows(start, stop).astype(np.float64)
        if up is not None:
            rows += up.read_rows(start, stop).astype(np.float64) @ down.read().astype(np.float64)
        return rows.astype(np.float32)

    return LazyTensor(FLOAT32, base.shape, read_rows)
