"""Quality of the samples: moons and digits measured, and the pictures of docs/walk.md."""
