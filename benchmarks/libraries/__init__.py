"""The sampling loops of other libraries beside their accelerated counterparts."""
