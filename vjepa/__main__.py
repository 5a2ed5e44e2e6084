"""`python -m vjepa` is the command `vjepa`."""

import sys

from vjepa.cli import main

sys.exit(main())
