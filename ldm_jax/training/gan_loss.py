"""The adversarial loss of the autoencoder, and the update of its discriminator."""

from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ldm_jax.models.discriminator_lpips import PatchDiscriminator
from ldm_jax.parallel.reduce import AxisName
from ldm_jax.training.state import CriticState, update_params
from ldm_jax.types import PyTree

MAX_ADAPTIVE_WEIGHT = 1e4
ADAPTIVE_WEIGHT_EPSILON = 1e-4


class Adversary(NamedTuple):
    """The discriminator, its optimizer and its loss; all static."""

    discriminator: PatchDiscriminator
    """The network."""
    optimizer: optax.GradientTransformation
    """Updates the discriminator alone."""
    start_step: int
    """First step at which the discriminator is trained and its loss is used."""
    ramp_steps: int
    """Steps after `start_step` until `adversary_factor` is 1."""
    weight: float
    """Weight of the generator loss, times the adaptive weight."""
    loss: Literal["hinge", "vanilla"]
    """The loss of the discriminator."""
    sync_batch_norm: bool
    """Whether its batch norms use the statistics of all devices."""
    in_shards: bool = False
    """Whether a batch is computed in shards: the weight of the generator's term is then
    known after its gradient."""


class GanGradients(NamedTuple):
    """Losses of generator and discriminator on one batch, and their gradients."""

    generator_loss: Float[Array, ""]
    """Minus the mean logit of the reconstructions."""
    generator_slope: Float[Array, "b h w c"]
    """Gradient of the generator loss in each reconstruction."""
    critic_loss: Float[Array, ""]
    """Loss of the discriminator."""
    critic_gradients: PyTree
    """Gradients of that loss in the discriminator's parameters."""
    logits_real: Float[Array, ""]
    """Mean logit of the images."""
    logits_fake: Float[Array, ""]
    """Mean logit of the reconstructions."""


def gan_gradients(
    adversary: Adversary,
    params: PyTree,
    images: Float[Array, "b h w c"],
    reconstructions: Float[Array, "b h w c"],
    *,
    axis_name: AxisName,
) -> GanGradients:
    """Apply the discriminator to a batch once and differentiate both losses.

    Both losses use the same reconstructions and the discriminator of the step before.
    (The original code computes the reconstructions again for the discriminator, after
    the update of the autoencoder.)

    Args:
      params: Parameters of the discriminator.
      images: In [-1, 1].
      reconstructions: Reconstructions of these images.
      axis_name: Device axis, for batch statistics over all devices.

    Returns:
      Means over this device's examples, and gradients of them.

    Source:
      Rombach et al., arXiv:2112.10752, eq. 25; Esser et al., arXiv:2012.09841, eq. 5.
    """
    axis = axis_name if adversary.sync_batch_norm else None

    def score(
        params: PyTree, images: Float[Array, "b h w c"]
    ) -> Float[Array, "b h2 w2"]:
        variables = {"params": params}
        logits = adversary.discriminator.apply(variables, images, axis_name=axis)
        return cast(jax.Array, logits)

    loss_of = hinge_loss if adversary.loss == "hinge" else vanilla_loss
    real, real_to_params = jax.vjp(lambda params: score(params, images), params)
    fake, fake_to_both = jax.vjp(score, params, reconstructions)
    generator_loss, generator_slope = jax.value_and_grad(lambda x: -x.mean())(fake)
    critic_loss, (slope_real, slope_fake) = jax.value_and_grad(loss_of, argnums=(0, 1))(
        real, fake
    )
    (from_real,), (from_fake, _) = real_to_params(slope_real), fake_to_both(slope_fake)
    return GanGradients(
        generator_loss=generator_loss,
        generator_slope=fake_to_both(generator_slope)[1],
        critic_loss=critic_loss,
        critic_gradients=optax.tree.add(from_real, from_fake),
        logits_real=real.mean(),
        logits_fake=fake.mean(),
    )


class GanMetrics(NamedTuple):
    """Metrics of the discriminator, means over the global batch."""

    adaptive_weight: Float[Array, ""]
    """Adaptive weight of the generator loss."""
    adversary_factor: Float[Array, ""]
    """Factor of both losses, rising from 0 to 1."""
    critic_loss: Float[Array, ""]
    """Loss of the discriminator, before that factor."""
    logits_real: Float[Array, ""]
    """Mean logit of the images."""
    logits_fake: Float[Array, ""]
    """Mean logit of the reconstructions."""
    critic_gradient_norm: Float[Array, ""]
    """Global norm of the discriminator's gradient, before clipping."""


class GanMeans(NamedTuple):
    """What the weight of the generator's term and the discriminator's update need.

    Means over the examples of a device or shard, or over all.
    """

    critic_gradients: PyTree
    """Gradients of the discriminator's loss times `adversary_factor`."""
    in_kernel: tuple[Float[Array, "h w c d"], Float[Array, "h w c d"]]
    """Gradients of the reconstruction term and of the generator loss in the decoder's
    last kernel: their norms count, not the means of norms."""
    generator_loss: Float[Array, ""]
    """As in `GanGradients`, like the fields below."""
    critic_loss: Float[Array, ""]
    logits_real: Float[Array, ""]
    logits_fake: Float[Array, ""]


def gan_means(
    adversary: Adversary,
    found: GanGradients,
    step: Int[Array, ""],
    reconstruction_slope: Float[Array, "b h w c"],
    *,
    to_kernel: Callable[[Float[Array, "b h w c"]], Float[Array, "h w c d"]],
) -> GanMeans:
    """Collect what has to be averaged before the generator's term is weighted.

    Args:
      step: Updates made before.
      reconstruction_slope: Gradient of the reconstruction term in each reconstruction.
      to_kernel: Function from such a gradient to that in the decoder's last kernel.
    """
    factor = factor_at(adversary, step)
    return GanMeans(
        critic_gradients=optax.tree.scale(factor, found.critic_gradients),
        in_kernel=(to_kernel(reconstruction_slope), to_kernel(found.generator_slope)),
        generator_loss=found.generator_loss,
        critic_loss=found.critic_loss,
        logits_real=found.logits_real,
        logits_fake=found.logits_fake,
    )


class GanUpdate(NamedTuple):
    """The weight of the generator's term and the updated discriminator."""

    strength: Float[Array, ""]
    """Weight of the generator loss in the autoencoder's loss."""
    critic: CriticState
    """The discriminator after its update."""
    metrics: GanMetrics
    """For the log."""


def gan_update(
    adversary: Adversary, critic: CriticState, step: Int[Array, ""], means: GanMeans
) -> GanUpdate:
    """Weight the generator loss and update the discriminator.

    Args:
      critic: The discriminator before its update.
      step: Updates made before.
      means: Over all examples.

    Source:
      Esser et al., arXiv:2012.09841, eq. 6 and 7.
    """
    weight, factor = adaptive_weight(*means.in_kernel), factor_at(adversary, step)
    return GanUpdate(
        strength=adversary.weight * factor * weight,
        critic=update_critic(adversary, critic, means.critic_gradients, factor=factor),
        metrics=GanMetrics(
            adaptive_weight=weight,
            adversary_factor=factor,
            critic_loss=means.critic_loss,
            logits_real=means.logits_real,
            logits_fake=means.logits_fake,
            critic_gradient_norm=optax.tree.norm(means.critic_gradients),
        ),
    )


def update_critic(
    adversary: Adversary,
    critic: CriticState,
    gradients: PyTree,
    *,
    factor: Float[Array, ""],
) -> CriticState:
    """Update the discriminator; at factor 0 not even its optimizer's count changes.

    Args:
      gradients: Of its loss times `factor`, means over devices.
    """
    after = CriticState(
        *update_params(critic.params, critic.opt_state, gradients, adversary.optimizer)
    )

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(factor > 0.0, new, old)

    return jax.tree.map(choose, after, critic)


def factor_at(adversary: Adversary, step: Int[Array, ""]) -> Float[Array, ""]:
    """Return the factor of both losses after `step` updates."""
    return adversary_factor(
        step, start_step=adversary.start_step, ramp_steps=adversary.ramp_steps
    )


def adversary_factor(
    step: Int[Array, ""], *, start_step: int, ramp_steps: int
) -> Float[Array, ""]:
    """Return the factor of both adversarial losses after `step` updates.

    It is 0 before `start_step`, then rises linearly to 1 within `ramp_steps`.
    """
    waited = (step - start_step + 1).astype(jnp.float32)
    return jnp.clip(waited / (ramp_steps + 1.0), 0.0, 1.0)


def adaptive_weight(
    reconstruction_gradient: Float[Array, "h w c d"],
    generator_gradient: Float[Array, "h w c d"],
) -> Float[Array, ""]:
    """Return the weight that gives both terms gradients of equal norm.

    Args:
      reconstruction_gradient: Gradient of the reconstruction term in the decoder's last
        kernel.
      generator_gradient: Gradient of the generator loss in the same kernel.

    Returns:
      The ratio of the norms, in [0, 1e4]; its own gradient is 0.

    Source:
      Esser et al., arXiv:2012.09841, eq. 7 (their lambda, delta = 1e-4 as in the
      code of latent-diffusion).
    """
    length = optax.tree.norm(generator_gradient) + ADAPTIVE_WEIGHT_EPSILON
    weight = optax.tree.norm(reconstruction_gradient) / length
    return jax.lax.stop_gradient(jnp.clip(weight, 0.0, MAX_ADAPTIVE_WEIGHT))


def hinge_loss(
    logits_real: Float[Array, "b h w"], logits_fake: Float[Array, "b h w"]
) -> Float[Array, ""]:
    """Return the hinge loss of the discriminator.

    Source:
      Miyato et al., arXiv:1802.05957, eq. 16, negated and halved.
    """
    real, fake = jax.nn.relu(1.0 - logits_real), jax.nn.relu(1.0 + logits_fake)
    return 0.5 * (real.mean() + fake.mean())


def vanilla_loss(
    logits_real: Float[Array, "b h w"], logits_fake: Float[Array, "b h w"]
) -> Float[Array, ""]:
    """Return the cross entropy of real against reconstructed.

    Source:
      Goodfellow et al., arXiv:1406.2661, eq. 1, negated and halved.
    """
    real, fake = jax.nn.softplus(-logits_real), jax.nn.softplus(logits_fake)
    return 0.5 * (real.mean() + fake.mean())
