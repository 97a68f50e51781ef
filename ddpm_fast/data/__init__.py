"""Data sets that ship with the package: procedural, so nothing is downloaded."""
