"""`python -m benchmarks.study`."""

from benchmarks.study.run import main

main()
