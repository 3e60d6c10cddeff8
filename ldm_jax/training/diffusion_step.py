"""Stage 2: one update of the UNet on the latents of a frozen autoencoder."""

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, Real

from ldm_jax.config import ConditionConfig
from ldm_jax.data.pipeline import Batch, LatentBatch
from ldm_jax.diffusion.losses import (
    LossName,
    WeightName,
    denoising_loss,
    offset_noise,
)
from ldm_jax.diffusion.parameterization import PredictionName
from ldm_jax.diffusion.schedules import Level, Schedule, draw_levels
from ldm_jax.images import to_float
from ldm_jax.latent_diffusion import encode
from ldm_jax.models.autoencoder import Autoencoder
from ldm_jax.models.bottleneck import DiagonalGaussian, Unquantized, read_moments
from ldm_jax.models.conditioning import (
    Condition,
    Conditioner,
    ConditionInputs,
    null_inputs,
)
from ldm_jax.models.unet import UNet
from ldm_jax.parallel.reduce import Average, AxisName, Learned
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


class Denoising(NamedTuple):
    """What stage 2 trains: the tree of its parameters, or of anything like them."""

    unet: PyTree
    """The UNet's."""
    conditioner: PyTree
    """The conditioner's; empty if it has none or is frozen."""


class Frozen(NamedTuple):
    """What stage 2 reads and never changes."""

    autoencoder: PyTree
    """The first stage's averaged parameters; empty where batches hold its latents."""
    latent_scale: Float[Array, ""]
    """What its latents are multiplied by."""
    conditioner: PyTree
    """Parameters of a frozen conditioner; empty if it is trained, or where batches hold
    what it says."""
    null_embedding: Float[Array, "n d"] | None = None
    """What it says of the empty prompt, where batches hold what it says."""


class Objective(NamedTuple):
    """What the UNet learns to predict, and at which noise levels; all of it static."""

    schedule: Schedule
    """The noise levels."""
    prediction: PredictionName
    """What the UNet predicts."""
    loss: LossName
    """Absolute or squared error."""
    weight: WeightName
    """How much each level counts."""
    weight_gamma: float
    """The weight's parameter."""
    sigma_data: float
    """Standard deviation of the scaled latents."""
    offset_noise: float
    """Weight of noise that a whole channel shares; 0 draws none."""
    timestep_shift: float
    """Above 1, levels of much noise are met more often."""


class DiffusionMetrics(NamedTuple):
    """Numbers of one step, each a mean over the global batch."""

    loss: Float[Array, ""]
    """Mean error of the prediction, weighted."""
    gradient_norm: Float[Array, ""]
    """Global norm of the gradient, before clipping."""


def diffusion_step(
    state: TrainState,
    frozen: Frozen,
    batch: Batch | LatentBatch,
    root_key: Key[Array, ""],
    *,
    average: Average,
    autoencoder: Autoencoder,
    unet: UNet,
    conditioner: Conditioner,
    optimizer: Optimizer,
    objective: Objective,
    latent_shape: tuple[int, int, int],
    condition: ConditionConfig,
    num_classes: int,
    null_tokens: tuple[int, ...],
    condition_dropout: float,
    accumulate: int,
) -> tuple[TrainState, DiffusionMetrics]:
    """Minimise the error of the prediction on one batch.

    Args:
      state: The stage's state; its parameters are a `Denoising`.
      frozen: The first stage and what else is not trained.
      batch: This device's part of the batch, images or what stage 1 made of them.
      average: Takes means over the devices.
      autoencoder: The first stage's network.
      unet: The network in training.
      conditioner: Prepares what it is conditioned on; trained jointly, or frozen.
      optimizer: The one that made the state.
      objective: What is learned, and at which noise levels.
      latent_shape: Height, width and channels of a latent.
      condition: What the UNet is conditioned on.
      num_classes: Real classes; the null class has this index.
      null_tokens: Tokens of the empty prompt.
      condition_dropout: Probability of training an example without its condition.
      accumulate: Parts the batch is computed in, one after the other.

    Returns:
      The next state, and the numbers of this step.

    Source:
      Rombach et al., arXiv:2112.10752, eq. 2 and 3; Ho & Salimans, arXiv:2207.12598,
      algorithm 1.
    """
    learn = functools.partial(
        _learn,
        autoencoder=autoencoder,
        unet=unet,
        conditioner=conditioner,
        objective=objective,
        latent_shape=latent_shape,
        condition=condition,
        num_classes=num_classes,
        null_tokens=null_tokens,
        condition_dropout=condition_dropout,
    )
    learned = average(
        learn, gradient_inputs(state), frozen, batch, root_key, parts=accumulate
    )
    gradients = learned.gradients
    state = apply_gradients(state, gradients, optimizer)
    return state, DiffusionMetrics(learned.means, optax.tree.norm(gradients))


def _learn(
    state: TrainState,
    frozen: Frozen,
    batch: Batch | LatentBatch,
    root_key: Key[Array, ""],
    *,
    axis_name: AxisName,
    autoencoder: Autoencoder,
    unet: UNet,
    conditioner: Conditioner,
    objective: Objective,
    latent_shape: tuple[int, int, int],
    condition: ConditionConfig,
    num_classes: int,
    null_tokens: tuple[int, ...],
    condition_dropout: float,
) -> Learned:
    """Draw what a batch needs and differentiate its loss."""
    del axis_name  # nothing here is of more than one example

    def keys(stream: Stream) -> Key[Array, " b"]:
        return example_keys(root_key, stream, state.step, batch.example_index)

    images = to_float(batch.image) if isinstance(batch, Batch) else None
    posterior = posterior_of(batch, frozen, autoencoder=autoencoder)
    latents = posterior.sample(normal(keys(Stream.DIFFUSION_POSTERIOR), latent_shape))
    x_0 = jax.lax.stop_gradient(latents * frozen.latent_scale)
    level = draw_levels(
        objective.schedule, keys(Stream.TIMESTEP), shift=objective.timestep_shift
    )
    eps = normal(keys(Stream.NOISE), latent_shape)
    if objective.offset_noise:
        shared = normal(keys(Stream.OFFSET_NOISE), latent_shape[-1:])
        eps = offset_noise(eps, shared, strength=objective.offset_noise)
    inputs = inputs_of(
        batch,
        images,
        frozen,
        keys(Stream.HOLE),
        autoencoder=autoencoder,
        condition=condition,
    )
    dropped = uniform(keys(Stream.CONDITION_DROPOUT)) < condition_dropout
    null = null_inputs(
        inputs,
        num_classes=num_classes,
        null_tokens=null_tokens,
        null_embedding=frozen.null_embedding,
    )
    inputs = drop_conditions(inputs, null, dropped)
    loss_of = functools.partial(
        prediction_loss, unet=unet, conditioner=conditioner, objective=objective
    )
    value, gradients = jax.value_and_grad(loss_of)(
        state.params, frozen, x_0, level, eps, inputs
    )
    return Learned(gradients, value)


def posterior_of(
    batch: Batch | LatentBatch, frozen: Frozen, *, autoencoder: Autoencoder
) -> DiagonalGaussian | Unquantized:
    """Encode a batch's images, or take what stage 1 made of them before.

    Args:
      batch: Of either kind.
      frozen: The first stage.

    Returns:
      What unscaled latents are drawn of.
    """
    if isinstance(batch, LatentBatch):
        return read_moments(batch.moments, regularizer=autoencoder.regularizer)
    return encode(autoencoder, frozen.autoencoder, to_float(batch.image))


def prediction_loss(
    params: Denoising,
    frozen: Frozen,
    x_0: Float[Array, "b h w c"],
    level: Level,
    eps: Float[Array, "b h w c"],
    inputs: ConditionInputs,
    *,
    unet: UNet,
    conditioner: Conditioner,
    objective: Objective,
) -> Float[Array, ""]:
    """Score what the UNet predicts for a batch.

    Args:
      params: What is trained.
      frozen: What is not.
      x_0: Scaled latents.
      level: Noise level of each example.
      eps: Noise.
      inputs: What each example is conditioned on.
      unet: The network in training.
      conditioner: Prepares what it is conditioned on.
      objective: What is learned.

    Returns:
      The weighted error of the prediction, a mean over the batch.
    """
    variables = {"params": {**frozen.conditioner, **params.conditioner}}
    cond = cast(Condition, conditioner.apply(variables, inputs))

    def denoise(
        x_t: Float[Array, "b h w c"], t: Real[Array, " b"], cond: PyTree
    ) -> Float[Array, "b h w c"]:
        return cast(jax.Array, unet.apply({"params": params.unet}, x_t, t, cond))

    losses = denoising_loss(
        denoise,
        x_0,
        level,
        eps,
        cond,
        prediction=objective.prediction,
        loss=objective.loss,
        weight=objective.weight,
        weight_gamma=objective.weight_gamma,
        sigma_data=objective.sigma_data,
    )
    return losses.mean()


def inputs_of(
    batch: Batch | LatentBatch,
    images: Float[Array, "b h w c"] | None,
    frozen: Frozen,
    hole_keys: Key[Array, " b"],
    *,
    autoencoder: Autoencoder,
    condition: ConditionConfig,
) -> ConditionInputs:
    """Collect what the examples of a batch are conditioned on.

    Args:
      batch: With labels, tokens, vectors or maps, as the condition needs them.
      images: Of the batch, in [-1, 1]; None of one of latents, which a config allows
        where nothing is made of images.
      frozen: The first stage, which encodes images with holes.
      hole_keys: One per example.
      autoencoder: The first stage's network.
      condition: What the UNet is conditioned on.

    Returns:
      The inputs of the conditioner.
    """
    image = None
    if condition.concat == "segmentation":
        image = jax.nn.one_hot(
            batch.segmentation, condition.num_segments, dtype=jnp.float32
        )
    elif condition.concat == "low_resolution" and images is not None:
        image = low_resolution(images, factor=condition.low_resolution_factor)
    elif condition.concat == "masked_image" and images is not None:
        holes = random_holes(hole_keys, height=images.shape[1], width=images.shape[2])
        masked = cut_holes(images, holes)
        latents = encode(autoencoder, frozen.autoencoder, masked).mode()
        image = join_masked(latents * frozen.latent_scale, holes)
    return ConditionInputs(
        label=batch.label if condition.uses_classes else None,
        tokens=batch.tokens if condition.uses_tokens else None,
        embedding=batch.embedding if condition.context == "embedding" else None,
        image=image,
    )


class FrozenWeights(NamedTuple):
    """What a run reads from elsewhere before it starts."""

    perceptual: PyTree
    """Parameters of LPIPS, or None."""
    first_stage: tuple[PyTree, Float[Array, ""]] | None
    """An autoencoder's parameters and latent scale; None if it is trained."""
    conditioner: PyTree
    """Parameters of a frozen conditioner, or {}."""
