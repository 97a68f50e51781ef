"""Studies of ideas that lost; their result tables stand in docs/."""
