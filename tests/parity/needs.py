"""What a comparison with diffusers needs: its packages, and silence about themselves.

A test module that imports this one is skipped where a package is missing.
"""

import warnings

import pytest

REASON = "parity needs the extra `parity`"

torch = pytest.importorskip("torch", reason=REASON)
pytest.importorskip("diffusers", reason=REASON)
pytest.importorskip("transformers", reason=REASON)

# diffusers and transformers warn of their own deprecations; none of them is ours.
THEIR_WARNINGS_IGNORED = pytest.mark.filterwarnings("ignore")


def diffusers():
    """Import diffusers, which warns while it is imported; return it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

    return diffusers
