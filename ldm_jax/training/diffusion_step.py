"""The diffusion step: one update of the UNet on latents of a frozen autoencoder."""

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, Real

from ldm_jax.data.pipeline import Batch, LatentBatch
from ldm_jax.diffusion.losses import DiffusionObjective, denoising_loss, offset_noise
from ldm_jax.diffusion.schedules import Level, draw_levels
from ldm_jax.images import to_float
from ldm_jax.latent_diffusion import LatentDiffusion, encode
from ldm_jax.models.bottleneck import DiagonalGaussian, Unquantized, read_moments
from ldm_jax.models.conditioning import Condition, ConditionInputs, null_inputs
from ldm_jax.parallel.reduce import AxisName, BatchGradients, Reduce
from ldm_jax.rng import Stream, example_keys, normal, uniform
from ldm_jax.training.conditions import (
    cut_holes,
    drop_conditions,
    join_masked,
    low_resolution,
    random_holes,
)
from ldm_jax.training.state import (
    Optimizer,
    TrainState,
    apply_gradients,
    gradient_inputs,
)
from ldm_jax.types import PyTree


class DiffusionParams(NamedTuple):
    """Trainable parameters of the diffusion stage, or a tree with their structure."""

    unet: PyTree
    """Parameters of the UNet."""
    conditioner: PyTree
    """Parameters of the conditioner; {} if it has none or is frozen."""


class FrozenParams(NamedTuple):
    """Arrays that the diffusion stage reads and does not train."""

    autoencoder: PyTree
    """Averaged parameters of the first stage; {} where batches hold latents."""
    latent_scale: Float[Array, ""]
    """Factor from latents of the first stage to scaled latents."""
    conditioner: PyTree
    """Parameters of a frozen conditioner; {} if it is trained, or where batches hold
    text embeddings."""
    null_embedding: Float[Array, "n d"] | None = None
    """Embedding of the empty prompt, where batches hold text embeddings."""


class DiffusionMetrics(NamedTuple):
    """Metrics of one step, means over the global batch."""

    loss: Float[Array, ""]
    """Weighted error of the prediction."""
    gradient_norm: Float[Array, ""]
    """Global norm of the gradient, before clipping."""


def diffusion_step(
    state: TrainState,
    frozen: FrozenParams,
    batch: Batch | LatentBatch,
    root_key: Key[Array, ""],
    *,
    model: LatentDiffusion,
    objective: DiffusionObjective,
    optimizer: Optimizer,
    reduce: Reduce,
) -> tuple[TrainState, DiffusionMetrics]:
    """Minimise the error of the prediction on one batch.

    Args:
      state: Its parameters are `DiffusionParams`.
      batch: This device's examples: images, or latents of the first stage.
      model: Its conditioner and condition match what the batch holds.

    Source:
      Rombach et al., arXiv:2112.10752, eq. 2 and 3; Ho & Salimans, arXiv:2207.12598,
      algorithm 1.
    """
    with jax.default_matmul_precision(model.precision):
        gradient_fn = functools.partial(_gradients, model=model, objective=objective)
        inputs = gradient_inputs(state)
        loss_gradients = reduce(gradient_fn, inputs, frozen, batch, root_key)
        gradients = loss_gradients.gradients
        metrics = DiffusionMetrics(loss_gradients.means, optax.tree.norm(gradients))
        return apply_gradients(state, gradients, optimizer), metrics


def _gradients(
    state: TrainState,
    frozen: FrozenParams,
    batch: Batch | LatentBatch,
    root_key: Key[Array, ""],
    *,
    axis_name: AxisName,
    model: LatentDiffusion,
    objective: DiffusionObjective,
) -> BatchGradients:
    """Draw the random inputs of a batch and differentiate its loss."""
    del axis_name  # the loss of an example does not depend on the others

    def keys(stream: Stream) -> Key[Array, " b"]:
        return example_keys(root_key, stream, state.step, batch.example_index)

    shape = model.latent_shape
    images = to_float(batch.image) if isinstance(batch, Batch) else None
    posterior = posterior_of(batch, frozen, model=model)
    latents = posterior.sample(normal(keys(Stream.DIFFUSION_POSTERIOR), shape))
    x_0 = jax.lax.stop_gradient(latents * frozen.latent_scale)
    level = draw_levels(
        objective.schedule, keys(Stream.TIMESTEP), shift=objective.timestep_shift
    )
    eps = normal(keys(Stream.NOISE), shape)
    if objective.offset_noise:
        shared = normal(keys(Stream.OFFSET_NOISE), shape[-1:])
        eps = offset_noise(eps, shared, strength=objective.offset_noise)
    inputs = inputs_of(batch, images, frozen, keys(Stream.HOLE), model=model)
    dropped = uniform(keys(Stream.CONDITION_DROPOUT)) < objective.condition_dropout
    null = null_inputs(
        inputs,
        num_classes=model.num_classes,
        null_tokens=model.null_tokens,
        null_embedding=frozen.null_embedding,
    )
    inputs = drop_conditions(inputs, null, dropped)
    loss = functools.partial(prediction_loss, model=model, objective=objective)
    value, gradients = jax.value_and_grad(loss)(
        state.params, frozen, x_0, level, eps, inputs
    )
    return BatchGradients(gradients, value)


def posterior_of(
    batch: Batch | LatentBatch, frozen: FrozenParams, *, model: LatentDiffusion
) -> DiagonalGaussian | Unquantized:
    """Return the distribution of unscaled latents, from images or from cached moments.

    Args:
      frozen: With the first stage, where the batch holds images.
    """
    if isinstance(batch, LatentBatch):
        return read_moments(batch.moments, regularizer=model.autoencoder.regularizer)
    return encode(model, frozen.autoencoder, to_float(batch.image))


def prediction_loss(
    params: DiffusionParams,
    frozen: FrozenParams,
    x_0: Float[Array, "b h w c"],
    level: Level,
    eps: Float[Array, "b h w c"],
    inputs: ConditionInputs,
    *,
    model: LatentDiffusion,
    objective: DiffusionObjective,
) -> Float[Array, ""]:
    """Return the weighted error of the UNet's prediction, a mean over the batch.

    Args:
      x_0: Scaled latents.
      level: Noise level of each example.
      eps: Unit-variance noise.
    """
    variables = {"params": {**frozen.conditioner, **params.conditioner}}
    cond = cast(Condition, model.conditioner.apply(variables, inputs))

    def denoise(
        x_t: Float[Array, "b h w c"], t: Real[Array, " b"], cond: PyTree
    ) -> Float[Array, "b h w c"]:
        return cast(jax.Array, model.unet.apply({"params": params.unet}, x_t, t, cond))

    losses = denoising_loss(denoise, x_0, level, eps, cond, objective=objective)
    return losses.mean()


def inputs_of(
    batch: Batch | LatentBatch,
    images: Float[Array, "b h w c"] | None,
    frozen: FrozenParams,
    hole_keys: Key[Array, " b"],
    *,
    model: LatentDiffusion,
) -> ConditionInputs:
    """Collect the conditions of a batch.

    Args:
      batch: With labels, tokens, embeddings or segmentation maps, as the model needs.
      images: In [-1, 1]; None for a batch of latents, where no condition is computed
        from images (the config checks that).
      frozen: With the first stage, which encodes images with holes.
      hole_keys: One for each example.
    """
    condition, image = model.condition, None
    if condition.concat == "segmentation":
        image = jax.nn.one_hot(
            batch.segmentation, condition.num_segments, dtype=jnp.float32
        )
    elif condition.concat == "low_resolution" and images is not None:
        image = low_resolution(images, factor=condition.low_resolution_factor)
    elif condition.concat == "masked_image" and images is not None:
        holes = random_holes(hole_keys, height=images.shape[1], width=images.shape[2])
        masked = cut_holes(images, holes)
        latents = encode(model, frozen.autoencoder, masked).mode()
        image = join_masked(latents * frozen.latent_scale, holes)
    return ConditionInputs(
        label=batch.label if condition.uses_classes else None,
        tokens=batch.tokens if condition.uses_tokens else None,
        embedding=batch.embedding if condition.context == "embedding" else None,
        image=image,
    )
