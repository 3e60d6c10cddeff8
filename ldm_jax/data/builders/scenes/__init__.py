"""Captioned scenes as a TFDS data set."""
