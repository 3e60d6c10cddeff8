"""The objective of the autoencoder, and its losses without the discriminator's."""

from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.models.bottleneck import DiagonalGaussian, Quantized
from ldm_jax.models.discriminator_lpips import Lpips
from ldm_jax.training.gan_loss import Adversary
from ldm_jax.types import PyTree


class AutoencoderObjective(NamedTuple):
    """The losses of the autoencoder and their weights; all static."""

    reconstruction_loss: Literal["l1", "l2"]
    """Absolute or squared error."""
    reduction: Literal["mean", "sum"]
    """Over the values of an image, in the reconstruction term."""
    perceptual_weight: float
    """Weight of LPIPS; 0 leaves it out."""
    kl_weight: float
    """Weight of the KL divergence."""
    codebook_weight: float
    """Weight of the codebook's term."""
    commitment: Literal["corrected", "legacy"]
    """Part of the codebook's term that `commitment_beta` weights."""
    commitment_beta: float
    """Weight of that part."""
    adversary: Adversary | None = None
    """The discriminator and its loss."""


class ReconstructionTerms(NamedTuple):
    """The parts of the reconstruction term."""

    reconstruction: Float[Array, ""]
    """Mean error of a value."""
    perceptual: Float[Array, ""] | None
    """Mean LPIPS of an image; None without it."""


def reconstruction_terms(
    reconstructions: Float[Array, "b h w c"],
    images: Float[Array, "b h w c"],
    perceptual: PyTree,
    *,
    objective: AutoencoderObjective,
) -> tuple[Float[Array, ""], ReconstructionTerms]:
    """Return the reconstruction term (the paper's L_rec) and its parts.

    LPIPS is added to the error of every value. Under `sum` its weight is therefore
    multiplied by the number of values of an image.

    Args:
      reconstructions: Near [-1, 1].
      images: In [-1, 1].
      perceptual: Parameters of LPIPS; None without it.

    Returns:
      Means over the batch.

    Raises:
      ValueError: If LPIPS has a weight and no parameters.

    Source:
      Rombach et al., arXiv:2112.10752, eq. 25; latent-diffusion
      `LPIPSWithDiscriminator` (`sum`) and `VQLPIPSWithDiscriminator` (`mean`).
    """
    error = reconstructions - images
    is_l1 = objective.reconstruction_loss == "l1"
    reconstruction = (jnp.abs(error) if is_l1 else jnp.square(error)).mean()
    total, distance = reconstruction, None
    if objective.perceptual_weight:
        if perceptual is None:
            raise ValueError("perceptual_weight: above 0, but LPIPS has no parameters")
        variables = {"params": perceptual}
        distances = Lpips().apply(variables, images, reconstructions)
        distance = cast(jax.Array, distances).mean()
        total = total + objective.perceptual_weight * distance
    if objective.reduction == "sum":
        total = total * float(images[0].size)
    return total, ReconstructionTerms(reconstruction, distance)


def regularization_loss(
    bottleneck: DiagonalGaussian | Quantized, *, objective: AutoencoderObjective
) -> Float[Array, ""]:
    """Return the unweighted loss of the bottleneck, a mean over the batch.

    Nats a latent for a Gaussian, a mean over values for a codebook.
    """
    if isinstance(bottleneck, DiagonalGaussian):
        return bottleneck.kl().mean()
    return bottleneck.loss(
        beta=objective.commitment_beta, commitment=objective.commitment
    )
