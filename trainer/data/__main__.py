"""`python -m trainer.data --inspect FILE`."""

import sys

from trainer.data.inspect import main

sys.exit(main())
