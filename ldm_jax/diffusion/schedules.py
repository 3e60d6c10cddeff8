"""Noise schedules: float64 NumPy tables, cast once when they meet the device."""

from typing import Literal, NamedTuple

import numpy as np

ScheduleName = Literal["ldm_linear", "linear"]


class Schedule(NamedTuple):
    """A discrete variance-preserving schedule over i in [0, T).

    Attributes:
      beta: Variance added at step i, in (0, 1); float64.
      abar: Signal power after step i, the product of `1 - beta`; float64.

    Source:
      Ho et al., DDPM, arXiv:2006.11239, eq. 2 and 4.
    """

    beta: np.ndarray
    abar: np.ndarray

    @property
    def num_timesteps(self) -> int:
        """T, the number of discrete noise levels."""
        return len(self.beta)


def make_schedule(
    name: ScheduleName, *, num_timesteps: int, beta_start: float, beta_end: float
) -> Schedule:
    """Tabulate a schedule.

    `ldm_linear` is linear in the square root of beta, which latent-diffusion calls
    `linear` and diffusers `scaled_linear`; `linear` is linear in beta (DDPM).

    Args:
      name: Which of the two.
      num_timesteps: T, at least 1.
      beta_start: First beta, in (0, 1).
      beta_end: Last beta, in [beta_start, 1).

    Returns:
      The float64 tables.

    Raises:
      ValueError: If a number is out of range or the name is unknown.

    Source:
      Ho et al., arXiv:2006.11239, sec. 4 (linear); latent-diffusion
      `make_beta_schedule` (ldm_linear).
    """
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
    if not 0.0 < beta_start <= beta_end < 1.0:
        raise ValueError(
            f"betas must satisfy 0 < start <= end < 1, got {beta_start}, {beta_end}"
        )
    match name:
        case "ldm_linear":
            root = np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps)
            beta = root**2
        case "linear":
            beta = np.linspace(beta_start, beta_end, num_timesteps)
        case _:
            raise ValueError(f"unknown schedule {name!r}")
    return Schedule(beta=beta, abar=np.cumprod(1.0 - beta))
