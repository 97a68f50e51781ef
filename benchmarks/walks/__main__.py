"""`python -m benchmarks.walks`."""

import sys

from benchmarks.walks.run import main

sys.exit(main())
