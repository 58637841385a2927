"""Entry point of `python -m fedloom.cli`."""

import sys

from fedloom.cli.main import main

sys.exit(main())
