"""Whole sampling runs, ours against everything that one would use otherwise."""
