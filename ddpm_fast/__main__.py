"""`python -m ddpm_fast` is `ddpm-fast`."""

import sys

from ddpm_fast.cli import main

sys.exit(main())
