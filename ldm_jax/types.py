"""Names that all other files use: dtypes, trees, choices and errors."""

import difflib
from collections.abc import Iterable
from typing import Any, Literal, get_args

Dtype = Any
"""A NumPy-like dtype, as linen takes it (JAX's own alias would import JAX here)."""

PyTree = Any
"""Nested containers of arrays; jaxtyping's `PyTree` says no more at run time."""


SamplerName = Literal[
    "ddim",
    "ddpm",
    "euler",
    "euler_ancestral",
    "heun",
    "plms",
    "dpmpp_2m",
    "dpmpp_2s",
    "dpmpp_sde_2m",
    "unipc",
    "lcm",
]
SAMPLER_NAMES: tuple[SamplerName, ...] = get_args(SamplerName)
TAKES_ETA: frozenset[SamplerName] = frozenset({"ddim"})
SpacingName = Literal["trailing", "leading", "linspace", "karras", "ldm"]
SPACING_NAMES: tuple[SpacingName, ...] = get_args(SpacingName)
MIN_DECODER_TILE = 4
"""Latents: tiles overlap by a quarter, which is at least one."""


ProtocolName = Literal["adm", "torch-fidelity", "clean-fid", "dataset-classifier"]
PROTOCOL_NAMES: tuple[ProtocolName, ...] = get_args(ProtocolName)

PrecisionName = Literal["default", "highest"]
USUAL_PRECISION: PrecisionName = "default"
"""That of runs, latent caches and images that name none."""


def choices(got: str, names: Iterable[str]) -> str:
    """Describe the accepted names and the nearest one, for an error message."""
    wanted = list(names)
    near = difflib.get_close_matches(got, wanted, 1, 0.0)[0]
    return f"got {got!r}, wanted one of {', '.join(wanted)}; did you mean {near}?"


class InputError(ValueError):
    """Bad input, in one line: what, got, wanted, and what to try."""


class RunError(RuntimeError):
    """A run that had to stop, in one line: why, where, and what is kept."""


class Preempted(Exception):
    """A run stopped on request; the message names the saved state."""
