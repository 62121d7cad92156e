"""Paths as records hold them, and how a command gives its record away."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.atomic import write_file

ROOT = Path(__file__).resolve().parents[2]


def project_path(path: str | Path) -> str:
    """A path relative to the project if it is inside, else as given."""
    resolved = Path(path).resolve()
    return resolved.relative_to(ROOT).as_posix() if resolved.is_relative_to(ROOT) else str(path)


def publish(record: Mapping[str, Any], out: str | None) -> None:
    """Print a record as one line of JSON, the last of stdout, after writing it to ``out`` if that is given."""
    if out is not None:
        write_file(out, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(record, ensure_ascii=False))
