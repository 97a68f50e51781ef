"""`python -m benchmarks.libraries`."""

from benchmarks.libraries.run import main

main()
