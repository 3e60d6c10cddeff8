"""Stage 1: one update of the autoencoder and its adversary; the scale of latents."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from ldm_jax.data.pipeline import Batch
from ldm_jax.images import to_float
from ldm_jax.latent_diffusion import encode
from ldm_jax.models.autoencoder import Autoencoder, Reconstruction, image_layer
from ldm_jax.models.bottleneck import (
    Quantized,
    code_usage,
    perplexity,
)
from ldm_jax.parallel.reduce import Average, AxisName, Learned
from ldm_jax.rng import Stream, example_keys, normal
from ldm_jax.training.autoencoder_loss import (
    Objective,
    ReconstructionTerms,
    reconstruction_terms,
    regularization_loss,
)
from ldm_jax.training.gan_loss import Adversary, gan_update
from ldm_jax.training.state import (
    Optimizer,
    TrainState,
    apply_gradients,
    gradient_inputs,
)
from ldm_jax.types import PyTree


class AutoencoderMetrics(NamedTuple):
    """Numbers of one step over the global batch; None where one has no meaning."""

    loss: Float[Array, ""]
    """What the autoencoder minimises."""
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
    """Codes used, effectively."""
    dead_codes: Float[Array, ""] | None = None
    """Codes that no latent fell on."""
    adaptive_weight: Float[Array, ""] | None = None
    """Of the adversary's term, before its other weights."""
    adversary_factor: Float[Array, ""] | None = None
    """How much it is listened to."""
    critic_loss: Float[Array, ""] | None = None
    """What the adversary minimises, before that factor."""
    logits_real: Float[Array, ""] | None = None
    """Its mean logit for the images."""
    logits_fake: Float[Array, ""] | None = None
    """Its mean logit for the reconstructions."""
    critic_gradient_norm: Float[Array, ""] | None = None
    """Global norm of its gradient, before clipping."""


class BatchLosses(NamedTuple):
    """What one batch tells of the autoencoder, each a mean over its examples."""

    loss: Float[Array, ""]
    """What the autoencoder minimises."""
    terms: ReconstructionTerms
    """The parts of the reconstruction term."""
    penalty: Float[Array, ""]
    """The bottleneck's term before weighting."""
    moments: "LatentMoments"
    """Of the latents."""
    usage: Float[Array, " n"] | None
    """Share of the latents that fell on each code; None without a codebook."""


def autoencoder_step(
    state: TrainState,
    frozen: PyTree,
    batch: Batch,
    root_key: Key[Array, ""],
    *,
    average: Average,
    autoencoder: Autoencoder,
    optimizer: Optimizer,
    latent_shape: tuple[int, int, int],
    objective: Objective,
    adversary: Adversary | None,
    accumulate: int,
) -> tuple[TrainState, AutoencoderMetrics]:
    """Make one update of the autoencoder and, if it has one, of its adversary.

    Args:
      state: The stage's state; with an adversary, one that holds it.
      frozen: Parameters of LPIPS; None without it.
      batch: This device's part of the batch.
      average: Takes means over the devices.
      optimizer: The one that made the state.
      latent_shape: Height, width and channels of a latent.
      objective: The numbers of the losses.
      adversary: The rules of the game; None without one.
      accumulate: Parts the batch is computed in, one after the other; 1 with an
        adversary.

    Returns:
      The next state, and the numbers of this step.

    Raises:
      ValueError: If the state holds no adversary but there is one.

    Source:
      Rombach et al., arXiv:2112.10752, sec. 3.1 and eq. 25.
    """
    if adversary is not None and state.critic is None:
        raise ValueError("adversary: given, but the state holds none")
    learn = functools.partial(
        _learn,
        autoencoder=autoencoder,
        latent_shape=latent_shape,
        objective=objective,
        adversary=adversary,
    )
    learned = average(
        learn, gradient_inputs(state), frozen, batch, root_key, parts=accumulate
    )
    losses, gan = learned.means, learned.agreed
    details: dict[str, Float[Array, ""]] = {}
    if gan is not None:
        critic, metrics = gan
        state = state._replace(critic=critic)
        details = metrics._asdict()
    metrics = AutoencoderMetrics(
        loss=losses.loss,
        gradient_norm=optax.tree.norm(learned.gradients),
        **losses.terms._asdict(),
        **_latent_metrics(losses),
        **details,
    )
    return apply_gradients(state, learned.gradients, optimizer), metrics


def _learn(
    state: TrainState,
    frozen: PyTree,
    batch: Batch,
    root_key: Key[Array, ""],
    *,
    axis_name: AxisName,
    autoencoder: Autoencoder,
    latent_shape: tuple[int, int, int],
    objective: Objective,
    adversary: Adversary | None,
) -> Learned:
    """Differentiate the losses of one batch.

    Forward once, backward once: the losses are differentiated down to the
    reconstructions, where the adversary's share is weighed by a look at the last
    layer alone, and their sum is sent back through the autoencoder.
    """
    images = to_float(batch.image)
    keys = example_keys(
        root_key, Stream.AUTOENCODER_POSTERIOR, state.step, batch.example_index
    )
    noise = normal(keys, latent_shape)

    def forward(params: PyTree) -> tuple[tuple[Array, Array], Reconstruction]:
        made = cast(Any, autoencoder.apply({"params": params}, images, noise))
        penalty = regularization_loss(made.bottleneck, objective=objective)
        return (made.images, penalty), made

    (_, penalty), backward, made = jax.vjp(forward, state.params, has_aux=True)
    (loss, terms), pull = jax.value_and_grad(reconstruction_terms, has_aux=True)(
        made.images, images, frozen, objective=objective
    )
    is_kl = autoencoder.regularizer == "kl"
    penalty_weight = objective.kl_weight if is_kl else objective.codebook_weight
    loss = loss + penalty_weight * penalty
    gan = None
    if adversary is not None and state.critic is not None:
        gan = gan_update(
            adversary,
            state.critic,
            state.step,
            images,
            made.images,
            pull,
            to_kernel=last_kernel_gradient(autoencoder, state.params, made.features),
            axis_name=axis_name,
        )
        loss, pull = loss + gan.loss, pull + gan.pull
    (gradients,) = backward((pull, jnp.full_like(penalty, penalty_weight)))
    usage = None
    if isinstance(made.bottleneck, Quantized):
        usage = code_usage(made.bottleneck.indices, size=autoencoder.codebook_size)
    moments = _moments(made.latents)
    agreed = None if gan is None else (gan.critic, gan.metrics)
    return Learned(gradients, BatchLosses(loss, terms, penalty, moments, usage), agreed)


def last_kernel_gradient(
    autoencoder: Autoencoder, params: PyTree, features: Float[Array, "b h w d"]
) -> Callable[[Float[Array, "b h w c"]], Float[Array, "s s d c"]]:
    """Make a function from gradients in the images to those in the last kernel.

    Args:
      features: What its last convolution was given.

    Returns:
      The linear function: the transpose of the decoder's last convolution.
    """
    layer = image_layer(autoencoder.image_channels, autoencoder.dtype)
    last = params["decoder"]["conv_out"]

    def render(kernel: Float[Array, "s s d c"]) -> Float[Array, "b h w c"]:
        images = layer.apply({"params": {**last, "kernel": kernel}}, features)
        return cast(jax.Array, images).astype(jnp.float32)

    _, backward = jax.vjp(render, last["kernel"])
    return lambda pull: backward(pull)[0]


def _latent_metrics(losses: BatchLosses) -> dict[str, Float[Array, ""]]:
    """Return the fields of `AutoencoderMetrics` that tell of latents and codes."""
    moments = losses.moments
    variance = moments.mean_square - jnp.square(moments.mean)
    details = {
        "latent_mean": moments.mean,
        "latent_std": jnp.sqrt(jnp.maximum(variance, 0.0)),
    }
    if losses.usage is None:
        return {**details, "kl": losses.penalty}
    return {
        **details,
        "codebook": losses.penalty,
        "perplexity": perplexity(losses.usage),
        "dead_codes": (losses.usage == 0.0).sum().astype(jnp.float32),
    }


class LatentMoments(NamedTuple):
    """Sums over the latents of a batch, from which their scale is measured."""

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
    average: Average,
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
      average: Takes means over the devices.
      latent_shape: Height, width and channels of a latent.

    Returns:
      `params`, and the moments over the global batch.
    """

    def measure(
        state: PyTree,
        frozen: None,
        batch: Batch,
        root_key: Key[Array, ""],
        *,
        axis_name: AxisName,
    ) -> Learned:
        del frozen, axis_name
        posterior = encode(autoencoder, state, to_float(batch.image))
        keys = example_keys(root_key, Stream.LATENT_SCALE, 0, batch.example_index)
        latents = posterior.sample(normal(keys, latent_shape))
        return Learned(None, _moments(latents))

    return params, average(measure, params, frozen, batch, root_key, parts=1).means


def _moments(latents: Float[Array, "b h w c"]) -> LatentMoments:
    return LatentMoments(latents.mean(), jnp.square(latents).mean())
