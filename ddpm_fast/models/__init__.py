"""The networks that ship with the package, and the format of checkpoints."""
