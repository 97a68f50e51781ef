"""`python -m benchmarks.speculation`."""

from benchmarks.speculation.run import main

main()
