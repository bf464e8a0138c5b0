"""`python -m tokencake_sim` is `tokencake sim`."""

import sys

from tokencake_sim.cli import main

sys.exit(main(sys.argv[1:]))
