"""Speculative sampling against one step at a time."""
