"""Answers for ``python3.X-config``, which Jittor asks where Python's headers are and which few images bring."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from runtime.start.toolkit_folder import Entry, put_together

ANSWERS = """#!/bin/sh
for word do
  case "$word" in
    --includes) echo "{includes}" ;;
    --extension-suffix) echo "{suffix}" ;;
  esac
done
"""


def places() -> list[Path]:
    """Where Jittor 1.3.11 looks for it on Linux."""
    name, folder = f"python3.{sys.version_info.minor}-config", Path(sys.executable).parent
    return [
        folder / name,
        Path(f"{sys.executable}-config"),
        Path("/usr/bin") / name,
        Path("/usr/local/bin") / name,
        folder / "python3-config",
    ]


def python_config(cache: Path) -> Path | None:
    """A script in ``cache`` that answers in its place; None where Jittor finds one itself.

    Raises ImportError where Python's headers are missing, too.
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
    return put_together({"bin/python-config": Entry(text=text)}, cache, "python") / "bin" / "python-config"
