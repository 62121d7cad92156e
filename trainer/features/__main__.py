"""`python -m trainer.features --data FILE...`."""

import sys

from trainer.features.cache import main

sys.exit(main())
