"""Latent diffusion models as pure functions in JAX."""
