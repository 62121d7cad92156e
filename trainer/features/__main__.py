"""`python -m trainer.features --data FILE...`."""

import sys

from runtime.entry import run_entry
from trainer.features.command import main

sys.exit(run_entry(main))
