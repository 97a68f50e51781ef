"""What every kernel costs, counted in its machine code."""
