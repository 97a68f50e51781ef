"""Result files, timers and stand-ins that several benchmarks share."""
