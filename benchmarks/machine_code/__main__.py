"""`python -m benchmarks.machine_code`."""

import sys

from benchmarks.machine_code.run import main

sys.exit(main())
