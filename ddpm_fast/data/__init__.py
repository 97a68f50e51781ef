"""Training data: moons, drawn; digits, from scikit-learn; pictures of one's own."""
