"""Steering a sample towards its condition.

Every kind of guidance here goes from a worse prediction through a better one and
beyond: `worse + scale (better - worse)`. 0 is the worse one, 1 the better one.
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
"""A network: `f(x_t, t, cond)`, the condition any tree of arrays with a leading batch
axis. A value beside it names what it predicts."""


class Call(NamedTuple):
    """Which of its network calls a sampler is at."""

    place: Int[Array, ""]
    """Position among the calls of a sample, from 0."""
    t: Float[Array, ""]
    """What the network is asked at."""


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


TINY = 1e-12


def unguided(denoise: Denoiser) -> Predictor:
    """Ask a network as it is."""

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
    """Guide a network by its own unconditional prediction, in one batch of two.

    (Papers that write `(1 + w) cond - w uncond` have w = scale - 1.)

    Args:
      null_cond: The condition that means "none", or is to be avoided; of the shape of
        the condition.
      scales: Guidance scale of each network call; traced.
      rescale: Share of the correction of `rescaled`, in [0, 1]; traced.

    Returns:
      The guided predictor.

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
    """Guide a network by a worse version of itself: a smaller or an earlier one.

    Both are given the condition, so that what is amplified is quality alone.

    Args:
      weak: The worse one, trained on the same schedule to predict the same.
      weak_cond: Its condition, as its own conditioner prepares it.
      scales: Guidance scale of each network call; traced.
      rescale: Share of the correction of `rescaled`, in [0, 1]; traced.

    Returns:
      The guided predictor.

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
    """Go from one prediction to another and beyond."""
    return worse + scale * (better - worse)


def rescaled(
    guided: Float[Array, "b h w c"],
    conditional: Float[Array, "b h w c"],
    *,
    share: Float[Array, ""],
) -> Float[Array, "b h w c"]:
    """Give a guided prediction back the contrast it had without guidance.

    Args:
      guided: The prediction with guidance.
      conditional: The one without.
      share: 0 changes nothing, 1 makes each image's standard deviation that of the
        conditional prediction; the paper uses 0.7.

    Returns:
      The prediction.

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
    """Give every step its guidance scale.

    Args:
      scale: One for all steps; or several, spread evenly from the first step to the
        last with lines between them.
      num_steps: Denoising steps.

    Returns:
      A scale per step, float32.
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
      scales: Of each step.
      step: Of each call.
      ratio: Noise-to-signal ratio sigma / alpha at each call.
      interval: Guide only where `low <= ratio <= high`; elsewhere the scale is 1.

    Source:
      Kynkäänniemi et al., arXiv:2404.07724, eq. 5 (interval).
    """
    low, high = np.asarray(interval, np.float32)
    ratio = np.asarray(ratio, np.float32)
    return np.where((ratio >= low) & (ratio <= high), scales[step], np.float32(1.0))
