"""Where Jittor comes in: ``jt``, ``einops``, ``device`` and ``device_reason``, each found on first use.

The first of them settles the environment and starts Jittor (``runtime.start.bootstrap``); importing this costs nothing.
"""

import importlib

from runtime.start.bootstrap import start


def __getattr__(name: str):
    if name == "einops":  # Jittor's fork: the package of that name has no Jittor backend
        __getattr__("jt")
        globals()["einops"] = importlib.import_module("jittor.einops")
    elif name in ("jt", "device", "device_reason"):
        globals()["jt"], globals()["device"], globals()["device_reason"] = start()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]
