"""``python -m captune``."""

import sys

from captune.cli.main import main

sys.exit(main())
