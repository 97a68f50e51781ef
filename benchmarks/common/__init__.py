"""What several benchmarks share: result files, timers, stand-ins for missing packages."""
