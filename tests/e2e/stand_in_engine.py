"""bench/engine.py with rates made up, for a device that measures nothing; options as bench/engine.py's.

Started by test_stand_in_device.py.
"""

import sys
from unittest.mock import patch

from bench.clock import machine
from bench.engine import main
from runtime.entry import run_entry

RATES = {
    "read_gb_s": 4000.0, "copy_gb_s": 3000.0, "fma_gflop_s": 6e4, "mma_tflop_s": 600.0, "launch_us": (2.0, 1.0),
    "last_level_cache_bytes": 50 << 20, "num_threads": 132,
}  # fmt: skip

with patch.multiple(machine, **{name: lambda *_, value=value, **__: value for name, value in RATES.items()}):
    sys.exit(run_entry(main))
