"""What a step would take on chips that are not here; for `python -m ldm_jax.plan`."""
