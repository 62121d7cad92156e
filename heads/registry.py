"""Finds heads on disk: a folder ``<name>/`` with a ``head.py`` and ``HEAD = <class>`` in its ``__init__`` is a head.

Heads are in ``heads/`` and in the folders that the environment variable GORGON_HEADS names, separated as in PATH:

    GORGON_HEADS=~/my_heads python train.py --list-heads

All are imported as ``heads.<name>``, wherever they are.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import heads
from runtime.entry import suggest
from runtime.files.shown import shown

if TYPE_CHECKING:
    from heads.base import Head

FOLDER = Path(__file__).resolve().parent
VARIABLE = "GORGON_HEADS"
# Of head options, far above any head: a file that asks for more would fill the memory before anything can be checked.
MOST_PARTS, MOST_SIZE = 1000, 1 << 24


def roots() -> list[Path]:
    """The folders that hold heads: this one and those of GORGON_HEADS. Raises ValueError for one that is no such
    folder."""
    found = [FOLDER]
    for entry in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        root = Path(entry).expanduser().resolve()
        if not root.is_dir():
            raise ValueError(f"{VARIABLE} names {entry!r}, which is not a folder; name folders that hold heads")
        if (root / "head.py").exists():
            raise ValueError(f"{VARIABLE} names the head {entry!r} itself; name the folder around it, {root.parent}")
        if root not in found:
            found.append(root)
    return found


def folders() -> dict[str, Path]:
    """The folder of each head by name, sorted. Raises ValueError for two heads of one name."""
    found: dict[str, Path] = {}
    for root in roots():
        for folder in sorted(path.parent for path in root.glob("*/head.py")):
            if folder.name in found:
                raise ValueError(f"two heads are called {folder.name!r}: {found[folder.name]} and {folder}; rename one")
            found[folder.name] = folder
    return dict(sorted(found.items()))


def available() -> list[str]:
    """Names of all heads, sorted, including those that cannot be imported: ``head_class`` says why."""
    return list(folders())


def head_folder(name: str) -> Path:
    """The folder of a head. Raises ValueError with a suggestion for an unknown name."""
    known = folders()
    if name not in known:
        hint = "" if os.environ.get(VARIABLE) else f" ({VARIABLE} is not set, so only the repository was searched)"
        raise ValueError(f"{suggest('head', name, known)}{hint}")
    return known[name]


def head_class(name: str) -> type[Head]:
    """The class of a head by name. Raises ValueError with a suggestion for an unknown name, and naming a folder that
    cannot be imported or does not hold a head."""
    folder = head_folder(name)
    from heads.base import Head  # first: a failure in here is not the head's

    heads.__path__[:] = [str(root) for root in roots()]
    module, where = _import(name, folder), folder / "__init__.py"
    files = [*getattr(module, "__path__", []), getattr(module, "__file__", None)]
    if str(folder) not in files:
        raise ValueError(f"{folder} needs another name: heads.{name} is {files[0] or files[-1]}")
    if not hasattr(module, "HEAD"):
        raise ValueError(f"{where} must define HEAD = <the class of the head>")
    found = module.HEAD
    if not (isinstance(found, type) and issubclass(found, Head)):
        raise ValueError(f"{where}: HEAD must be a subclass of heads.base.Head, got {found!r}")
    config = getattr(found, "Config", None)
    if not dataclasses.is_dataclass(config) or "num_depths" not in {f.name for f in dataclasses.fields(config)}:
        raise ValueError(f"{where}: {found.__name__} needs a Config, a dataclass with at least num_depths")
    return found


def chain_writer(head: type[Head]) -> Callable | None:
    """``write_chain`` of the ``chain.py`` in the folder of a head's class (``heads.chains``); None where there is none.

    Raises ValueError naming a file that cannot be imported or does not define it.
    """
    room, _, name = head.__module__.rpartition(".")[0].partition(".")
    if room != "heads" or not name:
        return None  # a class of no head's folder
    file = Path(sys.modules[f"heads.{name}"].__path__[0]) / "chain.py"
    if not file.is_file():
        return None
    module = _import(f"{name}.chain", file.parent)
    if not hasattr(module, "write_chain"):
        raise ValueError(f"{file} must define write_chain(head, tape, num_depths)")
    return module.write_chain


def _import(name: str, folder: Path):
    """``heads.<name>``, from a head's folder. Raises ValueError naming the folder and the line that fails."""
    if f"heads.{name}" not in sys.modules:
        importlib.invalidate_caches()  # the folder may be newer than the cached listing of its parent
    try:
        return importlib.import_module(f"heads.{name}")
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(folder)]
        line = f" ({Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else ""
        raise ValueError(f"{folder} cannot be imported: {type(error).__name__}: {error}{line}") from error


def summary(name: str) -> str:
    """One line about a head: the first of its package's docstring, else of its class's."""
    head = head_class(name)
    text = sys.modules[f"heads.{name}"].__doc__ or head.__doc__ or ""
    return text.strip().partition("\n")[0]


def make_config(name: str, options: dict):
    """The head's Config from plain values. Raises ValueError for unknown options and values of another type."""
    config = head_class(name).Config
    fields = {f.name: f for f in dataclasses.fields(config)}
    for key, value in options.items():
        if key not in fields:
            raise suggest(f"option of head {name!r}:", key, fields)
        expected = type(fields[key].default)
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise ValueError(f"--head.{key} takes {expected.__name__}, got {shown(value)}")
        most = MOST_PARTS if key.startswith("num_") else MOST_SIZE
        if isinstance(value, int) and abs(value) > most:
            raise ValueError(f"--head.{key} is {shown(value)}, expected at most {most:,}")
    return config(**options)


def build(name: str, options: dict, backbone) -> Head:
    """A new head on this backbone. Raises ValueError for an unknown name or option."""
    return head_class(name)(make_config(name, options), backbone)
