"""Settles how OpenMP's threads wait before a test imports torch.

torch brings a libgomp that the kernels of the same process then share, and that reads its settings when it is loaded.
Left alone, threads that wait turn for milliseconds: on a machine that does other work a pass of 2 ms then takes 150.
"""

import os

from runtime.start.bootstrap import SPIN_COUNT

os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
