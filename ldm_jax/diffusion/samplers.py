"""Reverse diffusion: pure steps, and the one scan that drives them."""

from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ldm_jax.diffusion.objectives import Denoiser
from ldm_jax.diffusion.parameterize import clean_from_eps
from ldm_jax.diffusion.schedules import Schedule
from ldm_jax.rng import Stream, image_step_keys, normal
from ldm_jax.types import PyTree

SamplerName = Literal["ddim", "ddpm"]
SAMPLER_NAMES: tuple[SamplerName, ...] = get_args(SamplerName)


class Levels(NamedTuple):
    """Where a step starts and ends: a table of k rows, or one of its rows in a scan.

    Attributes:
      t: Timestep the network is asked at, in [0, T).
      abar_t: Signal power the step starts from.
      abar_s: Signal power it ends at; 1 at the last step, the clean latent.
      sigma: Standard deviation of the exact posterior q(x_s | x_t, x_0).
      x_0_weight: Weight of the clean latent in that posterior's mean.
      x_t_weight: Weight of the noisy latent in it.

    Source:
      Ho et al., DDPM, arXiv:2006.11239, eq. 7, on a subset of the timesteps.
    """

    t: Int[Array, "*k"]
    abar_t: Float[Array, "*k"]
    abar_s: Float[Array, "*k"]
    sigma: Float[Array, "*k"]
    x_0_weight: Float[Array, "*k"]
    x_t_weight: Float[Array, "*k"]


@runtime_checkable
class SamplerStep(Protocol):
    """Move latents from level t to the cleaner level s."""

    def __call__(
        self,
        x_t: Float[Array, "b h w c"],
        eps: Float[Array, "b h w c"],
        noise: Float[Array, "b h w c"],
        *,
        level: Levels,
        eta: Float[Array, ""],
    ) -> Float[Array, "b h w c"]:
        """Return the latents at level s."""
        ...


def spaced_timesteps(num_steps: int, *, num_timesteps: int) -> np.ndarray:
    """Choose exactly `num_steps` timesteps, from the noisiest down.

    The first is T - 1, so that sampling starts where training ended; the spacing is
    as even as integers allow ("trailing"). In integer arithmetic, because rounded
    floats repeat or skip a step for some counts.

    Args:
      num_steps: How many, 1 to T.
      num_timesteps: T.

    Returns:
      Falling timesteps, int32.

    Raises:
      ValueError: If `num_steps` is outside [1, T].

    Source:
      Lin et al., arXiv:2305.08891, table 2 ("trailing").
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"steps: got {num_steps}, wanted 1 to {num_timesteps}")
    left = np.arange(num_steps, 0, -1)
    return (num_timesteps * left // num_steps - 1).astype(np.int32)


def make_levels(schedule: Schedule, num_steps: int) -> Levels:
    """Tabulate the levels of a sampler in float64, cast once to JAX's default float.

    Args:
      schedule: The schedule the network was trained on.
      num_steps: Network evaluations, 1 to T.

    Returns:
      A table of `num_steps` rows.

    Raises:
      ValueError: If `num_steps` is outside [1, T].
    """
    t = spaced_timesteps(num_steps, num_timesteps=schedule.num_timesteps)
    abar_t = schedule.abar[t]
    abar_s = np.append(abar_t[1:], 1.0)
    alpha = abar_t / abar_s
    variance = (1.0 - abar_s) / (1.0 - abar_t) * (1.0 - alpha)
    return Levels(
        t=jnp.asarray(t),
        abar_t=jnp.asarray(abar_t),
        abar_s=jnp.asarray(abar_s),
        sigma=jnp.asarray(np.sqrt(variance)),
        x_0_weight=jnp.asarray(np.sqrt(abar_s) * (1.0 - alpha) / (1.0 - abar_t)),
        x_t_weight=jnp.asarray(np.sqrt(alpha) * (1.0 - abar_s) / (1.0 - abar_t)),
    )


def ddim_step(
    x_t: Float[Array, "b h w c"],
    eps: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    *,
    level: Levels,
    eta: Float[Array, ""],
) -> Float[Array, "b h w c"]:
    """Step by the implicit process: keep the direction, renew a share of the noise.

    Args:
      x_t: Latents at level t.
      eps: Predicted unit-variance noise in `x_t`.
      noise: Fresh unit-variance noise; without effect when `eta` is 0.
      level: One row of the table.
      eta: 0 is deterministic, 1 the DDPM posterior; in [0, 1].

    Returns:
      The latents at level s.

    Source:
      Song et al., DDIM, arXiv:2010.02502, eq. 12 and 16 (their alpha is our abar).
    """
    x_0 = clean_from_eps(x_t, eps, abar_t=level.abar_t)
    sigma = eta * level.sigma
    kept = jnp.sqrt(jnp.maximum(1.0 - level.abar_s - jnp.square(sigma), 0.0))
    return jnp.sqrt(level.abar_s) * x_0 + kept * eps + sigma * noise


def ddpm_step(
    x_t: Float[Array, "b h w c"],
    eps: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    *,
    level: Levels,
    eta: Float[Array, ""],
) -> Float[Array, "b h w c"]:
    """Step by drawing from the posterior q(x_s | x_t, x_0) (ancestral sampling).

    Args:
      x_t: Latents at level t.
      eps: Predicted unit-variance noise in `x_t`.
      noise: Fresh unit-variance noise; the last step's weight of it is 0.
      level: One row of the table.
      eta: Not used: the posterior's variance is given.

    Returns:
      The latents at level s.

    Source:
      Ho et al., DDPM, arXiv:2006.11239, eq. 6 and 7, and algorithm 2.
    """
    del eta
    x_0 = clean_from_eps(x_t, eps, abar_t=level.abar_t)
    mean = level.x_0_weight * x_0 + level.x_t_weight * x_t
    return mean + level.sigma * noise


STEP_BY_SAMPLER: dict[SamplerName, SamplerStep] = {
    "ddim": ddim_step,
    "ddpm": ddpm_step,
}


class Trajectory(NamedTuple):
    """What a sampler returns.

    Attributes:
      x_0: The clean latents.
      frames: Latents on the way, `f` of them, the starting noise first and `x_0`
        last; empty when none were asked for.
    """

    x_0: Float[Array, "b h w c"]
    frames: Float[Array, "f b h w c"]


def frame_slots(num_steps: int, num_frames: int) -> np.ndarray:
    """Say in which frame the result of each step is kept.

    Args:
      num_steps: Steps of the sampler.
      num_frames: Frames, the starting noise (slot 0) among them; 0 keeps none.

    Returns:
      A slot per step, int32. Steps that share a slot overwrite each other in order,
      so that the last slot ends with the last step; memory stays `num_frames` latents
      whatever the number of steps.
    """
    done = np.arange(1, num_steps + 1)
    return np.ceil(done * max(num_frames - 1, 0) / num_steps).astype(np.int32)


def sample(
    denoise: Denoiser,
    keys: Key[Array, " b"],
    cond: PyTree,
    *,
    eta: Float[Array, ""],
    levels: Levels,
    step: SamplerStep,
    shape: tuple[int, int, int],
    num_frames: int,
) -> Trajectory:
    """Run reverse diffusion from pure noise as one `lax.scan`.

    Image i depends on key i, condition i and the network alone.

    Args:
      denoise: The network, guided or not; it predicts eps.
      keys: One key per image.
      cond: Condition of each image.
      eta: Share of renewed noise, in [0, 1].
      levels: The table of steps.
      step: The sampler.
      shape: Height, width and channels of a latent. Static.
      num_frames: Frames to keep, at most one more than there are steps. Static.

    Returns:
      The clean latents and the kept frames.
    """
    num_steps = levels.t.shape[0]
    x_start = normal(image_step_keys(keys, Stream.SAMPLE_START), shape)
    frames = jnp.zeros((num_frames, *x_start.shape), x_start.dtype)
    if num_frames:
        frames = frames.at[0].set(x_start)

    def body(
        carry: Trajectory, row: tuple[Int[Array, ""], Int[Array, ""], Levels]
    ) -> tuple[Trajectory, None]:
        step_idx, slot, level = row
        t = jnp.broadcast_to(level.t, keys.shape)
        eps = denoise(carry.x_0, t, cond)
        noise = normal(image_step_keys(keys, Stream.SAMPLE_STEP, step_idx), shape)
        x_s = step(carry.x_0, eps, noise, level=level, eta=eta)
        frames = carry.frames.at[slot].set(x_s) if num_frames else carry.frames
        return Trajectory(x_s, frames), None

    slots = jnp.asarray(frame_slots(num_steps, num_frames))
    rows = (jnp.arange(num_steps), slots, levels)
    result, _ = jax.lax.scan(body, Trajectory(x_start, frames), rows)
    return result
