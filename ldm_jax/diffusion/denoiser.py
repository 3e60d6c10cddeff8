"""A network as the mathematics sees it, and as a sampler asks it."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

from ldm_jax.types import PyTree

Denoiser = Callable[
    [Float[Array, "b h w c"], Real[Array, " b"], PyTree],
    Float[Array, "b h w c"],
]
"""A network: `f(x_t, t, cond)`, the condition any tree of arrays with a leading batch
axis. What it predicts is told beside it."""


class Call(NamedTuple):
    """Which of its network calls a sampler is at.

    Attributes:
      place: Position among the calls of a sample, from 0.
      t: What the network is asked at.
    """

    place: Int[Array, ""]
    t: Float[Array, ""]


@runtime_checkable
class Predictor(Protocol):
    """What a sampler asks: a network, or several, guided or not."""

    def __call__(
        self, x_t: Float[Array, "b h w c"], call: Call, cond: PyTree
    ) -> Float[Array, "b h w c"]:
        """Predict at one noise level for every image of a batch."""
        ...


def ask(
    denoise: Denoiser, x_t: Float[Array, "b h w c"], call: Call, cond: PyTree
) -> Float[Array, "b h w c"]:
    """Ask a network at the level of a call, the same for every image."""
    return denoise(x_t, jnp.broadcast_to(call.t, x_t.shape[:1]), cond)
