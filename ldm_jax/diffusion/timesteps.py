"""Noise levels of a sampler's steps."""

from typing import Literal, NamedTuple

import numpy as np

from ldm_jax.diffusion.schedules import (
    DiscreteSchedule,
    EdmSchedule,
    Level,
    Schedule,
    level_at,
    level_of_ratio,
    reaches_pure_noise,
)
from ldm_jax.types import SPACING_NAMES, SpacingName, choices

KARRAS_RHO = 7.0
# Between those of DDPM's and latent-diffusion's tables (below 200) and cosine's (2e4).
NEARLY_PURE_RATIO = 500.0


class Levels(NamedTuple):
    """Noise levels of a sampler in falling order, float64, one more than steps."""

    t: np.ndarray
    """Time input of the network; unused for a clean last level."""
    alpha: np.ndarray
    """Weight of the clean latent; 1 at a clean end."""
    sigma: np.ndarray
    """Weight of the noise; 0 at a clean end."""
    straight: bool
    """Whether higher-order solvers use `sigma / (alpha + sigma)` as time instead of
    `sigma / alpha`: see `runs_straight`."""

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        return len(self.t) - 1

    def tail(self, num_steps: int) -> "Levels":
        """Return the last `num_steps` steps, those of an image edit."""
        first = self.num_steps - num_steps
        rows = (self.t[first:], self.alpha[first:], self.sigma[first:])
        return Levels(*rows, straight=self.straight)


def make_levels(
    schedule: Schedule, num_steps: int, *, spacing: SpacingName | None = None
) -> Levels:
    """Return the noise levels of a sampler.

    All spacings but `ldm` give exactly `num_steps` steps and end at the clean latent.

    - `trailing`: evenly, starting at the highest level; the default, except for EDM.
    - `leading`: evenly, ending next to the lowest level, below the highest.
    - `linspace`: evenly, from the highest to the lowest level.
    - `karras`: evenly in the seventh root of the noise-to-signal ratio; EDM's default.
    - `ldm`: latent-diffusion's; may have another number of steps, and ends at the first
      entry of the table instead of the clean latent.

    Args:
      schedule: Schedule of the network's training.
      num_steps: Number of steps, 1 to T.
      spacing: Spacing; None for the schedule's default.

    Raises:
      ValueError: If `num_steps` is outside [1, T], or the spacing is unknown or not
        defined for the schedule.

    Source:
      Lin et al., arXiv:2305.08891, table 2; Karras et al., arXiv:2206.00364, eq. 5.
    """
    spacing = spacing or default_spacing(schedule)
    top = schedule.num_timesteps
    if not 1 <= num_steps <= top:
        raise ValueError(f"steps: got {num_steps}, wanted 1 to {top}")
    check_spacing(schedule, spacing)
    match spacing:
        case "karras":
            rows = _karras(schedule, num_steps)
        case "ldm":
            rows = level_at(schedule, _ldm_timesteps(num_steps, top=top))
        case "trailing" | "leading" | "linspace":
            timesteps = spaced_timesteps(num_steps, num_timesteps=top, spacing=spacing)
            rows = level_at(schedule, timesteps.astype(np.float64))
    end = Level(np.zeros(1), np.ones(1), np.zeros(1))
    if spacing == "ldm":
        end = level_at(schedule, np.zeros(1))
    rows = (np.append(row, last) for row, last in zip(rows, end, strict=True))
    return Levels(*rows, straight=runs_straight(schedule))


def runs_straight(schedule: Schedule) -> bool:
    """Return whether higher-order solvers use `sigma / (alpha + sigma)` as time.

    They do for flows, and for starts with (almost) no signal: there the first step in
    `sigma / alpha` is so much longer than the others that the errors of Heun and PLMS,
    and rounding errors, exceed the latent.
    """
    if isinstance(schedule, EdmSchedule):
        return False
    start = level_at(schedule, np.asarray([schedule.num_timesteps - 1.0]))
    return bool(start.sigma[0] > NEARLY_PURE_RATIO * start.alpha[0])


def default_spacing(schedule: Schedule) -> SpacingName:
    """Return the default spacing of a schedule."""
    return "karras" if isinstance(schedule, EdmSchedule) else "trailing"


def check_spacing(schedule: Schedule, spacing: str) -> None:
    """Raise `ValueError` if a spacing is unknown, or not defined for a schedule."""
    if spacing not in SPACING_NAMES:
        raise ValueError(f"spacing: {choices(spacing, SPACING_NAMES)}")
    if spacing == "karras" and reaches_pure_noise(schedule):
        raise ValueError(
            "spacing: got 'karras' on a schedule that starts at noise without signal, "
            "whose ratio is infinite; try trailing"
        )
    if spacing == "ldm" and not isinstance(schedule, DiscreteSchedule):
        raise ValueError(
            "spacing: got 'ldm' on a continuous schedule, wanted a table of timesteps; "
            "try trailing"
        )


def spaced_timesteps(
    num_steps: int,
    *,
    num_timesteps: int,
    spacing: Literal["trailing", "leading", "linspace"] = "trailing",
) -> np.ndarray:
    """Return exactly `num_steps` falling timesteps, int64.

    Integer arithmetic is used because rounded floats repeat or skip steps.

    Args:
      num_steps: Number of steps, 1 to T.
      num_timesteps: T.
      spacing: `leading` counts from 1 like latent-diffusion, or from 0 if that would
        exceed T - 1.

    Source:
      Lin et al., arXiv:2305.08891, table 2.
    """
    match spacing:
        case "trailing":
            return num_timesteps * np.arange(num_steps, 0, -1) // num_steps - 1
        case "leading":
            stride = num_timesteps // num_steps
            offset = min(1, num_timesteps - 1 - (num_steps - 1) * stride)
            return np.arange(num_steps - 1, -1, -1) * stride + offset
        case "linspace":
            gaps = max(num_steps - 1, 1)
            left = np.arange(gaps, gaps - num_steps, -1)
            return (2 * (num_timesteps - 1) * left + gaps) // (2 * gaps)


def _ldm_timesteps(num_steps: int, *, top: int) -> np.ndarray:
    """Return the timesteps of latent-diffusion's `make_ddim_timesteps`, falling."""
    timesteps = np.arange(0, top, top // num_steps)[::-1] + 1.0
    if timesteps[0] >= top:
        works = (n for n in range(num_steps, 0, -1) if (top - 1) % (top // n))
        hint = next(works, None)
        raise ValueError(
            f"steps: got {num_steps}, for which latent-diffusion's spacing passes the "
            f"last timestep; try {f'{hint} steps or ' if hint else ''}spacing trailing"
        )
    return timesteps


def _karras(schedule: Schedule, num_steps: int) -> Level:
    ends = level_at(schedule, np.asarray([schedule.num_timesteps - 1.0, 0.0]))
    high, low = (ends.sigma / ends.alpha) ** (1.0 / KARRAS_RHO)
    share = np.arange(num_steps) / max(num_steps - 1, 1)
    return level_of_ratio(schedule, (high + share * (low - high)) ** KARRAS_RHO)
