"""The sampling loop: the network on fixed buffers, the step, and how both are executed."""
