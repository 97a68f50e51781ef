"""Whole sampling runs: ddpm_fast against the alternatives."""
