"""Finds heads on disk: a folder ``heads/<name>/`` whose ``__init__`` says ``HEAD = <class>`` is a head."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.entry import suggest

if TYPE_CHECKING:
    from heads.base import Head

FOLDER = Path(__file__).resolve().parent


def available() -> list[str]:
    """Names of all heads, sorted."""
    return sorted(path.parent.name for path in FOLDER.glob("*/head.py"))


def head_class(name: str) -> type[Head]:
    """The class of a head by name. Raises ValueError with a suggestion for an unknown one."""
    if name not in available():
        raise suggest("head", name, available())
    return importlib.import_module(f"heads.{name}").HEAD


def make_config(name: str, options: dict):
    """The head's Config from plain values. Raises ValueError for unknown options and values of another type."""
    config = head_class(name).Config
    fields = {f.name: f for f in dataclasses.fields(config)}
    for key, value in options.items():
        if key not in fields:
            raise suggest(f"option of head {name!r}:", key, fields)
        wanted = type(fields[key].default)
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ValueError(f"--head.{key} takes {wanted.__name__}, got {value!r}")
    return config(**options)


def build(name: str, options: dict, backbone) -> Head:
    """A fresh head on this backbone. Raises ValueError for an unknown name or option."""
    return head_class(name)(make_config(name, options), backbone)
