"""The only door to Jittor: ``from runtime import jt``. No other package imports Jittor itself.

The first use of ``jt``, ``einops`` or ``device`` starts Jittor (``runtime.door``); importing the package alone costs
nothing, so that a mistyped option is answered at once.
"""

from runtime import door
from runtime.context import is_main, rank, set_seed, synchronize, warm, world_size
from runtime.provenance import provenance

__all__ = [
    "device",
    "device_reason",
    "einops",
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
    if name not in ("jt", "einops", "device", "device_reason"):
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    globals()[name] = getattr(door, name)
    return globals()[name]
