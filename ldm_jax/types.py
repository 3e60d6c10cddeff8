"""Words every other file uses: dtypes, trees, and the two kinds of failure."""

from typing import Any

Dtype = Any
"""A NumPy-like dtype, as linen takes it (JAX's own alias would import JAX here)."""

PyTree = Any
"""Nested containers of arrays; jaxtyping's `PyTree` says no more at run time."""


class InputError(ValueError):
    """Bad input, told in one line: what, got, wanted, and what to try."""


class RunError(RuntimeError):
    """A run that had to stop, told in one line: why, where, and what is kept."""
