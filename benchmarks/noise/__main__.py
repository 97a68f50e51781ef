"""`python -m benchmarks.noise`."""

import sys

from benchmarks.noise.run import main

sys.exit(main())
