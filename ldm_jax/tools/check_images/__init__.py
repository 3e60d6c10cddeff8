"""Check of a folder of images before training."""
