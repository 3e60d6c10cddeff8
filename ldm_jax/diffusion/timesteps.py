"""Which noise levels a sampler visits."""

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
    """The levels of a sampler, from the noisiest to its end, in float64."""

    t: np.ndarray
    """What the network is asked at; one more than there are steps, the last of no use
    where the end is clean."""
    alpha: np.ndarray
    """Weight of the clean latent; 1 at a clean end."""
    sigma: np.ndarray
    """Weight of the noise, falling; 0 at a clean end."""
    straight: bool
    """Whether solvers of higher order take `sigma / (alpha + sigma)` as their time
    rather than `sigma / alpha`: see `runs_straight`."""

    @property
    def num_steps(self) -> int:
        """Steps from level to level."""
        return len(self.t) - 1

    def tail(self, num_steps: int) -> "Levels":
        """Return the last steps alone: where an edit of an image begins."""
        first = self.num_steps - num_steps
        rows = (self.t[first:], self.alpha[first:], self.sigma[first:])
        return Levels(*rows, straight=self.straight)


def make_levels(
    schedule: Schedule, num_steps: int, *, spacing: SpacingName | None = None
) -> Levels:
    """Choose the levels to visit.

    All but `ldm` give exactly `num_steps` steps, for every 1 to T, and end at the clean
    latent.

    - `trailing`: evenly, and the first is the noisiest; the default, but for EDM.
    - `leading`: evenly, and the last is next to the least noisy; the first is not the
      noisiest.
    - `linspace`: evenly, from the noisiest to the least noisy.
    - `karras`: evenly in the seventh root of the noise-to-signal ratio; EDM's default.
    - `ldm`: latent-diffusion's, which need not have the steps asked for and ends at the
      table's first entry, not at the clean latent.

    Args:
      schedule: The schedule the network was trained on.
      num_steps: 1 to T.
      spacing: Which; None for the schedule's default.

    Returns:
      The levels.

    Raises:
      ValueError: If `num_steps` is outside [1, T], or the spacing is unknown or has no
        meaning for the schedule.

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
    """Say whether solvers of higher order take `sigma / (alpha + sigma)` as their time.

    As suits flows, and starts with no signal or next to none: there the first step in
    `sigma / alpha` is so much longer than the others that Heun's and PLMS's errors,
    and those of rounding, grow beyond the latent itself.
    """
    if isinstance(schedule, EdmSchedule):
        return False
    start = level_at(schedule, np.asarray([schedule.num_timesteps - 1.0]))
    return bool(start.sigma[0] > NEARLY_PURE_RATIO * start.alpha[0])


def default_spacing(schedule: Schedule) -> SpacingName:
    """Return how a schedule's levels are spaced unless one says otherwise."""
    return "karras" if isinstance(schedule, EdmSchedule) else "trailing"


def check_spacing(schedule: Schedule, spacing: str) -> None:
    """Raise `ValueError` if a spacing is unknown, or has no meaning for a schedule."""
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
    """Choose exactly `num_steps` timesteps, from the noisiest down.

    In integer arithmetic, because rounded floats repeat or skip a step for some counts.

    Args:
      num_steps: How many, 1 to T.
      num_timesteps: T.
      spacing: `leading` counts from 1 as latent-diffusion does, or from 0 where that
        would pass T - 1.

    Returns:
      Falling timesteps, int64.

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
    """Return the grid of latent-diffusion's `make_ddim_timesteps`, falling."""
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
