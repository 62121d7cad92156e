"""The only door to Jittor: ``from runtime import jt``.

The first use of ``jt`` or ``device`` settles the environment (``runtime.start.bootstrap``) and loads Jittor; importing
the package alone costs nothing, so that a mistyped option is answered at once. No other package imports Jittor itself.
"""

from runtime.context import is_main, rank, set_seed, synchronize, warm, world_size
from runtime.provenance import provenance

__all__ = [
    "device",
    "device_reason",
    "is_main",
    "jt",
    "provenance",
    "rank",
    "set_seed",
    "synchronize",
    "warm",
    "world_size",
]


def __getattr__(name: str):
    if name not in ("jt", "device", "device_reason"):
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    from runtime.start.bootstrap import start

    globals()["jt"], globals()["device"], globals()["device_reason"] = start()
    return globals()[name]
