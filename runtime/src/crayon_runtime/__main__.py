"""`python -m crayon_runtime` is the `crayon` command."""

import sys

from crayon_runtime.cli import main

sys.exit(main())
