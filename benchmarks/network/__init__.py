"""The network and the loop around it: time of a call by batch size, hoisting, precision, and the loop's own time."""
