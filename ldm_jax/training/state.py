"""The train state of a stage, its optimizer, and one update."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from ldm_jax.config import OptimConfig
from ldm_jax.training.ema import share_of_new
from ldm_jax.training.optimizers import muon
from ldm_jax.types import PyTree


class CriticState(NamedTuple):
    """The state of the discriminator."""

    params: PyTree
    """Its parameters, float32."""
    opt_state: PyTree
    """The state of its optimizer."""


class TrainState(NamedTuple):
    """The state of one stage: arrays only.

    Field names are paths in checkpoints. A checkpoint holds no trace of a part that is
    None.
    """

    step: Int[Array, ""]
    """Updates made, int32."""
    params: PyTree
    """Live parameters, float32."""
    ema: PyTree
    """Exponential moving average of `params`."""
    opt_state: PyTree
    """The state of the optimizer."""
    critic: CriticState | None = None
    """The discriminator's state, if the stage trains one."""
    averages: tuple[PyTree, ...] | None = None
    """Power-function averages of `params`, one for each of `average_lengths`."""


class Optimizer(NamedTuple):
    """An optimizer and the averages of the parameters that it maintains; all static."""

    transformation: optax.GradientTransformation
    """From gradients to updates."""
    ema_decay: float
    """Largest decay of the exponential moving average, in [0, 1)."""
    average_lengths: tuple[float, ...] = ()
    """Relative lengths of the power-function averages."""


def gradient_inputs(state: TrainState) -> TrainState:
    """Return the parts of a state that a gradient depends on.

    Without the averages and the moments of the optimizer, a layout that shards the
    state does not gather them.
    """
    return state._replace(ema=None, opt_state=None, averages=None)


def learning_rate_schedule(config: OptimConfig, *, num_steps: int) -> optax.Schedule:
    """Make the learning rate a function of the step.

    Args:
      num_steps: Steps of the whole stage.

    Returns:
      A linear warm-up, a constant rate, a linear decay to 0.
    """

    def schedule(count: ArrayLike) -> Float[Array, ""]:
        step = jnp.asarray(count, jnp.float32)
        rising = (step + 1.0) / (config.warmup_steps + 1.0)
        falling = (num_steps - step) / (config.decay_steps + 1.0)
        return config.lr * jnp.minimum(jnp.minimum(rising, falling), 1.0)

    return schedule


def make_transformation(
    config: OptimConfig, *, num_steps: int
) -> optax.GradientTransformation:
    """Make AdamW or Muon after clipping by the global norm.

    Muon updates matrices. AdamW updates convolution kernels, vectors, scalars and, if
    the config says so, embedding tables, at the same learning rate.

    Args:
      config: A `clip_norm` of 0 clips nothing.
      num_steps: Steps of the whole stage, for the decay of the learning rate.

    Source:
      Loshchilov & Hutter, arXiv:1711.05101; Pascanu et al., arXiv:1211.5063
      (clipping).
    """
    clip = optax.clip_by_global_norm(config.clip_norm)
    rate = learning_rate_schedule(config, num_steps=num_steps)
    if config.algorithm == "muon":
        update = muon(
            rate,
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            moves_tables=config.muon_embeddings,
        )
    else:
        update = optax.adamw(
            rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay
        )
    return optax.chain(clip if config.clip_norm else optax.identity(), update)


def make_optimizer(
    config: OptimConfig, *, num_steps: int, average_lengths: tuple[float, ...] = ()
) -> Optimizer:
    """Make the optimizer of a stage of `num_steps` steps."""
    transformation = make_transformation(config, num_steps=num_steps)
    return Optimizer(transformation, config.ema_decay, average_lengths)


def init_state(params: PyTree, optimizer: Optimizer) -> TrainState:
    """Make the state before the first step; every average starts at `params`."""
    lengths = optimizer.average_lengths
    averages = tuple(jax.tree.map(jnp.copy, params) for _ in lengths)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.transformation.init(params),
        averages=averages or None,
    )


def apply_gradients(
    state: TrainState, gradients: PyTree, optimizer: Optimizer
) -> TrainState:
    """Make one update of the parameters and their averages.

    The decay of the exponential moving average is `min(ema_decay, (1 + n) / (10 + n))`
    after n updates: the average of a short run does not contain its initialisation.

    Args:
      state: Before the update.
      gradients: Means over all devices.
      optimizer: The optimizer that made the state.

    Source:
      latent-diffusion `LitEma`; Karras et al., arXiv:2312.02696, equation 3.
    """
    params, opt_state = update_params(
        state.params, state.opt_state, gradients, optimizer.transformation
    )
    step = state.step + 1
    n = step.astype(jnp.float32)
    decay = jnp.minimum(optimizer.ema_decay, (1.0 + n) / (10.0 + n))
    averages = state.averages
    if averages is not None:
        averages = tuple(
            optax.incremental_update(params, old, share_of_new(step, length=length))
            for old, length in zip(averages, optimizer.average_lengths, strict=True)
        )
    return state._replace(
        step=step,
        params=params,
        ema=optax.incremental_update(params, state.ema, 1.0 - decay),
        opt_state=opt_state,
        averages=averages,
    )


def update_params(
    params: PyTree,
    opt_state: PyTree,
    gradients: PyTree,
    transformation: optax.GradientTransformation,
) -> tuple[PyTree, PyTree]:
    """Return the parameters and the optimizer's state after one update."""
    # Optax raises a float to an integer count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = transformation.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
