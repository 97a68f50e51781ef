"""Speculative sampling: several steps are drafted and verified in one network call."""
