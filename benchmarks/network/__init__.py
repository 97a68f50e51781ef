"""The network's calls: hoisting, precision, the loop's overhead, cost by batch size."""
