"""Options as fields of dataclasses, read by every command line.

Each is declared once, with default, help and range:

    @dataclass
    class Options:
        epochs: float = option(1.0, "passes over the training text", above=0)

    options = parse_options(Options, "train.py", __doc__, words)    # --epochs 2; raises ValueError for --epochs 0
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import typing
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from runtime.entry import Parser, suggest

Options = TypeVar("Options")
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
    nargs: int | str | None = None,
    name: str | None = None,
    **bounds: float,
):
    """A field that is an option. A list is given as ``--name A B``, or with ``repeat`` as ``--name A --name B``.

    nargs: how many values, as argparse has it. name: on the command line, if it is not the field's: ``--continue``, or
    ``results`` for an argument without a flag. bounds: ``least``, ``above``, ``most``, ``below``, of numbers that are
    not None.
    """
    assert bounds.keys() <= RANGES.keys(), bounds
    metadata = {"help": help, "choices": tuple(choices), "metavar": metavar, "repeat": repeat, "nargs": nargs}
    metadata |= {"name": name, "bounds": bounds}
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
    types = typing.get_type_hints(cls, localns={})  # a field may be named like a type
    for field, f in option_fields(cls, only).items():
        wanted, default, about = types[field], [] if f.default is dataclasses.MISSING else f.default, f.metadata
        text = about["help"] + ("" if default in ("", None, []) or wanted is bool else f" (default: {default})")
        name = about["name"] or flag(field)
        settings: dict[str, Any] = {
            "help": text.replace("%", "%%"),
            "default": argparse.SUPPRESS if suppress else default,
        }
        if name.startswith("-"):
            settings["dest"] = field
        if wanted is bool:
            parser.add_argument(name, action="store_true", **settings)
            continue
        [settings["type"]] = [t for t in (typing.get_args(wanted) or (wanted,)) if t is not type(None)]
        if about["choices"]:
            settings["choices"] = about["choices"]
        else:
            settings["metavar"] = about["metavar"] or ("FILE" if wanted == list[str] else field.upper())
        if about["repeat"]:
            settings |= {"action": "append", "default": argparse.SUPPRESS if suppress else None}
        elif about["nargs"] or typing.get_origin(wanted) is list:
            settings["nargs"] = about["nargs"] or "+"
        parser.add_argument(name, **settings)


def parse_options(
    cls: type[Options], prog: str, doc: str, arguments: Sequence[str], only: Collection[str] | None = None
) -> Options:
    """The options of a command line, checked, also by their own ``check`` if there is one.

    doc: its first paragraph describes the command. only: the fields that the command offers. Raises ValueError for
    unknown options, with a suggestion, and for values that make no run.
    """
    parser = Parser(prog=prog, description=doc.split("\n\n")[0], allow_abbrev=False)
    add_options(parser, cls, only=only)
    options = read_options(cls, parser.parse_args(arguments))
    if hasattr(options, "check"):
        options.check()
    return options


def read_options(cls: type[Options], given: argparse.Namespace, **others: Any) -> Options:
    """The dataclass that a command line filled in, checked. Options it left out keep their defaults.

    others: values of fields that are no options. Raises ValueError as ``check_options`` does.
    """
    values = {name: getattr(given, name) for name in option_fields(cls) if getattr(given, name, None) is not None}
    options = cls(**values, **others)
    check_options(options)
    return options


def check_options(options: Any) -> None:
    """Raises ValueError for a value outside its option's choices or bounds, and for numbers that are not finite."""
    for field, f in option_fields(type(options)).items():
        value, name = getattr(options, field), f.metadata["name"] or flag(field)
        if f.metadata["choices"] and value is not None and value not in f.metadata["choices"]:
            raise suggest(name, str(value), f.metadata["choices"])
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a number, got {value}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            for bound, limit in f.metadata["bounds"].items():
                fits, message = RANGES[bound]
                if not fits(value, limit):
                    raise ValueError(f"{name} {message.format(limit)}, got {value}")
