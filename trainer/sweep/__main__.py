"""`python -m trainer.sweep --head NAME --space FILE`."""

import sys

from runtime.entry import run_entry
from trainer.sweep.command import main

sys.exit(run_entry(main))
