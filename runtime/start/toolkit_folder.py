"""Assembles the folder that Jittor takes for a CUDA toolkit: ``bin/nvcc``, ``include`` and ``lib64``.

It holds links to what ``runtime.start.toolkit`` found, and ``bin/nvcc``, a script that starts the real compiler (Jittor
follows links, so it has to be a file). Jittor adds ``lib64`` to the search path of everything it links, so
LD_LIBRARY_PATH, which is read only when a process starts, is not needed; that is why the libraries' versioned names are
there too. The folder's name is a hash of its content.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.atomic import atomic_directory
from runtime.files.documents import identity
from runtime.start.toolkit import RUNTIME_ARCHIVE, Toolkit

# CCCL 3 of CUDA 13 needs C++17, and Jittor asks for 14; CUDA 11 and 12 support both. The architectures are for calls
# that name none: nvcc would compile for its oldest device and leave the translation to the driver, which refuses when
# it is older than the toolkit.
WRAPPER = """#!/bin/sh
# CUDA {version}
architectures={architectures}
for word do
  shift
  case "$word" in
    -std=c++14) word=-std=c++17 ;;
    -arch*|-code*|-gencode*|--gpu-*|--generate-code*) architectures= ;;
  esac
  set -- "$@" "$word"
done
exec {nvcc} $architectures "$@"
"""


@dataclass(frozen=True)
class Entry:
    """A link to ``target``, or, without one, an executable file that holds ``text``."""

    target: str | None = None
    text: str = ""


def wrapper(toolkit: Toolkit, capabilities: Sequence[int]) -> str:
    """The script that replaces nvcc. capabilities: compute capabilities (90 for 9.0) to compile for by default."""
    wanted = " ".join(f"-gencode arch=compute_{code},code=sm_{code}" for code in sorted(set(capabilities)))
    return WRAPPER.format(
        version=".".join(map(str, toolkit.version)),
        architectures=shlex.quote(wanted),
        nvcc=shlex.quote(str(Path(toolkit.nvcc).absolute())),
    )


def _libraries(toolkit: Toolkit) -> dict[str, Entry]:
    entries = {}
    for name, part in toolkit.parts.items():
        real = part.library.resolve()
        # The loader asks for the versioned name, the linker for the plain one.
        names = {path.name for path in part.library.parent.glob(f"lib{name}.so*") if path.resolve() == real}
        for alias in {f"lib{name}.so", f"lib{name}.so.{part.major}", part.library.name, *names}:
            entries[f"lib64/{alias}"] = Entry(str(real))
    if toolkit.archive:
        entries[f"lib64/{RUNTIME_ARCHIVE}"] = Entry(str(toolkit.archive))
    return entries


def plan(toolkit: Toolkit, capabilities: Sequence[int]) -> dict[str, Entry]:
    """The content of the folder, by path. The compiler's own headers take precedence, and headers in /usr/include need
    no link."""
    entries = {"bin/nvcc": Entry(text=wrapper(toolkit, capabilities))}
    folders = [toolkit.top / "include", *(part.header for part in toolkit.parts.values())]
    folders += [toolkit.cccl] if toolkit.cccl else []
    for folder in dict.fromkeys(folders):
        if folder.is_dir() and folder != Path("/usr/include"):
            for header in sorted(folder.iterdir()):
                entries.setdefault(f"include/{header.name}", Entry(str(header)))
    return entries | _libraries(toolkit)


def assemble(entries: dict[str, Entry], cache: Path, name: str = "toolkit") -> Path:
    """The folder ``<name>-<hash>`` inside ``cache`` that holds the entries, made if it does not exist.

    Several processes may call this at once: each writes a folder of its own, and one of the equal folders stays.
    """
    described = identity({path: [entry.target, entry.text] for path, entry in entries.items()}, sort_keys=True)
    directory = cache / f"{name}-{hashlib.sha256(described.encode()).hexdigest()[:16]}"
    if not directory.exists():
        with atomic_directory(directory) as partial:
            for place, entry in entries.items():
                path = partial / place
                path.parent.mkdir(exist_ok=True)
                if entry.target is None:
                    path.write_text(entry.text)
                    path.chmod(0o755)
                else:
                    path.symlink_to(entry.target)
            os.sync()  # a folder torn by a power failure would look complete
    return directory
