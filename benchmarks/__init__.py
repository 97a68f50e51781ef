"""Measurements: every number in README.md and docs/ comes from a file that one of these wrote."""
