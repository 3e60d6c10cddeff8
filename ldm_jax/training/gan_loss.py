"""The other player of stage 1: a discriminator that learns as it is fooled."""

from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ldm_jax.models.discriminator_lpips import PatchDiscriminator
from ldm_jax.parallel.reduce import AxisName, mean_over
from ldm_jax.training.state import CriticState, update_params
from ldm_jax.types import PyTree

MAX_ADAPTIVE_WEIGHT = 1e4
ADAPTIVE_WEIGHT_EPSILON = 1e-4


class Adversary(NamedTuple):
    """The discriminator and the rules of the game, all static."""

    critic: PatchDiscriminator
    """The network."""
    optimizer: optax.GradientTransformation
    """Its own."""
    start_step: int
    """Step at which it begins to learn and to be listened to."""
    ramp_steps: int
    """Steps until it is fully listened to; 0: at once."""
    weight: float
    """Of its term, times the adaptive weight."""
    loss: Literal["hinge", "vanilla"]
    """What it minimises."""
    sync_batch_norm: bool
    """Whether it normalises over all devices."""


class Round(NamedTuple):
    """What the discriminator says of a batch, and what it learns from it."""

    generator_loss: Float[Array, ""]
    """Minus its mean logit for the reconstructions."""
    generator_pull: Float[Array, "b h w c"]
    """Gradient of that in each reconstruction."""
    critic_loss: Float[Array, ""]
    """What it minimises itself."""
    critic_gradients: PyTree
    """Gradients of that in its parameters."""
    logits_real: Float[Array, ""]
    """Its mean logit for the images."""
    logits_fake: Float[Array, ""]
    """Its mean logit for the reconstructions."""


def play(
    adversary: Adversary,
    params: PyTree,
    images: Float[Array, "b h w c"],
    reconstructions: Float[Array, "b h w c"],
    *,
    axis_name: AxisName,
) -> Round:
    """Show a batch to the discriminator once, and ask both players' gradients.

    Both see the same reconstructions and the same discriminator, that of the step
    before. (The original code makes the reconstructions of the second player anew,
    after the update of the first.)

    Args:
      adversary: The rules.
      params: The discriminator's.
      images: In [-1, 1].
      reconstructions: Of these images; how they were made is not looked at.
      axis_name: Device axis, for batch statistics over all devices.

    Returns:
      Means over this device's part of the batch, and gradients of them.

    Source:
      Rombach et al., arXiv:2112.10752, eq. 25; Esser et al., arXiv:2012.09841, eq. 5.
    """
    axis = axis_name if adversary.sync_batch_norm else None

    def score(
        params: PyTree, images: Float[Array, "b h w c"]
    ) -> Float[Array, "b h2 w2"]:
        logits = adversary.critic.apply({"params": params}, images, axis_name=axis)
        return cast(jax.Array, logits)

    loss_of = hinge_loss if adversary.loss == "hinge" else vanilla_loss
    real, real_to_params = jax.vjp(lambda params: score(params, images), params)
    fake, fake_to_both = jax.vjp(score, params, reconstructions)
    generator_loss, generator_pull = jax.value_and_grad(lambda x: -x.mean())(fake)
    critic_loss, (pull_real, pull_fake) = jax.value_and_grad(loss_of, argnums=(0, 1))(
        real, fake
    )
    (from_real,), (from_fake, _) = real_to_params(pull_real), fake_to_both(pull_fake)
    return Round(
        generator_loss=generator_loss,
        generator_pull=fake_to_both(generator_pull)[1],
        critic_loss=critic_loss,
        critic_gradients=optax.tree.add(from_real, from_fake),
        logits_real=real.mean(),
        logits_fake=fake.mean(),
    )


class GanMetrics(NamedTuple):
    """Numbers of one step of both players, means over the global batch."""

    adaptive_weight: Float[Array, ""]
    """Of the adversary's term, before its other weights."""
    adversary_factor: Float[Array, ""]
    """How much it is listened to."""
    critic_loss: Float[Array, ""]
    """What it minimises, before that factor."""
    logits_real: Float[Array, ""]
    """Its mean logit for the images."""
    logits_fake: Float[Array, ""]
    """Its mean logit for the reconstructions."""
    critic_gradient_norm: Float[Array, ""]
    """Global norm of its gradient, before clipping."""


class GanUpdate(NamedTuple):
    """One step of both players."""

    loss: Float[Array, ""]
    """The adversary's term in the autoencoder's loss, weighted."""
    pull: Float[Array, "b h w c"]
    """Gradient of that in each reconstruction."""
    critic: CriticState
    """The discriminator after its update."""
    metrics: GanMetrics
    """What to tell."""


def gan_update(
    adversary: Adversary,
    critic: CriticState,
    step: Int[Array, ""],
    images: Float[Array, "b h w c"],
    reconstructions: Float[Array, "b h w c"],
    reconstruction_pull: Float[Array, "b h w c"],
    *,
    to_kernel: Callable[[Float[Array, "b h w c"]], Float[Array, "h w c d"]],
    axis_name: AxisName,
) -> GanUpdate:
    """Weigh the adversary's term, and let the discriminator learn.

    Args:
      adversary: The rules.
      critic: The discriminator before its update.
      step: Updates made before.
      images: In [-1, 1].
      reconstructions: Of these images.
      reconstruction_pull: Gradient of the reconstruction term in each of them.
      to_kernel: Takes such a gradient on to the decoder's last kernel.
      axis_name: Name of the device axis to average over; None for one device.

    Returns:
      What the adversary adds to the autoencoder's loss, and its own next state.

    Source:
      Esser et al., arXiv:2012.09841, eq. 6 and 7.
    """
    game = play(adversary, critic.params, images, reconstructions, axis_name=axis_name)
    pulls = reconstruction_pull, game.generator_pull
    # Averaged before their lengths are taken: of means, not means of lengths.
    weight = adaptive_weight(*mean_over([to_kernel(pull) for pull in pulls], axis_name))
    factor = adversary_factor(
        step, start_step=adversary.start_step, ramp_steps=adversary.ramp_steps
    )
    strength = adversary.weight * factor * weight
    gradients = optax.tree.scale(factor, game.critic_gradients)
    gradients = mean_over(gradients, axis_name)
    details = (game.critic_loss, game.logits_real, game.logits_fake)
    critic_loss, logits_real, logits_fake = mean_over(details, axis_name)
    return GanUpdate(
        loss=strength * game.generator_loss,
        pull=strength * game.generator_pull,
        critic=train_critic(adversary, critic, gradients, factor=factor),
        metrics=GanMetrics(
            adaptive_weight=weight,
            adversary_factor=factor,
            critic_loss=critic_loss,
            logits_real=logits_real,
            logits_fake=logits_fake,
            critic_gradient_norm=optax.tree.norm(gradients),
        ),
    )


def train_critic(
    adversary: Adversary,
    critic: CriticState,
    gradients: PyTree,
    *,
    factor: Float[Array, ""],
) -> CriticState:
    """Update the discriminator; at factor 0 it stays as it is, to the last count.

    Args:
      adversary: The rules.
      critic: Before the update.
      gradients: Of its loss times `factor`, reduced over devices.
      factor: How much it is listened to, in [0, 1].

    Returns:
      The state after the update.
    """
    after = CriticState(
        *update_params(critic.params, critic.opt_state, gradients, adversary.optimizer)
    )

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(factor > 0.0, new, old)

    return jax.tree.map(choose, after, critic)


def adversary_factor(
    step: Int[Array, ""], *, start_step: int, ramp_steps: int
) -> Float[Array, ""]:
    """Return how much the adversary is listened to at a step.

    Args:
      step: Updates made before it.
      start_step: First step at which it is listened to at all.
      ramp_steps: Steps after that one until it is fully listened to.

    Returns:
      0 before `start_step`, then rising linearly to 1.
    """
    waited = (step - start_step + 1).astype(jnp.float32)
    return jnp.clip(waited / (ramp_steps + 1.0), 0.0, 1.0)


def adaptive_weight(
    reconstruction_gradient: Float[Array, "h w c d"],
    generator_gradient: Float[Array, "h w c d"],
) -> Float[Array, ""]:
    """Weigh the adversary so that it pulls as hard as the reconstruction term.

    Args:
      reconstruction_gradient: Of the reconstruction term in the decoder's last kernel.
      generator_gradient: Of the adversary's term in the same.

    Returns:
      The ratio of their lengths, in [0, 1e4], a constant to every gradient.

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
    """Ask for logits above 1 where real, below -1 where made, and no more.

    Source:
      Miyato et al., arXiv:1802.05957, eq. 16, negated and halved.
    """
    real, fake = jax.nn.relu(1.0 - logits_real), jax.nn.relu(1.0 + logits_fake)
    return 0.5 * (real.mean() + fake.mean())


def vanilla_loss(
    logits_real: Float[Array, "b h w"], logits_fake: Float[Array, "b h w"]
) -> Float[Array, ""]:
    """Return the cross entropy of telling real from made.

    Source:
      Goodfellow et al., arXiv:1406.2661, eq. 1, negated and halved.
    """
    real, fake = jax.nn.softplus(-logits_real), jax.nn.softplus(logits_fake)
    return 0.5 * (real.mean() + fake.mean())
