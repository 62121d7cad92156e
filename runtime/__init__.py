"""The only door to Jittor: ``from runtime import jt``.

Importing this package settles the environment (``runtime.bootstrap``) and then loads Jittor. No other package
imports Jittor itself.
"""

from runtime.bootstrap import DeviceError, start

jt, device, device_reason = start()

from runtime.context import is_main, rank, set_seed, synchronize, warm, world_size  # noqa: E402
from runtime.provenance import provenance  # noqa: E402

__all__ = [
    "DeviceError",
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
