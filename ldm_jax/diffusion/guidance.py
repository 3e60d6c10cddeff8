"""Guidance: extrapolation from a worse prediction beyond a better one.

`worse + scale (better - worse)`: scale 0 is the worse prediction, 1 the better one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from ldm_jax.types import PyTree

Denoiser = Callable[
    [Float[Array, "b h w c"], Real[Array, " b"], PyTree],
    Float[Array, "b h w c"],
]
"""A network `f(x_t, t, cond)`; the condition is a tree of arrays with a leading batch
axis."""


class Call(NamedTuple):
    """A network call of a sampler."""

    place: Int[Array, ""]
    """Index among the calls of a sample, from 0."""
    t: Float[Array, ""]
    """Time input of the network."""


@runtime_checkable
class Predictor(Protocol):
    """Prediction that a sampler uses: of one network or several, guided or not."""

    def __call__(
        self, x_t: Float[Array, "b h w c"], call: Call, cond: PyTree
    ) -> Float[Array, "b h w c"]:
        """Predict at one noise level for all images of a batch."""
        ...


def ask(
    denoise: Denoiser, x_t: Float[Array, "b h w c"], call: Call, cond: PyTree
) -> Float[Array, "b h w c"]:
    """Evaluate a network at the time of a call, the same for all images."""
    return denoise(x_t, jnp.broadcast_to(call.t, x_t.shape[:1]), cond)


TINY = 1e-12


def unguided(denoise: Denoiser) -> Predictor:
    """Return the predictor of a network without guidance."""

    def predict(
        x_t: Float[Array, "b h w c"], call: Call, cond: PyTree
    ) -> Float[Array, "b h w c"]:
        return ask(denoise, x_t, call, cond)

    return predict


def classifier_free(
    denoise: Denoiser,
    *,
    null_cond: PyTree,
    scales: Float[Array, " n"],
    rescale: Float[Array, ""],
) -> Predictor:
    """Return the predictor of classifier-free guidance, with two passes in one batch.

    Papers that write `(1 + w) cond - w uncond` have w = scale - 1.

    Args:
      null_cond: Null condition or negative condition, of the shape of the condition.
      scales: Guidance scale of each network call; traced.
      rescale: Share of `rescaled`, in [0, 1]; traced.

    Source:
      Ho & Salimans, arXiv:2207.12598, eq. 6; the scale is latent-diffusion's.
    """

    def predict(
        x_t: Float[Array, "b h w c"], call: Call, cond: PyTree
    ) -> Float[Array, "b h w c"]:
        both = ask(
            denoise,
            jnp.concatenate([x_t, x_t]),
            call,
            jax.tree.map(lambda *pair: jnp.concatenate(pair), null_cond, cond),
        )
        uncond, conditional = jnp.split(both, 2)
        guided = extrapolate(uncond, conditional, scales[call.place])
        return rescaled(guided, conditional, share=rescale)

    return predict


def autoguidance(
    denoise: Denoiser,
    weak: Denoiser,
    *,
    weak_cond: PyTree,
    scales: Float[Array, " n"],
    rescale: Float[Array, ""],
) -> Predictor:
    """Return the predictor of autoguidance: by a smaller or less trained network.

    Both networks get the condition, so that guidance changes the quality alone.

    Args:
      weak: The worse network, with the same schedule and prediction.
      weak_cond: Condition from the weak model's own conditioner.
      scales: Guidance scale of each network call; traced.
      rescale: Share of `rescaled`, in [0, 1]; traced.

    Source:
      Karras et al., arXiv:2406.02507, eq. 3.
    """

    def predict(
        x_t: Float[Array, "b h w c"], call: Call, cond: PyTree
    ) -> Float[Array, "b h w c"]:
        better = ask(denoise, x_t, call, cond)
        worse = ask(weak, x_t, call, weak_cond)
        guided = extrapolate(worse, better, scales[call.place])
        return rescaled(guided, better, share=rescale)

    return predict


def extrapolate(
    worse: Float[Array, "b h w c"],
    better: Float[Array, "b h w c"],
    scale: Float[Array, ""],
) -> Float[Array, "b h w c"]:
    """Extrapolate from one prediction beyond another."""
    return worse + scale * (better - worse)


def rescaled(
    guided: Float[Array, "b h w c"],
    conditional: Float[Array, "b h w c"],
    *,
    share: Float[Array, ""],
) -> Float[Array, "b h w c"]:
    """Rescale a guided prediction towards the contrast of the unguided one.

    Args:
      guided: Prediction with guidance.
      conditional: Prediction without guidance.
      share: 0 for no change; 1 for the standard deviation of `conditional` in each
        image; the paper uses 0.7.

    Source:
      Lin et al., arXiv:2305.08891, eq. 14 to 16.
    """
    axes = (1, 2, 3)
    wanted = conditional.std(axis=axes, keepdims=True)
    found = guided.std(axis=axes, keepdims=True)
    return guided * (1.0 + share * (wanted / jnp.maximum(found, TINY) - 1.0))


def spread_scale(
    scale: Real[Any, "*k"] | Sequence[float | int] | float | int, *, num_steps: int
) -> Float[np.ndarray, " t"]:
    """Return the guidance scale of each step, float32.

    Args:
      scale: One scale for all steps; or several, evenly spread from the first step to
        the last and linearly interpolated.
      num_steps: Sampling steps.
    """
    knots = np.atleast_1d(np.asarray(scale, np.float32))
    if len(knots) == 1:
        return np.full(num_steps, knots[0])
    places = jnp.linspace(0.0, 1.0, len(knots), dtype=jnp.float32)
    steps = jnp.linspace(0.0, 1.0, num_steps, dtype=jnp.float32)
    return np.asarray(jnp.interp(steps, places, knots))


def call_scales(
    scales: Float[np.ndarray, " t"],
    *,
    step: Int[np.ndarray, " n"],
    ratio: Float[np.ndarray, " n"],
    interval: tuple[float, float],
) -> Float[np.ndarray, " n"]:
    """Return the guidance scale of each network call.

    Args:
      scales: Guidance scale of each step.
      step: Step of each call.
      ratio: Noise-to-signal ratio sigma / alpha of each call.
      interval: Guidance interval `low <= ratio <= high`; the scale is 1 outside.

    Source:
      Kynkäänniemi et al., arXiv:2404.07724, eq. 5 (interval).
    """
    low, high = np.asarray(interval, np.float32)
    ratio = np.asarray(ratio, np.float32)
    return np.where((ratio >= low) & (ratio <= high), scales[step], np.float32(1.0))
