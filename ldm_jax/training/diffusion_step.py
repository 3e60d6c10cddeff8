"""Stage 2: one update of the UNet on the latents of a frozen autoencoder."""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from ldm_jax.data.pipeline import Batch
from ldm_jax.diffusion.objectives import eps_loss
from ldm_jax.nn.autoencoder import Autoencoder
from ldm_jax.nn.unet import UNet
from ldm_jax.rng import Stream, example_keys, integers, normal, uniform
from ldm_jax.training.autoencoder_step import encode
from ldm_jax.training.state import TrainState, apply_gradients
from ldm_jax.types import PyTree


class FirstStage(NamedTuple):
    """What stage 2 takes from stage 1 and never changes.

    Attributes:
      params: The autoencoder's averaged parameters.
      latent_scale: One over the measured standard deviation of its latents.
    """

    params: PyTree
    latent_scale: Float[Array, ""]


class DiffusionMetrics(NamedTuple):
    """Numbers of one step, each a mean over the global batch.

    Attributes:
      loss: Mean squared error of the predicted noise.
      gradient_norm: Global norm of the gradient, before clipping.
    """

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]


def diffusion_step(
    state: TrainState,
    frozen: FirstStage,
    batch: Batch,
    root_key: Key[Array, ""],
    *,
    axis_name: str | None,
    autoencoder: Autoencoder,
    unet: UNet,
    optimizer: optax.GradientTransformation,
    abar: Float[Array, " t"],
    latent_shape: tuple[int, int, int],
    null_cond: int,
    condition_dropout: float,
    ema_decay: float,
) -> tuple[TrainState, DiffusionMetrics]:
    """Minimise the error of the predicted noise on one batch.

    Args:
      state: The stage's state.
      frozen: The first stage.
      batch: This device's part of the batch.
      root_key: The run's.
      axis_name: Name of the device axis to average over; None for one device.
      autoencoder: The first stage's network.
      unet: The network in training.
      optimizer: The one that made the state.
      abar: The schedule's table, float32.
      latent_shape: Height, width and channels of a latent.
      null_cond: The label that means "none".
      condition_dropout: Probability of training an example with `null_cond`.
      ema_decay: Of the average of the weights.

    Returns:
      The next state, and the numbers of this step.

    Source:
      Rombach et al., arXiv:2112.10752, eq. 2; Ho & Salimans, arXiv:2207.12598,
      algorithm 1.
    """

    def keys(stream: Stream) -> Key[Array, " b"]:
        return example_keys(root_key, stream, state.step, batch.example_index)

    posterior = encode(autoencoder, frozen.params, batch)
    latents = posterior.sample(normal(keys(Stream.DIFFUSION_POSTERIOR), latent_shape))
    x_0 = jax.lax.stop_gradient(latents * frozen.latent_scale)
    t = integers(keys(Stream.TIMESTEP), below=abar.shape[0])
    eps = normal(keys(Stream.NOISE), latent_shape)
    dropped = uniform(keys(Stream.CONDITION_DROPOUT)) < condition_dropout
    cond = jnp.where(dropped, jnp.asarray(null_cond, batch.label.dtype), batch.label)

    def loss_of(params: PyTree) -> Float[Array, ""]:
        def denoise(
            x_t: Float[Array, "b h w c"], t: Int[Array, " b"], cond: Int[Array, " b"]
        ) -> Float[Array, "b h w c"]:
            return cast(jax.Array, unet.apply({"params": params}, x_t, t, cond))

        return eps_loss(denoise, x_0, t, eps, cond, abar=abar).mean()

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    if axis_name is not None:
        loss, gradients = jax.lax.pmean((loss, gradients), axis_name)
    metrics = DiffusionMetrics(loss, optax.tree.norm(gradients))
    state = apply_gradients(state, gradients, optimizer=optimizer, ema_decay=ema_decay)
    return state, metrics
