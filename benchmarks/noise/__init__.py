"""A battery of statistical tests for the noise."""
