"""Run the command line as `python -m dsm_jax`."""

import sys

from dsm_jax.cli import main

sys.exit(main())
