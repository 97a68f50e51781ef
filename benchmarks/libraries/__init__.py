"""Other libraries' sampling loops and the accelerated ones, side by side."""
