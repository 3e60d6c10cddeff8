"""Stage 1: one update of the autoencoder, and the scale of its latents."""

from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from ldm_jax.data.pipeline import Batch
from ldm_jax.images import to_float
from ldm_jax.nn.autoencoder import Autoencoder
from ldm_jax.nn.bottleneck import DiagonalGaussian
from ldm_jax.rng import Stream, example_keys, normal
from ldm_jax.training.state import TrainState, apply_gradients
from ldm_jax.types import PyTree


class AutoencoderMetrics(NamedTuple):
    """Numbers of one step, each a mean over the global batch.

    Attributes:
      loss: What is minimised.
      reconstruction: Its first term, a mean over pixels.
      kl: Its second term before weighting, in nats a latent.
      gradient_norm: Global norm of the gradient, before clipping.
    """

    loss: Float[Array, ""]
    reconstruction: Float[Array, ""]
    kl: Float[Array, ""]
    gradient_norm: Float[Array, ""]


def autoencoder_step(
    state: TrainState,
    frozen: None,
    batch: Batch,
    root_key: Key[Array, ""],
    *,
    axis_name: str | None,
    autoencoder: Autoencoder,
    optimizer: optax.GradientTransformation,
    latent_shape: tuple[int, int, int],
    reconstruction_loss: Literal["l1", "l2"],
    kl_weight: float,
    ema_decay: float,
) -> tuple[TrainState, AutoencoderMetrics]:
    """Minimise reconstruction + weighted KL on one batch.

    Args:
      state: The stage's state.
      frozen: Nothing; stage 1 depends on no other.
      batch: This device's part of the batch.
      root_key: The run's.
      axis_name: Name of the device axis to average over; None for one device.
      autoencoder: The network.
      optimizer: The one that made the state.
      latent_shape: Height, width and channels of a latent.
      reconstruction_loss: Absolute or squared error.
      kl_weight: Weight of the KL term.
      ema_decay: Of the average of the weights.

    Returns:
      The next state, and the numbers of this step.

    Source:
      Rombach et al., arXiv:2112.10752, sec. 3.1 and app. G, without the adversary.
    """
    del frozen
    images = to_float(batch.image)
    keys = example_keys(
        root_key, Stream.AUTOENCODER_POSTERIOR, state.step, batch.example_index
    )
    noise = normal(keys, latent_shape)

    def loss_of(params: PyTree) -> tuple[Float[Array, ""], AutoencoderMetrics]:
        output, posterior = cast(
            tuple[jax.Array, DiagonalGaussian],
            autoencoder.apply({"params": params}, images, noise),
        )
        error = output - images
        per_pixel = jnp.abs(error) if reconstruction_loss == "l1" else error**2
        reconstruction = per_pixel.mean()
        kl = posterior.kl().mean()
        loss = reconstruction + kl_weight * kl
        return loss, AutoencoderMetrics(loss, reconstruction, kl, jnp.zeros(()))

    gradients, metrics = jax.grad(loss_of, has_aux=True)(state.params)
    if axis_name is not None:
        gradients, metrics = jax.lax.pmean((gradients, metrics), axis_name)
    metrics = metrics._replace(gradient_norm=optax.tree.norm(gradients))
    state = apply_gradients(state, gradients, optimizer=optimizer, ema_decay=ema_decay)
    return state, metrics


class LatentMoments(NamedTuple):
    """Sums over the latents of a batch, from which their scale is measured.

    Attributes:
      mean: Mean over examples, pixels and channels.
      mean_square: Mean of the squares.
    """

    mean: Float[Array, ""]
    mean_square: Float[Array, ""]


def latent_moments(
    params: PyTree,
    frozen: None,
    batch: Batch,
    root_key: Key[Array, ""],
    *,
    axis_name: str | None,
    autoencoder: Autoencoder,
    latent_shape: tuple[int, int, int],
) -> tuple[PyTree, LatentMoments]:
    """Measure the sampled, unscaled latents of one batch.

    The form is that of a training step that changes nothing, so that it is mapped
    over devices in the same way.

    Args:
      params: The autoencoder's.
      frozen: Nothing.
      batch: This device's part of the batch.
      root_key: The run's.
      axis_name: Name of the device axis to average over; None for one device.
      autoencoder: The network.
      latent_shape: Height, width and channels of a latent.

    Returns:
      `params`, and the moments over the global batch.
    """
    del frozen
    posterior = encode(autoencoder, params, batch)
    keys = example_keys(root_key, Stream.LATENT_SCALE, 0, batch.example_index)
    latents = posterior.sample(normal(keys, latent_shape))
    moments = LatentMoments(latents.mean(), jnp.square(latents).mean())
    if axis_name is not None:
        moments = jax.lax.pmean(moments, axis_name)
    return params, moments


def encode(autoencoder: Autoencoder, params: PyTree, batch: Batch) -> DiagonalGaussian:
    """Encode the images of a batch to Gaussians over unscaled latents."""
    images = to_float(batch.image)
    variables = {"params": params}
    posterior = autoencoder.apply(variables, images, method=Autoencoder.encode)
    return cast(DiagonalGaussian, posterior)
