"""What every JSON file of the project has in common: a strict schema, one reader, one writer.

Units stand in the keys, ``null`` is unknown, unknown keys are refused. A field with a default was added later: a file
without it reads as if it held the default.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.atomic import write_file

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, le=1)]
Interval = tuple[float, float]


class OtherKindError(ValueError):
    """The file holds a record of another kind than expected. ``kind``: the kind it names."""

    def __init__(self, path: str | Path, kind: Any, wanted: str):
        super().__init__(f"{path}: its kind is {kind!r}, not {wanted!r}")
        self.kind = kind


class Model(BaseModel):
    """Base of all parts of a record."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class FileRecord(Model):
    """Base of records that are files of their own. A subclass has the fields ``schema_version`` and ``kind``."""

    KIND: ClassVar[str]
    VERSION: ClassVar[int] = 1

    @classmethod
    def parse(cls, data: Mapping[str, Any] | Self, where: str | Path = "record") -> Self:
        """A checked record from plain data; NumPy values, tuples, paths and models are converted.

        Raises ValueError naming ``where`` and the first fields that do not fit.
        """
        if isinstance(data, cls):
            return data
        try:
            return cls.model_validate_json(json.dumps(data, default=_plain))
        except ValidationError as error:
            raise ValueError(f"{where}: {explain(error)}") from error
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from error

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The record of a file. Raises ``OtherKindError`` for a record of another kind, ValueError naming the file and
        what is wrong with it, OSError when it cannot be read."""
        data = read_json(path)
        if not isinstance(data, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}")
        if data.get("kind", "missing") != cls.KIND:
            raise OtherKindError(path, data.get("kind", "missing"), cls.KIND)
        if data.get("schema_version") != cls.VERSION:
            found = data.get("schema_version", "missing")
            raise ValueError(f"{path}: schema_version is {found!r}; this version of the code reads {cls.VERSION}")
        return cls.parse(data, path)

    def to_json(self, indent: int | None = None) -> str:
        """The record as JSON text, on one line unless ``indent`` is given."""
        return json.dumps(self.model_dump(mode="json"), indent=indent, ensure_ascii=False, allow_nan=False)

    def write(self, path: str | Path) -> None:
        """Write the file atomically; its folder is made. Raises OSError naming the file."""
        write_file(path, self.to_json(indent=1) + "\n")


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises ValueError naming the file and the line, OSError when it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def finite(value: Any) -> Any:
    """``value`` as JSON types, with None for numbers that are not finite. Raises TypeError for unknown types."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else finite(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def explain(error: ValidationError, most: int = 3) -> str:
    """The first few problems of a validation error on one line, each with its field."""
    problems = []
    for problem in error.errors()[:most]:
        field = ".".join(str(part) for part in problem["loc"]) or "record"
        message = problem["msg"].removeprefix("Value error, ")
        got = problem["input"]
        shown = f" (got {got!r})" if isinstance(got, str | int | float | bool | None) and len(repr(got)) < 60 else ""
        problems.append(f"{field}: {message}{shown}")
    rest = error.error_count() - most
    return "; ".join(problems) + (f"; and {rest} more" if rest > 0 else "")
