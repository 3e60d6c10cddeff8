"""Memory and time of a step on absent chips, for `ldm plan`."""
