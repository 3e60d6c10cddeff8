"""The UCI handwritten digits as a TFDS data set."""
