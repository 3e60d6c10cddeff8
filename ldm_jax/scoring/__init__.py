"""A run measured by a named protocol: its samples, by seed, against real images."""
