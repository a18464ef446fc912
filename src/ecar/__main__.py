"""``python -m ecar``."""

import sys

from ecar.cli.main import main

sys.exit(main())
