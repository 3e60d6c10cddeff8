"""Compiler options of programs outside of the tests, where they are optimised."""

AS_SHIPPED = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
"""Options of `jax.jit` for tests of the rounding of optimised programs."""
