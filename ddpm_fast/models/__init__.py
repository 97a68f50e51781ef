"""Networks that ship with the package, and the checkpoint format that carries them."""
