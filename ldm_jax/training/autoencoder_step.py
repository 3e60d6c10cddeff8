"""The autoencoder step: one update of the autoencoder and its discriminator."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from ldm_jax.data.pipeline import Batch
from ldm_jax.images import to_float
from ldm_jax.latent_diffusion import LatentDiffusion, encode
from ldm_jax.models.autoencoder import Autoencoder, Reconstruction, image_layer
from ldm_jax.models.bottleneck import Quantized, code_usage, perplexity
from ldm_jax.parallel.reduce import AxisName, BatchGradients, Reduce, mean_over
from ldm_jax.rng import Stream, example_keys, normal
from ldm_jax.training.autoencoder_loss import (
    AutoencoderObjective,
    ReconstructionTerms,
    reconstruction_terms,
    regularization_loss,
)
from ldm_jax.training.gan_loss import (
    Adversary,
    GanMeans,
    GanUpdate,
    gan_gradients,
    gan_means,
    gan_update,
)
from ldm_jax.training.state import (
    CriticState,
    Optimizer,
    TrainState,
    apply_gradients,
    gradient_inputs,
)
from ldm_jax.types import PyTree


class AutoencoderMetrics(NamedTuple):
    """Metrics of one step over the global batch; None where one does not apply."""

    loss: Float[Array, ""]
    """The autoencoder's whole loss."""
    reconstruction: Float[Array, ""]
    """Mean error of a value."""
    latent_mean: Float[Array, ""]
    """Mean of the unscaled latents."""
    latent_std: Float[Array, ""]
    """Their standard deviation."""
    gradient_norm: Float[Array, ""]
    """Global norm of the autoencoder's gradient, before clipping."""
    perceptual: Float[Array, ""] | None = None
    """Mean LPIPS of an image."""
    kl: Float[Array, ""] | None = None
    """KL divergence, in nats a latent."""
    codebook: Float[Array, ""] | None = None
    """The codebook's term before weighting."""
    perplexity: Float[Array, ""] | None = None
    """Effective number of codes in use."""
    dead_codes: Float[Array, ""] | None = None
    """Codes to which no latent was assigned."""
    adaptive_weight: Float[Array, ""] | None = None
    """As in `GanMetrics`, like the fields below."""
    adversary_factor: Float[Array, ""] | None = None
    critic_loss: Float[Array, ""] | None = None
    logits_real: Float[Array, ""] | None = None
    logits_fake: Float[Array, ""] | None = None
    critic_gradient_norm: Float[Array, ""] | None = None


class BatchLosses(NamedTuple):
    """Losses and statistics of one batch, means over its examples."""

    loss: Float[Array, ""]
    """The autoencoder's whole loss."""
    terms: ReconstructionTerms
    """The parts of the reconstruction term."""
    penalty: Float[Array, ""]
    """The bottleneck's term before weighting."""
    moments: "LatentMoments"
    """Moments of the latents."""
    usage: Float[Array, " n"] | None
    """Share of the latents assigned to each code; None without a codebook."""


def autoencoder_step(
    state: TrainState,
    frozen: PyTree,
    batch: Batch,
    root_key: Key[Array, ""],
    *,
    model: LatentDiffusion,
    objective: AutoencoderObjective,
    optimizer: Optimizer,
    reduce: Reduce,
) -> tuple[TrainState, AutoencoderMetrics]:
    """Make one update of the autoencoder and of its discriminator, if there is one.

    Args:
      state: Holds the discriminator's state if the objective has an adversary.
      frozen: Parameters of LPIPS; None without it.
      batch: This device's examples.
      reduce: Does not cut the batch into parts where there is a discriminator, unless
        its objective is `in_shards`.

    Raises:
      ValueError: If the objective has an adversary and the state has none.

    Source:
      Rombach et al., arXiv:2112.10752, sec. 3.1 and eq. 25.
    """
    if objective.adversary is not None and state.critic is None:
        raise ValueError("objective.adversary: given, but the state has no critic")
    with jax.default_matmul_precision(model.precision):
        gradient_fn = functools.partial(_gradients, model=model, objective=objective)
        inputs = gradient_inputs(state)
        computed = reduce(gradient_fn, inputs, frozen, batch, root_key)
        losses, gradients, update = (
            computed.means,
            computed.gradients,
            computed.replicated,
        )
        if isinstance(gradients, SeparateGradients):
            update, losses, gradients = _joined(gradients, losses, state, objective)
        gan_metrics: dict[str, Float[Array, ""]] = {}
        if update is not None:
            state = state._replace(critic=update.critic)
            gan_metrics = update.metrics._asdict()
        metrics = AutoencoderMetrics(
            loss=losses.loss,
            gradient_norm=optax.tree.norm(gradients),
            **losses.terms._asdict(),
            **_latent_metrics(losses),
            **gan_metrics,
        )
        return apply_gradients(state, gradients, optimizer), metrics


class SeparateGradients(NamedTuple):
    """Gradients of a batch in shards, whose generator's term has no weight yet."""

    reconstruction: PyTree
    """Of the loss without the generator's term."""
    generator: PyTree
    """Of the generator loss."""
    means: GanMeans
    """What its weight depends on."""


def _joined(
    separate: SeparateGradients,
    losses: BatchLosses,
    state: TrainState,
    objective: AutoencoderObjective,
) -> tuple[GanUpdate, BatchLosses, PyTree]:
    """Weight the generator's term over the whole batch, and add it."""
    adversary, critic = cast(Adversary, objective.adversary), state.critic
    update = gan_update(
        adversary, cast(CriticState, critic), state.step, separate.means
    )
    strength = update.strength
    gradients = jax.tree.map(
        lambda first, second: first + strength * second,
        separate.reconstruction,
        separate.generator,
    )
    loss = losses.loss + strength * separate.means.generator_loss
    return update, losses._replace(loss=loss), gradients


def _gradients(
    state: TrainState,
    frozen: PyTree,
    batch: Batch,
    root_key: Key[Array, ""],
    *,
    axis_name: AxisName,
    model: LatentDiffusion,
    objective: AutoencoderObjective,
) -> BatchGradients:
    """Differentiate the losses of one batch in one forward and one backward pass.

    The losses are differentiated with respect to the reconstructions. There the
    generator's term is weighted by gradients of the last layer alone, and the sum goes
    back through the autoencoder.
    """
    autoencoder = model.autoencoder
    images = to_float(batch.image)
    keys = example_keys(
        root_key, Stream.AUTOENCODER_POSTERIOR, state.step, batch.example_index
    )
    noise = normal(keys, model.latent_shape)

    def forward(params: PyTree) -> tuple[tuple[Array, Array], Reconstruction]:
        made = cast(Any, autoencoder.apply({"params": params}, images, noise))
        penalty = regularization_loss(made.bottleneck, objective=objective)
        return (made.images, penalty), made

    (_, penalty), backward, made = jax.vjp(forward, state.params, has_aux=True)
    (loss, terms), slope = jax.value_and_grad(reconstruction_terms, has_aux=True)(
        made.images, images, frozen, objective=objective
    )
    is_kl = autoencoder.regularizer == "kl"
    penalty_weight = objective.kl_weight if is_kl else objective.codebook_weight
    loss = loss + penalty_weight * penalty
    weights = jnp.full_like(penalty, penalty_weight)
    adversary, replicated = objective.adversary, None
    if adversary is None or state.critic is None:
        (gradients,) = backward((slope, weights))
    else:
        found = gan_gradients(
            adversary, state.critic.params, images, made.images, axis_name=axis_name
        )
        to_kernel = last_kernel_gradient(autoencoder, state.params, made.features)
        means = gan_means(adversary, found, state.step, slope, to_kernel=to_kernel)
        if adversary.in_shards:
            (of_generator,) = backward((found.generator_slope, 0.0 * weights))
            (gradients,) = backward((slope, weights))
            gradients = SeparateGradients(gradients, of_generator, means)
        else:
            means = mean_over(means, axis_name)
            update = gan_update(adversary, state.critic, state.step, means)
            loss = loss + update.strength * found.generator_loss
            slope = slope + update.strength * found.generator_slope
            (gradients,) = backward((slope, weights))
            replicated = update
    usage = None
    if isinstance(made.bottleneck, Quantized):
        usage = code_usage(made.bottleneck.indices, size=autoencoder.codebook_size)
    losses = BatchLosses(loss, terms, penalty, _moments(made.latents), usage)
    return BatchGradients(gradients, losses, replicated)


def last_kernel_gradient(
    autoencoder: Autoencoder, params: PyTree, features: Float[Array, "b h w d"]
) -> Callable[[Float[Array, "b h w c"]], Float[Array, "s s d c"]]:
    """Return the transpose of the decoder's last convolution in its kernel.

    Args:
      features: Input of that convolution.

    Returns:
      From gradients in the images to the gradient in the kernel.
    """
    layer = image_layer(autoencoder.image_channels, autoencoder.dtype)
    last = params["decoder"]["conv_out"]

    def render(kernel: Float[Array, "s s d c"]) -> Float[Array, "b h w c"]:
        images = layer.apply({"params": {**last, "kernel": kernel}}, features)
        return cast(jax.Array, images).astype(jnp.float32)

    _, backward = jax.vjp(render, last["kernel"])
    return lambda slope: backward(slope)[0]


def _latent_metrics(losses: BatchLosses) -> dict[str, Float[Array, ""]]:
    """Return the metrics of latents and codes, by field of `AutoencoderMetrics`."""
    moments = losses.moments
    variance = moments.mean_square - jnp.square(moments.mean)
    found = {
        "latent_mean": moments.mean,
        "latent_std": jnp.sqrt(jnp.maximum(variance, 0.0)),
    }
    if losses.usage is None:
        return {**found, "kl": losses.penalty}
    return {
        **found,
        "codebook": losses.penalty,
        "perplexity": perplexity(losses.usage),
        "dead_codes": (losses.usage == 0.0).sum().astype(jnp.float32),
    }


class LatentMoments(NamedTuple):
    """Moments of the latents of a batch, from which their scale is computed."""

    mean: Float[Array, ""]
    """Mean over examples, pixels and channels."""
    mean_square: Float[Array, ""]
    """Mean of the squares."""


def latent_moments(
    params: PyTree,
    frozen: None,
    batch: Batch,
    root_key: Key[Array, ""],
    *,
    model: LatentDiffusion,
    reduce: Reduce,
) -> tuple[PyTree, LatentMoments]:
    """Measure the sampled, unscaled latents of one batch.

    It has the form of a training step that changes nothing, so that a layout maps it
    over devices in the same way.

    Args:
      params: Of the autoencoder; returned as they are.
    """

    def measure(
        state: PyTree,
        frozen: None,
        batch: Batch,
        root_key: Key[Array, ""],
        *,
        axis_name: AxisName,
    ) -> BatchGradients:
        del frozen, axis_name
        posterior = encode(model, state, to_float(batch.image))
        keys = example_keys(root_key, Stream.LATENT_SCALE, 0, batch.example_index)
        latents = posterior.sample(normal(keys, model.latent_shape))
        return BatchGradients(None, _moments(latents))

    return params, reduce(measure, params, frozen, batch, root_key).means


def _moments(latents: Float[Array, "b h w c"]) -> LatentMoments:
    return LatentMoments(latents.mean(), jnp.square(latents).mean())
