"""Stands in for ``python3.X-config``, which Jittor runs to find Python's headers and few images install."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from runtime.start.toolkit_folder import Entry, assemble

ANSWERS = """#!/bin/sh
for word do
  case "$word" in
    --includes) echo "{includes}" ;;
    --extension-suffix) echo "{suffix}" ;;
  esac
done
"""


def places() -> list[Path]:
    """Where Jittor 1.3.11 looks for the program on Linux."""
    name, folder = f"python3.{sys.version_info.minor}-config", Path(sys.executable).parent
    return [
        folder / name,
        Path(f"{sys.executable}-config"),
        Path("/usr/bin") / name,
        Path("/usr/local/bin") / name,
        folder / "python3-config",
    ]


def python_config(cache: Path) -> Path | None:
    """A script in ``cache`` that replaces the program; None where Jittor finds one.

    Raises ImportError when Python's headers are missing as well.
    """
    if any(place.is_file() for place in places()):
        return None
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        raise ImportError(
            f"Jittor compiles against Python.h, which is not in {include}: install python3.{sys.version_info.minor}-dev"
        )
    folders = dict.fromkeys([str(include), sysconfig.get_path("platinclude")])
    text = ANSWERS.format(
        includes=" ".join(f"-I{folder}" for folder in folders), suffix=sysconfig.get_config_var("EXT_SUFFIX")
    )
    return assemble({"bin/python-config": Entry(text=text)}, cache, "python") / "bin" / "python-config"
