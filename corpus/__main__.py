"""`python -m corpus --out FILE`."""

import sys

from corpus.write import main
from runtime.entry import run_entry

sys.exit(run_entry(main))
