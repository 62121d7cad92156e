"""The space of a sweep: the options of a training that are varied, with their values, read from YAML.

    learning_rate: {low: 1e-4, high: 1e-2, log: true}
    tokens_per_step: {low: 1024, high: 4096, step: 1024}
    optimizer: {choices: [adamw, lion]}
    head.num_layers: {choices: [1, 2]}

An option that is a number has bounds, both included, or choices; any other has choices.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass

from heads.registry import head_class
from runtime.entry import suggest
from runtime.files.shown import shown
from runtime.options import option_fields
from trainer.config import FIELDS, OUTPUT, TYPES, TextOptions, TrainConfig

# Trials that differ in these options cannot be compared, or would write the same files.
FIXED = OUTPUT | option_fields(TextOptions).keys() | {"head", "tree_nodes"}
HEAD = "head."
MOST_NUMBER = sys.float_info.max
MOST_WHOLE = 2**53  # above it, a float cannot tell whole numbers apart


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; integers for an option that is one. log: drawn uniformly in the
    logarithm; step: only ``low`` plus multiples of it."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def suggest(self, trial, name: str):
        """Draw the value of an Optuna trial."""
        if isinstance(self.low, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log, step=self.step or 1)
        return trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)


@dataclass(frozen=True)
class Choices:
    """One of these values."""

    values: tuple

    def suggest(self, trial, name: str):
        """Draw the value of an Optuna trial."""
        return trial.suggest_categorical(name, self.values)


Space = Mapping[str, Range | Choices]


def apply(config: TrainConfig, values: Mapping[str, object]) -> TrainConfig:
    """A copy of the options of a training with some of them replaced; keys as in a space."""
    plain = {name: value for name, value in values.items() if not name.startswith(HEAD)}
    head = {name.removeprefix(HEAD): value for name, value in values.items() if name.startswith(HEAD)}
    return dataclasses.replace(config, **plain, head_options={**config.head_options, **head})


def check_keys(content: Mapping, source: str) -> dict[str, Mapping]:
    """The entries of a space by option, ``-`` and ``_`` alike. Needs no head and is quick.

    Raises ValueError for an unknown option, with a suggestion, and for one that a sweep cannot vary.
    """
    entries: dict[str, Mapping] = {}
    if not content:
        raise ValueError(f"{source} is empty; expected options with low and high, or with choices")
    for key, entry in content.items():
        name = str(key).replace("-", "_")
        sweepable = [field for field in FIELDS if field not in FIXED and _kinds(TYPES[field])]
        if not name.startswith(HEAD) and name not in sweepable:
            if name in FIELDS:
                raise ValueError(f"{source}: {key} cannot be swept; trials that differ in it cannot be compared")
            raise suggest(f"key in {source}:", str(key), [*sweepable, "head.<option>"])
        if name in entries:
            raise ValueError(f"{source}: {name} is given twice")
        if not isinstance(entry, Mapping):
            raise ValueError(f"{source}: {key} takes {{low: .., high: ..}} or {{choices: [..]}}, got {shown(entry)}")
        if not name.startswith(HEAD):
            _spec(entry, TYPES[name], f"{source}: {key}")
        entries[name] = entry
    return entries


def make_space(entries: Mapping[str, Mapping], base: TrainConfig, source: str) -> Space:
    """The space of these entries, for trials whose other options are those of ``base``.

    Raises ValueError for an option that the head does not have, with a suggestion, and for bounds and choices that have
    another type than the option or that no training accepts.
    """
    head_types = {f.name: type(f.default) for f in dataclasses.fields(head_class(base.head).Config)}
    space: dict[str, Range | Choices] = {}
    for name, entry in entries.items():
        option = name.removeprefix(HEAD)
        if name.startswith(HEAD) and option not in head_types:
            raise suggest(f"option of head {base.head!r} in {source}:", option, head_types)
        spec = _spec(entry, head_types[option] if name.startswith(HEAD) else TYPES[name], f"{source}: {name}")
        space[name] = spec
        # If both ends of a range are valid, so are the numbers between.
        for value in spec.values if isinstance(spec, Choices) else (spec.low, spec.high):
            try:
                apply(base, {name: value}).check()
            except ValueError as error:
                raise ValueError(f"{source}: {name} cannot be {shown(value)}: {error}") from error
    return space


def _kinds(wanted) -> tuple[type, ...]:
    """The plain types of an option; none for a list."""
    kinds = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    return kinds if set(kinds) <= {int, float, bool, str, type(None)} else ()


def _spec(entry: Mapping, wanted, where: str) -> Range | Choices:
    """One entry of the space. wanted: the option's type; where: the beginning of error messages."""
    allowed = ("choices",) if "choices" in entry else ("low", "high", "log", "step")
    for key in entry:
        if key not in allowed:
            raise suggest(f"key under {where}:", str(key), allowed)
    if "choices" in entry:
        return _choices(entry["choices"], wanted, where)
    if wanted not in (int, float):
        raise ValueError(f"{where} is not a number: expected choices: [..]")
    missing = {"low", "high"} - set(entry)
    if missing:
        raise ValueError(f"{where} needs {' and '.join(sorted(missing))}, or choices")
    low, high = (_number(entry[key], wanted, f"{where}.{key}") for key in ("low", "high"))
    log = entry.get("log", False)
    step = _number(entry["step"], wanted, f"{where}.step") if "step" in entry else None
    if not isinstance(log, bool):
        raise ValueError(f"{where}.log takes true or false, got {shown(log)}")
    if low >= high:
        raise ValueError(f"{where}: low must be below high, got {low} and {high}")
    if log and low <= 0:
        raise ValueError(f"{where}: log needs a low above 0, got {low}")
    if not math.isfinite(high - low):
        raise ValueError(f"{where}: low and high are too far apart, got {low} and {high}")
    if step is not None and (log or step <= 0 or not _divides(step, high - low)):
        raise ValueError(f"{where}: step must be above 0, divide high - low and not be combined with log; got {step}")
    return Range(low, high, log, step)


def _divides(step: float, width: float) -> bool:
    """Whether a range is a number of steps, few enough to be counted."""
    count = width / step
    return count <= MOST_WHOLE and math.isclose(count, round(count))


def _choices(values, wanted, where: str) -> Choices:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where}.choices takes a list of values, got {shown(values)}")
    kinds, found = _kinds(wanted), []
    for value in values:
        if wanted in (int, float):
            value = _number(value, wanted, f"{where}.choices")
        elif type(value) not in kinds:
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            hint = "; YAML reads on, off, yes and no as true and false: quote them" if str in kinds else ""
            raise ValueError(f"{where}.choices takes {names}, got {shown(value)}{hint}")
        found.append(value)
    if len(set(found)) < len(found):
        raise ValueError(f"{where}.choices contains a value twice: {shown(values)}")
    return Choices(tuple(found))


def _number(value, wanted: type, where: str):
    """A finite number of the option's type. Accepts ``1e-3``, which is text in YAML 1.1: that needs a dot."""
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError as error:
            raise ValueError(f"{where} takes a number, got {shown(value)}") from error
    if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= MOST_NUMBER:
        raise ValueError(f"{where} takes a number, got {shown(value)}")
    if wanted is int:
        if number != int(number) or abs(number) > MOST_WHOLE:
            raise ValueError(f"{where} takes a whole number, got {shown(value)}")
        return int(number)
    return float(number)
