"""`python -m trainer.sweep --head NAME --space FILE`."""

import sys

from trainer.sweep.study import main

sys.exit(main())
