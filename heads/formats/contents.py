"""What a conversion passes along: a head's parameters outside of any file, and the backbone that it belongs to."""

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
    """A head that lies in no file. head: its name; options: all of its Config's; tensors: its parameters by our names.

    config: what its checkpoint's config.json says, or ``{"imported": ...}`` for a head from elsewhere. texts: further
    JSON files of the checkpoint, by file name. notes: what was settled or left out while reading, one sentence each.
    """

    head: str
    options: dict
    tensors: dict[str, LazyTensor]
    config: dict
    texts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Casting:
    """The type that a conversion writes, and what it cost so far."""

    dtype: np.dtype
    rounding: Rounding = field(default_factory=Rounding)

    def apply(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """The tensors in that type. Reading raises ValueError naming one whose numbers it cannot hold."""
        return {name: cast(name, tensor, self.dtype, self.rounding) for name, tensor in tensors.items()}


class Target:
    """The backbone of a head, read as far as it is asked for. path: a directory; None: the embedded one."""

    def __init__(self, path=None):
        self.path = str(path) if path else None

    def __str__(self) -> str:
        return f"the backbone {self.path or 'embedded here'}"

    # Loading a model starts Jittor: the imports wait until one is asked for.

    @property
    def directory(self) -> Path:
        """Where it lies."""
        from backbone.model import EMBEDDED

        return Path(self.path) if self.path else EMBEDDED

    @functools.cached_property
    def config(self) -> BackboneConfig:
        """Its sizes. ValueError for a directory without a model."""
        return read_config(self.directory)

    @functools.cached_property
    def model(self):
        """The backbone itself, in float16."""
        from backbone.model import load_backbone

        return load_backbone(self.path)

    @functools.cached_property
    def exact_model(self):
        """The backbone with its embedding and language-model head as they are stored: in float32 unless those are
        float16."""
        from backbone.model import load_backbone

        stored = {tensor.dtype for tensor in (self.embedding, self.lm_head)}
        return self.model if stored == {FLOATS["float16"]} else load_backbone(self.path, "float32")

    @functools.cached_property
    def _ends(self) -> dict[str, LazyTensor]:
        return {name: tensor for name, tensor in open_tensors(self.directory) if name in (EMBEDDING, LM_HEAD)}

    @property
    def embedding(self) -> LazyTensor:
        """(vocab, dim), in the type it is stored in."""
        return self._ends[EMBEDDING]

    @property
    def lm_head(self) -> LazyTensor:
        """(vocab, dim), in the type it is stored in."""
        return self._ends[EMBEDDING if self.config.tie_embeddings else LM_HEAD]

    def tokenizer_fingerprint(self) -> str | None:
        """None where the backbone's folder holds no tokenizer that can be read."""
        from backbone.tokenizer import load_tokenizer

        try:
            return load_tokenizer(self.path).fingerprint
        except (OSError, ValueError):
            return None

    def check_belongs(self, weights: HeadWeights) -> None:
        """Raises ValueError for a head that was trained on another backbone; one from elsewhere does not say."""
        trained_on = weights.config.get("backbone", {})
        wanted = trained_on.get("fingerprint")
        if wanted is not None and wanted != self.model.fingerprint:
            raise ValueError(
                f"the head was trained on backbone {wanted} ({trained_on.get('path') or 'embedded'}), "
                f"{self} is {self.model.fingerprint}; pass --backbone with the one it knows"
            )

    def check_sizes(self, where, width: int, vocabulary: int | None) -> None:
        """Raises ValueError for a head of another width or, where it says so, another vocabulary; names both."""
        own = self.config
        if width != own.hidden_size or vocabulary not in (None, own.vocab_size):
            theirs = f"width {width}" + (f" and vocabulary {vocabulary}" if vocabulary else "")
            raise ValueError(
                f"{where} is of a backbone of {theirs}; {self} has width {own.hidden_size} and vocabulary "
                f"{own.vocab_size}; pass --backbone with the one it belongs to"
            )

    def check_same(self, where, name: str, tensor: LazyTensor, own: LazyTensor) -> None:
        """Raises ValueError when a tensor that a head carries along is not the backbone's, in the type it lies in."""
        if tensor.shape != own.shape:
            raise ValueError(f"{where}: {name} is {tensor.shape}, that of {self} is {own.shape}")
        worst = 0.0
        for rows in tensor.stretches():
            mine = own.read_rows(*rows).astype(tensor.dtype).astype(np.float32)
            worst = max(worst, float(np.abs(tensor.read_rows(*rows).astype(np.float32) - mine).max(initial=0)))
        if not worst == 0:  # also for what is not a number
            raise ValueError(
                f"{where}: {name} is not that of {self}, largest difference {worst:.3g}; "
                "pass --backbone with the one it belongs to"
            )


class Piece(NamedTuple):
    """Where a tensor of another format lies in ours: ``theirs`` (of this shape) is rows ``first``, ``first`` + 1, .. of
    ``ours``. Tables of pieces are read in both directions, so that no conversion has a name written twice."""

    theirs: str
    ours: str
    shape: Shape
    first: int = 0


def stretch(tensor: LazyTensor, first: int, shape: Shape) -> LazyTensor:
    """Rows of a tensor from ``first`` on, as many as the shape says."""
    return LazyTensor(tensor.dtype, shape, lambda start, stop: tensor.read_rows(first + start, first + stop))


def gather(pieces: Iterable[Piece], theirs: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Our tensors from theirs, all float32."""
    parts: dict[str, list[Piece]] = {}
    for piece in pieces:
        parts.setdefault(piece.ours, []).append(piece)
    ours = {}
    for name, found in parts.items():
        found.sort(key=lambda piece: piece.first)
        tensors = [widen(piece.theirs, theirs[piece.theirs]) for piece in found]
        ours[name] = tensors[0] if len(tensors) == 1 else join_rows(tensors)
    return ours


def scatter(pieces: Iterable[Piece], ours: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Their tensors from ours."""
    return {piece.theirs: stretch(ours[piece.ours], piece.first, piece.shape) for piece in pieces}


def widen(name: str, tensor: LazyTensor) -> LazyTensor:
    """The tensor in float32, which holds every number of 16 bits."""
    return cast(name, tensor, FLOAT32, Rounding())


def zeros(shape: Shape) -> LazyTensor:
    """A tensor that a format leaves out because it is zero."""
    return in_memory(np.zeros(shape, np.float32))


def expect(
    where, tensors: Mapping[str, LazyTensor], shapes: Mapping[str, Shape], integers: Collection[str] = ()
) -> None:
    """Raises ValueError naming every tensor that is missing, unknown, misshapen, or not of floating point numbers;
    those named in ``integers`` are int32."""
    try:
        check_names({name: tensor.shape for name, tensor in tensors.items()}, shapes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    for name in shapes:
        expected = {"int32": np.dtype(np.int32)} if name in integers else FLOATS
        if tensors[name].dtype not in expected.values():
            raise ValueError(f"{where}: {name} is {tensors[name].dtype}; expected one of {', '.join(expected)}")


def with_own_lm_heads(weights: HeadWeights, target: Target) -> HeadWeights:
    """The same head with a whole language-model head per depth: W + B A in float32 for one of low rank, a copy of the
    backbone's for a shared one. Raises ValueError for a head of another backbone."""
    if weights.options.get("lm_head", "own") == "own":
        return weights
    target.check_belongs(weights)
    tensors = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith("lm_heads.")}
    for depth in range(weights.options["num_depths"]):
        name = f"lm_heads.{depth}."
        down, up = (weights.tensors.get(f"{name}{part}.weight") for part in ("down", "up"))
        tensors[f"{name}weight"] = _sum(target.lm_head, up, down)
    note = (
        f"its {weights.options['lm_head']} language-model heads are written whole, one per depth: they come back as own"
    )
    options = {**weights.options, "lm_head": "own"}
    return HeadWeights(weights.head, options, tensors, weights.config, weights.texts, [*weights.notes, note])


def _sum(base: LazyTensor, up: LazyTensor | None, down: LazyTensor | None) -> LazyTensor:
    """base + up down, (vocab, dim) float32, the sum in float64."""

    def read_rows(start: int, stop: int) -> np.ndarray:
        rows = base.read_rows(start, stop).astype(np.float64)
        if up is not None:
            rows += up.read_rows(start, stop).astype(np.float64) @ down.whole().astype(np.float64)
        return rows.astype(np.float32)

    return LazyTensor(FLOAT32, base.shape, read_rows)
