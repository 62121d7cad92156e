"""Paths as records hold them, and how a command gives its record away."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.files.documents import to_json, write_json

ROOT = Path(__file__).resolve().parents[2]


def project_path(path: str | Path) -> str:
    """A path relative to the project if it is inside, else as given."""
    resolved = Path(path).resolve()
    return resolved.relative_to(ROOT).as_posix() if resolved.is_relative_to(ROOT) else str(path)


def publish(record: Mapping[str, Any], out: str | None) -> None:
    """Print a record as one line of JSON, the last of stdout, after writing it to ``out`` if that is given."""
    if out is not None:
        write_json(out, record, indent=1)
    print(to_json(record))
