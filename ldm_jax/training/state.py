"""What training changes, and the optimiser that changes it."""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from ldm_jax.config import OptimConfig
from ldm_jax.training.ema import share_of_new
from ldm_jax.training.optimizers import muon
from ldm_jax.types import PyTree


class TrainState(NamedTuple):
    """The state of one stage: arrays only."""

    step: Int[Array, ""]
    """Updates made, int32."""
    params: PyTree
    """Live parameters, float32."""
    ema: PyTree
    """Exponential moving average of `params`."""
    opt_state: PyTree
    """The optimiser's."""


class AveragedState(NamedTuple):
    """The state of a stage that keeps more averages than one."""

    step: Int[Array, ""]
    """Updates made, int32."""
    params: PyTree
    """Live parameters, float32."""
    ema: PyTree
    """Exponential moving average of `params`."""
    opt_state: PyTree
    """The optimiser's."""
    averages: tuple[PyTree, ...]
    """Averages by a power of the step, one for each relative length."""


class CriticState(NamedTuple):
    """The state of an adversary."""

    params: PyTree
    """Its parameters, float32."""
    opt_state: PyTree
    """Its optimiser's."""


class AdversarialState(NamedTuple):
    """The state of a stage with an adversary: that of a stage without, and one more."""

    step: Int[Array, ""]
    """Updates made, int32."""
    params: PyTree
    """Live parameters, float32."""
    ema: PyTree
    """Exponential moving average of `params`; of the adversary there is none."""
    opt_state: PyTree
    """The optimiser's."""
    critic: CriticState
    """The adversary's."""


AnyState = TrainState | AveragedState | AdversarialState
State = TypeVar("State", bound=AnyState)


def learned_from(state: State) -> State:
    """Return the parts of a state that a gradient depends on.

    The averages and the moments of the optimiser are left out, so that a layout that
    gathers what it is given does not gather them.
    """
    if isinstance(state, AveragedState):
        state = state._replace(averages=())
    return state._replace(ema=None, opt_state=None)


def learning_rate_schedule(config: OptimConfig, *, num_steps: int) -> optax.Schedule:
    """Make the learning rate a function of the step.

    Args:
      config: Peak, warm-up and decay.
      num_steps: Steps of the whole stage.

    Returns:
      Linear up over the warm-up, flat, linear down to 0 over the decay.
    """

    def schedule(count: ArrayLike) -> Float[Array, ""]:
        step = jnp.asarray(count, jnp.float32)
        rising = (step + 1.0) / (config.warmup_steps + 1.0)
        falling = (num_steps - step) / (config.decay_steps + 1.0)
        return config.lr * jnp.minimum(jnp.minimum(rising, falling), 1.0)

    return schedule


def make_optimizer(
    config: OptimConfig, *, num_steps: int
) -> optax.GradientTransformation:
    """Make AdamW or Muon behind clipping by the global norm.

    Muon moves matrices; kernels of convolutions, vectors and scalars, and tables of
    embeddings if the config says so, are AdamW's at the same learning rate.

    Args:
      config: Its numbers; a `clip_norm` of 0 clips nothing.
      num_steps: Steps of the whole stage, for the decay of the learning rate.

    Returns:
      The optimiser.

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


def init_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """Make the state before the first step; the average starts at the parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )


def with_averages(state: TrainState, *, num: int) -> TrainState | AveragedState:
    """Return a state before the first step that keeps averages, if there are any."""
    if not num:
        return state
    copies = tuple(jax.tree.map(jnp.copy, state.params) for _ in range(num))
    return AveragedState(*state, averages=copies)


def init_adversarial_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    critic_params: PyTree,
    critic_optimizer: optax.GradientTransformation,
) -> AdversarialState:
    """Make the state before the first step, with the adversary's."""
    critic = CriticState(critic_params, critic_optimizer.init(critic_params))
    return AdversarialState(*init_state(params, optimizer), critic=critic)


def apply_gradients(
    state: State,
    gradients: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    average_lengths: tuple[float, ...] = (),
) -> State:
    """Make one update.

    The decay of the average is `min(ema_decay, (1 + n) / (10 + n))` after n updates,
    so that a short run is not averaged with its initialisation.

    Args:
      state: Before the update.
      gradients: Of the loss, already reduced over devices.
      optimizer: The one that made `state.opt_state`.
      ema_decay: Largest decay of the average, in [0, 1).
      average_lengths: Of the averages by a power of the step, where the state has them.

    Returns:
      The state after the update.

    Source:
      latent-diffusion `LitEma`; Karras et al., arXiv:2312.02696, equation 3.
    """
    params, opt_state = _update(state.params, state.opt_state, gradients, optimizer)
    step = state.step + 1
    n = step.astype(jnp.float32)
    decay = jnp.minimum(ema_decay, (1.0 + n) / (10.0 + n))
    ema = optax.incremental_update(params, state.ema, 1.0 - decay)
    after = state._replace(step=step, params=params, ema=ema, opt_state=opt_state)
    if not isinstance(after, AveragedState):
        return after
    averages = tuple(
        optax.incremental_update(params, old, share_of_new(step, length=length))
        for old, length in zip(after.averages, average_lengths, strict=True)
    )
    return after._replace(averages=averages)


def apply_critic_gradients(
    critic: CriticState,
    gradients: PyTree,
    *,
    optimizer: optax.GradientTransformation,
) -> CriticState:
    """Make one update of an adversary.

    Args:
      critic: Before the update.
      gradients: Of its loss, already reduced over devices.
      optimizer: The one that made `critic.opt_state`.

    Returns:
      The state after the update.
    """
    return CriticState(*_update(critic.params, critic.opt_state, gradients, optimizer))


def _update(
    params: PyTree,
    opt_state: PyTree,
    gradients: PyTree,
    optimizer: optax.GradientTransformation,
) -> tuple[PyTree, PyTree]:
    # Optax raises a float to an integer count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
