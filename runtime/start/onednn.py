"""Links oneDNN, which comes from wheels, to where Jittor looks before it tries to download it."""

from __future__ import annotations

import ctypes
import os
import sys
import sysconfig
from pathlib import Path

# The folder name Jittor 1.3.11 looks for before it tries to download oneDNN.
ONEDNN_FOLDER = "dnnl_lnx_2.2.0_cpu_gomp"


def jittor_home() -> Path:
    """The folder of Jittor's ``.cache/jittor``."""
    return Path(os.environ.get("JITTOR_HOME") or Path.home())


def onednn_prefix() -> Path | None:
    """The prefix of the installed oneDNN wheels, or None."""
    for prefix in dict.fromkeys([sysconfig.get_path("data"), sys.prefix, sys.base_prefix]):
        root = Path(prefix)
        if (root / "lib" / "libdnnl.so.2").exists() and (root / "include" / "dnnl.hpp").exists():
            return root
    return None


def link_onednn(prefix: Path) -> None:
    """Link oneDNN to where Jittor looks for it, and load it so that its symbols are found.

    Links are replaced when they point at another environment, so two environments do not break each other.
    """
    folder = jittor_home() / ".cache" / "jittor" / "mkl" / ONEDNN_FOLDER
    (folder / "lib").mkdir(parents=True, exist_ok=True)
    for link, target in (
        (folder / "include", prefix / "include"),
        (folder / "lib" / "libmkldnn.so", prefix / "lib" / "libdnnl.so.2"),
    ):
        if link.is_symlink() and os.readlink(link) == str(target):
            continue
        if link.exists() and not link.is_symlink():
            continue  # Jittor has downloaded its own copy, which works as well
        fresh = link.with_name(f"{link.name}.{os.getpid()}")
        fresh.symlink_to(target)
        os.replace(fresh, link)
    ctypes.CDLL(str(prefix / "lib" / "libdnnl.so.2"), mode=ctypes.RTLD_GLOBAL)
