"""The one reader and the one writer of JSON and YAML.

What is read may come from anywhere: it is a regular file of bounded size, nested no deeper and with no longer numbers
than any file of the field, so that a hostile one ends in a line of text. NaN and infinities are read, because older
files hold them, and never written: a number that is not finite is null in every file.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from runtime.atomic import write_file
from runtime.files.regular import read_text
from runtime.files.shown import shown

MOST_JSON = 1 << 24  # bytes; the index of a backbone of 400B parameters takes one megabyte
MOST_YAML = 1 << 18  # bytes of options; PyYAML reads about that much a second
MOST_VALUES = 100_000  # of a YAML document, each alias counted with all that it stands for
MOST_DEPTH = 64
MOST_DIGITS = 64  # of an integer; tokenizer_config.json may hold 10**30
HALF_CHARACTER = re.compile("[\ud800-\udfff]")


# JSON ----------------------------------------------------------------------------------------------------------------


class _Unfit(ValueError):
    """A value that JSON allows and no file of ours or of the field holds."""


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise _Unfit(f"it holds an integer of {len(text)} digits, expected at most {MOST_DIGITS}")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Unfit(f"it holds {text[:20]}, which is outside float64")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Unfit(f"it holds {shown(next(name for name in names if names.count(name) > 1))} twice")
    return found


@contextlib.contextmanager
def _shallow_stack() -> Iterator[None]:
    """Lowers Python's limit of recursion, which Jittor raises to a million calls: more than fit on the C stack."""
    before, depth, frame = sys.getrecursionlimit(), 0, sys._getframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    sys.setrecursionlimit(min(before, 2 * depth + 500))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            item
            for holder in level
            if isinstance(holder, dict | list)
            for item in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise RecursionError


def parse_json(text: str, where: str | Path, line: int = 1, each_once: bool = False) -> Any:
    """The value of a JSON text.

    where: the file that errors name; line: the text's first line in it; each_once: refuse an object with a repeated
    name, of which otherwise the last value counts. Raises ValueError naming the file, and line and column where the
    text is malformed.
    """
    pairs = _each_once if each_once else None
    nested = text.count("[") + text.count("{") > MOST_DEPTH
    try:
        with _shallow_stack() if nested else contextlib.nullcontext():
            value = json.loads(text, parse_int=_integer, parse_float=_float, object_pairs_hook=pairs)
        if nested:
            _check_depth(value)
    except json.JSONDecodeError as error:
        place = f"{where} line {line + error.lineno - 1}"
        message = "something follows a complete value" if error.msg == "Extra data" else error.msg
        raise ValueError(f"{place}: not valid JSON ({message}, column {error.colno})") from error
    except _Unfit as error:
        raise ValueError(f"{where}: {error}") from error
    except RecursionError:
        raise ValueError(f"{where}: nested more than {MOST_DEPTH} deep") from None
    return value


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises ValueError naming the file as ``parse_json`` does, and for one that is not
    regular, larger than ``MOST_JSON`` or not UTF-8; OSError when it cannot be opened."""
    return parse_json(read_text(path, MOST_JSON), path)


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file when there is none, or no file."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; expected a JSON file") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def plain(value: Any) -> Any:
    """``value`` as JSON types, as it will be read again: None for numbers that are not finite, lists for tuples and
    arrays, text for keys and paths. Raises TypeError for other types."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # of NumPy, which this module does not load
        return plain(value.tolist())
    if hasattr(value, "model_dump"):  # of pydantic
        return plain(value.model_dump(mode="json"))
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def to_json(value: Any, indent: int | None = None, compact: bool = False) -> str:
    """A value as JSON text, of ``plain`` types; on one line unless ``indent`` is given, compact: without spaces. UTF-8
    can encode it: half a surrogate pair is escaped."""
    separators = (",", ":") if compact else None
    text = json.dumps(plain(value), indent=indent, separators=separators, ensure_ascii=False, allow_nan=False)
    return HALF_CHARACTER.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def write_json(path: str | Path, value: Any, indent: int = 2) -> None:
    """Write a JSON file atomically; its folder is made. Raises OSError naming the file."""
    write_file(path, to_json(value, indent) + "\n")


def identity(value: Any, **layout: Any) -> str:
    """JSON text that stays in memory: it names a value inside a hash, or is checked. layout: of ``json.dumps``, whose
    text it is, NaN included: hashes in stored files depend on every character."""
    return json.dumps(value, **layout)


# YAML ----------------------------------------------------------------------------------------------------------------


def _check_nodes(root: Any) -> None:
    """Raises ValueError for a document that is too deep or, with its aliases spelled out, too large."""
    count, waiting = 0, [iter([root])]
    while waiting:
        node = next(waiting[-1], None)
        if node is None:
            waiting.pop()
            continue
        count += 1
        if count > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values, each alias counted with all that it stands for")
        if len(waiting) > MOST_DEPTH:
            raise RecursionError
        if isinstance(node.value, list):
            waiting.append(_children(node.value))
        elif node.tag.endswith(":int") and len(node.value) > MOST_DIGITS:
            raise ValueError(f"an integer of {len(node.value)} digits, expected at most {MOST_DIGITS}")


def _children(items: list) -> Iterable[Any]:
    for item in items:
        yield from item if isinstance(item, tuple) else (item,)


def _loader(text: str):
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent, index):
            self.depth += 1
            if self.depth > MOST_DEPTH:
                raise RecursionError
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    return Loader(text)


def parse_yaml(text: str, where: str | Path) -> Any:
    """The value of a YAML text. Raises ValueError naming the file where it is malformed, and for what ``parse_json``
    refuses."""
    import yaml

    try:
        loader = _loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _check_nodes(root)
        return loader.construct_document(root)
    except RecursionError:
        raise ValueError(f"{where}: nested more than {MOST_DEPTH} deep") from None
    # What PyYAML raises for a scalar that does not fit its tag is of any of these.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())[:200]}") from error


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file. Raises ValueError naming the file."""
    try:
        content = parse_yaml(read_text(path, MOST_YAML), path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of options to values, got a {type(content).__name__}")
    return content


def to_yaml(content: Mapping[str, Any]) -> str:
    """A mapping as YAML text, in its order."""
    import yaml

    return yaml.safe_dump(plain(content), sort_keys=False)
