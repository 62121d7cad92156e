"""`python -m trainer.sweep --head NAME --space FILE`."""

import sys

from trainer.sweep.command import main

sys.exit(main())
