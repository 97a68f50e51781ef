"""`python -m benchmarks.speculation`."""

import sys

from benchmarks.speculation.run import main

sys.exit(main())
