"""Reads a head in one format and writes it in another."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from backbone.files.lazy import LazyTensor, finite
from backbone.formats.cast import FLOATS, KEEP
from backbone.formats.convert import ConvertOptions
from heads.formats.contents import FLOAT32, Casting, Target, with_own_lm_heads
from heads.formats.eagle import Eagle
from heads.formats.eagle3 import Eagle3, Speculators
from heads.formats.files import Found, open_head
from heads.formats.hydra import Hydra
from heads.formats.medusa import Medusa, TensorRTMedusa, VLLMMedusa
from heads.formats.own import Checkpoint, JittorPickle, Npz
from heads.formats.verify import Side, verify
from runtime.entry import suggest
from runtime.files.documents import to_json

KNOWN = (
    Checkpoint(), JittorPickle(), Npz(), Medusa(), VLLMMedusa(), TensorRTMedusa(), Hydra(), Eagle(), Eagle3(),
    Speculators(),
)  # fmt: skip
BY_NAME = {format.name: format for format in KNOWN}
FORMATS: dict[str, str] = {name: format.sentence for name, format in BY_NAME.items()}


def recognize(path: str | Path) -> str | None:
    """The format of the head at a path, from the content of its file; None where there is no head.

    Raises ValueError naming the file for a damaged or hostile one.
    """
    found = open_head(Path(path))
    return None if found is None else _format_of(found)


def _format_of(found: Found) -> str | None:
    return next((name for name, format in BY_NAME.items() if format.recognize(found)), None)


def _open(path: Path) -> Found:
    found = open_head(path)
    if found is None:
        raise ValueError(f"{path} holds no head; expected a folder or file in one of the formats {', '.join(FORMATS)}")
    if not found.tensors:
        raise ValueError(f"{found.file} holds no parameters, so there is nothing to convert")
    return found


def _dtype(name: str | None, default: np.dtype, tensors: Mapping[str, LazyTensor]) -> np.dtype:
    """The dtype to write. name: of FLOATS; keep: the source's, float32 where it has several; None: the default."""
    if name == KEEP:
        dtypes = {tensor.dtype for tensor in tensors.values()} & set(FLOATS.values())
        return dtypes.pop() if len(dtypes) == 1 else FLOAT32
    if name is not None and name not in FLOATS:
        raise suggest("dtype", name, [*FLOATS, KEEP])
    return FLOATS[name] if name else default


def convert(source: Path, to: str, out: Path, options: ConvertOptions) -> int:
    """Write a head in another format. Returns the exit status: 1 where ``verify`` finds a difference, else 0.

    options: source_format is a name of FORMATS or None, dtype None the format's own, tolerance as in ``verify.verify``.
    Notes go to stderr; the last line of stdout is JSON. Raises ValueError for what cannot be converted, and for an
    ``out`` that must not be replaced.
    """
    source, out = Path(source), Path(out)
    source_format = options.source_format
    for name in filter(None, (to, source_format)):
        if name not in FORMATS:
            raise suggest("format of heads", name, FORMATS)
    found = _open(source)
    source_format = source_format or _format_of(found)
    if source_format is None:
        raise ValueError(
            f"{found.file} is not a head in a known format ({', '.join(FORMATS)}); pass --from with its format"
        )
    reader, writer, target = BY_NAME[source_format], BY_NAME[to], Target(options.backbone)
    written = writer.check_out(out, options.overwrite)
    if written.resolve() in (found.file.resolve(), found.file.resolve().parent):
        raise ValueError(f"--out {out} is the source; choose another")
    casting = Casting(_dtype(options.dtype, writer.dtype, found.tensors))
    weights = reader.read(found, target)
    weights.tensors = {name: finite(f"{found.file}: {name}", tensor) for name, tensor in weights.tensors.items()}
    if options.merge:
        weights = with_own_lm_heads(weights, target)
    writer.write(weights, out, casting, target)
    for text in weights.notes:
        print(text, file=sys.stderr)
    rounding = casting.rounding
    if rounding.largest:
        print(f"rounding to {casting.dtype}: at most {rounding.largest:.3g}, in {rounding.name}", file=sys.stderr)
    same = None
    if options.verify:
        again = _open(written)
        sides = Side(reader, found, weights, target), Side(writer, again, writer.read(again, target), target)
        same, lines = verify(*sides, options.tolerance)
        print("\n".join(lines))
    record = {"source": str(found.file), "source_format": source_format, "out": str(written), "out_format": to}
    record |= {
        "head": weights.head,
        "head_config": weights.options,
        "dtype": str(casting.dtype),
        "notes": weights.notes,
    }
    print(to_json({**record, "rounding": rounding.largest, "rounding_in": rounding.name, "verified": same}))
    return 1 if same is False else 0
