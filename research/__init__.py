"""Studies of ideas that were not adopted. docs/ shows the tables of their results."""
