"""What a step would take on chips that are not here; for `ldm plan`."""
