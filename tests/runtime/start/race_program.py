"""Twelve matrix products that share their inputs, each a kernel of its own, in one graph; started by test_race.py.

``LD_PRELOAD`` names the compiled list_hook.cc. Prints one JSON object. With the argument ``unlocked``, Jittor is the
one without this project's patches.
"""

import ctypes
import itertools
import json
import os
import sys

os.RTLD_DEEPBIND = 0  # with it, Jittor's core would not see the preloaded functions
hook = ctypes.CDLL(os.environ.pop("LD_PRELOAD"))

import numpy as np  # noqa: E402

from runtime.start import bootstrap, jittor_source  # noqa: E402

if sys.argv[1] == "unlocked":
    bootstrap.patched_sources = lambda cache: jittor_source.installed_sources()

from runtime import jt  # noqa: E402

left, right = (jt.array(np.full((8, 8), value, np.float32)) for value in (1, 2))
jt.sync([left, right])
hook.delay_up_to(3000)
# (m, n, k) in any order of the axes: nothing but the order differs, which is enough for another kernel.
products = [
    (one.broadcast((8, 8, 8), [a]) * other.broadcast((8, 8, 8), [b])).sum(c)
    for a, b, c in itertools.permutations(range(3))
    for one, other in ((left, right), (right, left))
]
jt.sync(products)
counts = {"off_main": hook.calls_off_main(), "at_once": hook.calls_at_once()}
print(json.dumps({**counts, "products": [sorted(set(each.numpy().ravel().tolist())) for each in products]}))
