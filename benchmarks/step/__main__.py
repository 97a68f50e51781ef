"""`python -m benchmarks.step`."""

import sys

from benchmarks.step.run import main

sys.exit(main())
