"""`python -m trainer.features --data FILE...`."""

import sys

from trainer.features.command import main

sys.exit(main())
