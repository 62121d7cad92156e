"""`python -m trainer.data --inspect FILE`."""

import sys

from runtime.entry import run_entry
from trainer.data.inspect import main

sys.exit(run_entry(main))
