"""TFDS builders that ship with the project."""
