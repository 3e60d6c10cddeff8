"""Steering a sample towards its condition."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ldm_jax.diffusion.objectives import Denoiser
from ldm_jax.types import PyTree


def classifier_free(
    denoise: Denoiser, *, null_cond: PyTree, scale: Float[Array, ""]
) -> Denoiser:
    """Guide a network by its own unconditional prediction, in one batch of two.

    The guided prediction is `uncond + scale * (cond - uncond)`: 0 is unconditional,
    1 is conditional. (Papers that write `(1 + w) cond - w uncond` have w = scale - 1.)

    Args:
      denoise: The network.
      null_cond: The condition that means "none", or is to be avoided; of the shape of
        the condition.
      scale: Guidance scale; traced.

    Returns:
      A network of the same form.

    Source:
      Ho & Salimans, arXiv:2207.12598, eq. 6; the scale is latent-diffusion's.
    """

    def guided(
        x_t: Float[Array, "b h w c"], t: Int[Array, " b"], cond: PyTree
    ) -> Float[Array, "b h w c"]:
        both = denoise(
            jnp.concatenate([x_t, x_t]),
            jnp.concatenate([t, t]),
            jax.tree.map(lambda *both: jnp.concatenate(both), null_cond, cond),
        )
        uncond, conditional = jnp.split(both, 2)
        return uncond + scale * (conditional - uncond)

    return guided
