"""What the records of the project have in common: a strict schema, one reader, one writer.

Units stand in the keys, ``null`` is unknown, unknown keys are refused. A field with a default was added later: a file
without it reads as if it held the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.files.documents import identity, plain, read_json, to_json, write_json
from runtime.files.shown import MOST, shown

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, le=1)]
Interval = tuple[float, float]
MOST_WORDS = 200  # characters of a validator's own message, which may quote a value


class OtherKindError(ValueError):
    """The file holds a record of another kind than expected. ``kind``: the kind it names."""

    def __init__(self, path: str | Path, kind: Any, wanted: str):
        super().__init__(f"{path}: its kind is {shown(kind)}, not {wanted!r}")
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
            return cls.model_validate_json(identity(data, default=plain))
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
            raise ValueError(f"{path}: schema_version is {shown(found)}; this version of the code reads {cls.VERSION}")
        return cls.parse(data, path)

    def to_json(self, indent: int | None = None) -> str:
        """The record as JSON text, on one line unless ``indent`` is given."""
        return to_json(self, indent)

    def write(self, path: str | Path) -> None:
        """Write the file atomically; its folder is made. Raises OSError naming the file."""
        write_json(path, self, indent=1)


def explain(error: ValidationError, most: int = 3) -> str:
    """The first few problems of a validation error on one line, each with its field."""
    problems = []
    for problem in error.errors()[:most]:
        field = ".".join(str(part) for part in problem["loc"])[:MOST] or "record"
        message = problem["msg"].removeprefix("Value error, ")[:MOST_WORDS]
        got = problem["input"]
        value = f" (got {shown(got)})" if isinstance(got, str | int | float | bool | None) else ""
        problems.append(f"{field}: {message}{value}")
    rest = error.error_count() - most
    return "; ".join(problems) + (f"; and {rest} more" if rest > 0 else "")
