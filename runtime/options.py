"""Options as fields of dataclasses: declared once, with default, help and range, and read by every command line.

    @dataclass
    class Options:
        epochs: float = option(1.0, "passes over the training text", above=0)

    parser = Parser(prog="train.py"); add_options(parser, Options)
    options = read_options(Options, parser.parse_args(words))       # --epochs 2; raises ValueError for --epochs 0
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import typing
from collections.abc import Collection, Sequence
from typing import Any

from runtime.entry import suggest

RANGES = {  # name of the bound: (test, how the message goes on)
    "least": (lambda value, bound: value >= bound, "must be at least {}"),
    "above": (lambda value, bound: value > bound, "must be above {}"),
    "most": (lambda value, bound: value <= bound, "must be at most {}"),
    "below": (lambda value, bound: value < bound, "must be below {}"),
}


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    metavar: str | None = None,
    repeat: bool = False,
    **bounds: float,
):
    """A field that is an option. A list is given as ``--name A B``, or with ``repeat`` as ``--name A --name B``.

    bounds: ``least``, ``above``, ``most``, ``below``, of numbers that are not None.
    """
    assert bounds.keys() <= RANGES.keys(), bounds
    metadata = {"help": help, "choices": tuple(choices), "metavar": metavar, "repeat": repeat, "bounds": bounds}
    if isinstance(default, list):
        return dataclasses.field(default_factory=list, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """The command line's spelling of a field: ``max_steps`` is ``--max-steps``."""
    return f"--{name.replace('_', '-')}"


def option_fields(cls: type, only: Collection[str] | None = None) -> dict[str, dataclasses.Field]:
    """The fields of a dataclass that are options, by name, in order."""
    return {f.name: f for f in dataclasses.fields(cls) if f.metadata and (only is None or f.name in only)}


def add_options(parser, cls: type, *, only: Collection[str] | None = None, suppress: bool = False) -> None:
    """Add the options of a dataclass to a parser or a group of one.

    suppress: an option that is not given is missing from the result, so that other sources can be told apart.
    """
    types = typing.get_type_hints(cls)
    for name, f in option_fields(cls, only).items():
        wanted, default = types[name], [] if f.default is dataclasses.MISSING else f.default
        text = f.metadata["help"] + ("" if default in ("", None, []) or wanted is bool else f" (default: {default})")
        settings: dict[str, Any] = {"dest": name, "help": text.replace("%", "%%")}
        settings["default"] = argparse.SUPPRESS if suppress else default
        metavar = f.metadata["metavar"] or ("FILE" if wanted == list[str] else name.upper())
        if wanted is bool:
            parser.add_argument(flag(name), action="store_true", **settings)
            continue
        [kind] = [t for t in (typing.get_args(wanted) or (wanted,)) if t is not type(None)]
        shape = {}
        if typing.get_origin(wanted) is list:
            shape = {"action": "append"} if f.metadata["repeat"] else {"nargs": "+"}
            settings["default"] = argparse.SUPPRESS if suppress else None if f.metadata["repeat"] else []
        if f.metadata["choices"]:
            parser.add_argument(flag(name), choices=f.metadata["choices"], **settings, **shape)
        else:
            parser.add_argument(flag(name), type=kind, metavar=metavar, **settings, **shape)


def read_options(cls: type, given: argparse.Namespace, **others: Any):
    """The dataclass that a command line filled in, checked. Options it left out keep their defaults.

    others: values of fields that are no options. Raises ValueError as ``check_options`` does.
    """
    values = {name: getattr(given, name) for name in option_fields(cls) if getattr(given, name, None) is not None}
    options = cls(**values, **others)
    check_options(options)
    return options


def check_options(options: Any) -> None:
    """Raises ValueError for a value outside its option's choices or bounds, and for numbers that are not finite."""
    for name, f in option_fields(type(options)).items():
        value = getattr(options, name)
        if f.metadata["choices"] and value is not None and value not in f.metadata["choices"]:
            raise suggest(flag(name), str(value), f.metadata["choices"])
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{flag(name)} must be a number, got {value}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            for bound, limit in f.metadata["bounds"].items():
                fits, message = RANGES[bound]
                if not fits(value, limit):
                    raise ValueError(f"{flag(name)} {message.format(limit)}, got {value}")
