"""Every sampler as a table: what becomes of each answer of the network.

Samplers of diffusion models differ in nothing but numbers. Each asks the network at a
known level, reads one signal out of the answer (the clean latent, the noise or the
flow), and goes on with a weighted sum of what it has: one or two latents, the last few
signals, fresh noise. So a sampler is a `Table` of those weights, worked out in float64
before the network runs, and one scan drives them all (`samplers.sample`).

Deterministic steps from a level t to a cleaner level s follow the same flow:
`x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) x_0`.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ldm_jax.diffusion.parameterization import PredictionName, SignalName, reading_of
from ldm_jax.diffusion.schedules import Level
from ldm_jax.diffusion.timesteps import Levels


class Table(NamedTuple):
    """A sampler of n network calls, r latents (registers) and k remembered signals.

    The network is asked at the first register. A row's terms are the registers, then
    the signals, the newest first; every new register is a weighted sum of them.
    """

    step: Int[Any, " n"]
    """Which step each call belongs to, from 0."""
    t: Float[Any, " n"]
    """What the network is asked at."""
    ratio: Float[Any, " n"]
    """Noise-to-signal ratio sigma / alpha there."""
    read: Float[Any, "n 2"]
    """Weights of `x_t` and of the network's output in the signal."""
    mix: Float[Any, "n r terms"]
    """Weights of the terms in each new register."""
    noise: Float[Any, "n r"]
    """Weight of fresh unit-variance noise in each new register."""
    alpha: Float[Any, "n r"]
    """Weight of the clean latent in each new register."""
    sigma: Float[Any, "n r"]
    """Weight of the noise in it."""

    @property
    def num_calls(self) -> int:
        """Network calls of a sample."""
        return self.t.shape[0]

    @property
    def num_registers(self) -> int:
        """Latents it goes on with."""
        return self.mix.shape[1]

    @property
    def num_signals(self) -> int:
        """Signals it remembers, the newest included."""
        return self.mix.shape[2] - self.num_registers


class Padded(NamedTuple):
    """A table filled up to the shape of a longer one."""

    table: Table
    """Its rows first, then others that nothing reads."""
    live: Bool[Any, " n"]
    """Whether each network call takes place."""


class Row(NamedTuple):
    """One network call, before it is tabulated."""

    at: int
    """Index of the level the network is asked at."""
    to: tuple[int, ...]
    """Index of the level of each new register."""
    mix: tuple[tuple[float, ...], ...]
    """Weights of the terms in each new register; short rows are filled with 0."""
    step: int
    """Which step it belongs to."""
    noise: float = 0.0
    """Weight of fresh noise in the first register."""


def tabulate(
    rows: list[Row],
    levels: Levels,
    signal: SignalName,
    *,
    prediction: PredictionName,
    sigma_data: float,
) -> Table:
    """Turn rows into arrays.

    Args:
      rows: The network calls, in order.
      levels: What their indices mean.
      signal: What is read out of the network's answers.
      prediction: What the network predicts.
      sigma_data: Standard deviation of the clean latents, for EDM's F.

    Returns:
      The table.
    """
    at = np.asarray([row.at for row in rows])
    to = np.asarray([row.to for row in rows])
    num_registers = to.shape[1]
    num_terms = max(len(weights) for row in rows for weights in row.mix)
    mix = np.zeros((len(rows), num_registers, num_terms))
    for i, row in enumerate(rows):
        for j, weights in enumerate(row.mix):
            mix[i, j, : len(weights)] = weights
    noise = np.zeros((len(rows), num_registers))
    noise[:, 0] = [row.noise for row in rows]
    level = Level(levels.t[at], levels.alpha[at], levels.sigma[at])
    read = reading_of(signal, level, prediction=prediction, sigma_data=sigma_data)
    with np.errstate(divide="ignore"):
        ratio = level.sigma / level.alpha
    return Table(
        step=np.asarray([row.step for row in rows]),
        t=level.t,
        ratio=ratio,
        read=np.stack(read, axis=-1),
        mix=mix,
        noise=noise,
        alpha=levels.alpha[to],
        sigma=levels.sigma[to],
    )


def pad(table: Table, *, num_calls: int, num_signals: int) -> Padded:
    """Fill a table up to the shape of a longer one, so that one program runs both.

    The calls that are added are not live: the scan passes them by, the network is not
    asked, and nothing changes. Signals that are added have weight 0.

    Args:
      table: Of NumPy arrays.
      num_calls: Network calls of the longer one.
      num_signals: Signals that it remembers.

    Returns:
      The filled table, and which of its calls are live.

    Raises:
      ValueError: If the table is the longer one.
    """
    more = num_calls - table.num_calls
    if more < 0 or num_signals < table.num_signals:
        raise ValueError(
            f"table: got {table.num_calls} calls of {table.num_signals} signals, "
            f"wanted at most {num_calls} of {num_signals}"
        )
    unread = ((0, 0), (0, 0), (0, num_signals - table.num_signals))
    table = table._replace(mix=np.pad(table.mix, unread))
    # With the last row again, in which no number is strange.
    filled = (
        np.pad(leaf, [(0, more)] + [(0, 0)] * (leaf.ndim - 1), mode="edge")
        for leaf in table
    )
    return Padded(Table(*filled), np.arange(num_calls) < table.num_calls)


def towards_clean(levels: Levels, here: int, there: int) -> tuple[float, float]:
    """Return the weights of `x_t` and the clean latent in a step of the flow.

    Source:
      Song et al., DDIM, arXiv:2010.02502, eq. 12 with sigma 0.
    """
    kept = levels.sigma[there] / levels.sigma[here]
    return kept, levels.alpha[there] - levels.alpha[here] * kept


def slope_of(levels: Levels) -> SignalName:
    """Return the signal that is the slope of the flow in its time: `along_time`."""
    return "flow" if levels.straight else "eps"


def along_time(levels: Levels, here: int, there: int) -> tuple[float, float]:
    """Return the weights of `x_t` and of the slope in a step of the flow, either way.

    The slope is the noise where time is `sigma / alpha` (Karras et al., EDM), and
    `eps - x_0` where it is `sigma / (alpha + sigma)` (rectified flow).
    """
    old = levels.alpha[here] + levels.sigma[here] * levels.straight
    new = levels.alpha[there] + levels.sigma[there] * levels.straight
    return new / old, levels.sigma[there] - levels.sigma[here] * new / old
