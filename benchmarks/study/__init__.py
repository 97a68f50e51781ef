"""The measurements and pictures of docs/walk.md."""
