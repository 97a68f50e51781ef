"""Benchmarks of ddpm_fast. Every number in README.md and docs/ comes from a result file that one of them wrote."""
