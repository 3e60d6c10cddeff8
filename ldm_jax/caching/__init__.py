"""A cache of latents: made once, and read in the place of images."""
