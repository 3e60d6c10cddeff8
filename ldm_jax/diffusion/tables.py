"""Samplers as tables of coefficients.

A sampler evaluates the network at a known level, computes one signal from its output
(the clean latent, the noise or the flow), and continues with a weighted sum of one or
two latents, the last few signals and new noise. So a sampler is a `Table` of those
weights, computed in float64 before the network runs, and one scan runs them all
(`sampling.sample`).

Deterministic steps from a level t to a cleaner level s have the form
`x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) x_0`.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ldm_jax.diffusion.parameterization import PredictionName, SignalName, reading_of
from ldm_jax.diffusion.schedules import Level
from ldm_jax.diffusion.timesteps import Levels


class Table(NamedTuple):
    """A sampler with n network calls, r latents (registers) and k stored signals.

    The network is evaluated at the first register. The terms of a sum are the
    registers, then the signals, newest first; every new register is a weighted sum.
    """

    step: Int[Any, " n"]
    """Step of each call, from 0."""
    t: Float[Any, " n"]
    """Time input of the network."""
    ratio: Float[Any, " n"]
    """Noise-to-signal ratio sigma / alpha at the call."""
    read: Float[Any, "n 2"]
    """Weights of `x_t` and of the network's output in the signal."""
    mix: Float[Any, "n r terms"]
    """Weights of the terms in each new register."""
    noise: Float[Any, "n r"]
    """Weight of new unit-variance noise in each new register."""
    alpha: Float[Any, "n r"]
    """Weight of the clean latent in each new register's level."""
    sigma: Float[Any, "n r"]
    """Weight of the noise in each new register's level."""

    @property
    def num_calls(self) -> int:
        """Network calls of a sample."""
        return self.t.shape[0]

    @property
    def num_registers(self) -> int:
        """Number of registers."""
        return self.mix.shape[1]

    @property
    def num_terms(self) -> int:
        """Number of registers and signals."""
        return self.mix.shape[2]

    @property
    def num_signals(self) -> int:
        """Number of signals, with the newest."""
        return self.mix.shape[2] - self.num_registers


MOST_REGISTERS = 2
MOST_SIGNALS = 5
"""PLMS stores the second slope of its first step and four others."""
MOST_CALLS_PER_STEP = 2
BLOCK = 32
"""Network calls that the scan skips at once if none is live."""


class Padded(NamedTuple):
    """A table padded to a shape that all samplers share."""

    table: Table
    """Rows of the sampler, then unused rows."""
    live: Bool[Any, " n"] | None
    """Whether each network call is made; None if all are."""
    two: Bool[Any, " n"] | None
    """Whether the sampler has two registers; with one, the signals follow it. None for
    an unpadded table."""
    slot: Int[Any, " n"] | None
    """Frame that stores the result of each call; None without frames."""


class Row(NamedTuple):
    """One network call of a sampler."""

    at: int
    """Index of the level of the call."""
    to: tuple[int, ...]
    """Index of the level of each new register."""
    mix: tuple[tuple[float, ...], ...]
    """Weights of the terms in each new register; short rows are filled with 0."""
    step: int
    """Step of the call."""
    noise: float = 0.0
    """Weight of new noise in the first register."""


def tabulate(
    rows: list[Row],
    levels: Levels,
    signal: SignalName,
    *,
    prediction: PredictionName,
    sigma_data: float,
) -> Table:
    """Convert rows to a table.

    Args:
      rows: Network calls in order.
      levels: Noise levels that the rows index.
      signal: Signal that is computed from the network's outputs.
      prediction: Prediction of the network.
      sigma_data: Standard deviation of the clean latents, for EDM's F.
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


def pad(table: Table, *, max_steps: int, num_frames: int = 0) -> Padded:
    """Pad a table to a shape that depends on the largest number of steps alone.

    One compiled program then runs every sampler: added calls are not live, and added
    terms have weight 0.

    Args:
      table: A sampler, as NumPy arrays.
      max_steps: Largest number of steps of the program.
      num_frames: Intermediate latents of the program.

    Raises:
      ValueError: If the table has more calls than `max_steps` allow.
    """
    most = MOST_CALLS_PER_STEP * max_steps
    if table.num_calls > most:
        raise ValueError(
            f"steps: got {table.num_calls} network calls, wanted at most {most}"
        )
    num_rows = -(-most // BLOCK) * BLOCK
    num_terms = MOST_REGISTERS + MOST_SIGNALS
    registers = MOST_REGISTERS - table.num_registers
    wide = table._replace(
        mix=np.pad(
            table.mix, [(0, 0), (0, registers), (0, num_terms - table.num_terms)]
        ),
        noise=np.pad(table.noise, [(0, 0), (0, registers)]),
        alpha=np.pad(table.alpha, [(0, 0), (0, registers)], mode="edge"),
        sigma=np.pad(table.sigma, [(0, 0), (0, registers)], mode="edge"),
    )

    def longer(leaf: np.ndarray) -> np.ndarray:
        # Repeat the last row, whose numbers are finite.
        more = [(0, num_rows - len(leaf))] + [(0, 0)] * (leaf.ndim - 1)
        return np.pad(leaf, more, mode="edge")

    slots = frame_slots(table.step, num_frames) if num_frames else table.step
    return Padded(
        table=Table(*map(longer, wide)),
        live=np.arange(num_rows) < table.num_calls,
        two=np.full(num_rows, table.num_registers == MOST_REGISTERS),
        slot=longer(slots) if num_frames else None,
    )


def unpadded(table: Table, *, num_frames: int = 0) -> Padded:
    """Wrap a table without padding it."""
    slot = frame_slots(table.step, num_frames) if num_frames else None
    return Padded(table, live=None, two=None, slot=slot)


def frame_slots(step: Int[np.ndarray, " n"], num_frames: int) -> np.ndarray:
    """Return the frame that stores the result of each network call, int32.

    Calls with the same frame overwrite each other in order, so that the last frame
    holds the last call.

    Args:
      step: Step of each call, rising from 0.
      num_frames: Number of frames, at least 2; the start is frame 0.
    """
    done = step + 1
    return np.ceil(done * (num_frames - 1) / done[-1]).astype(np.int32)


def towards_clean(levels: Levels, here: int, there: int) -> tuple[float, float]:
    """Return the weights of `x_t` and the clean latent in a step of the flow.

    Source:
      Song et al., DDIM, arXiv:2010.02502, eq. 12 with sigma 0.
    """
    kept = levels.sigma[there] / levels.sigma[here]
    return kept, levels.alpha[there] - levels.alpha[here] * kept


def slope_of(levels: Levels) -> SignalName:
    """Return the signal that is the slope of the flow in the time of `along_time`."""
    return "flow" if levels.straight else "eps"


def along_time(levels: Levels, here: int, there: int) -> tuple[float, float]:
    """Return the weights of `x_t` and the slope in a step of the flow, up or down.

    The slope is the noise for the time `sigma / alpha` (Karras et al., EDM), and
    `eps - x_0` for `sigma / (alpha + sigma)` (rectified flow).
    """
    old = levels.alpha[here] + levels.sigma[here] * levels.straight
    new = levels.alpha[there] + levels.sigma[there] * levels.straight
    return new / old, levels.sigma[there] - levels.sigma[here] * new / old
