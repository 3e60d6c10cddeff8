"""Every sampler as a table: what becomes of each answer of the network.

Samplers of diffusion models differ in nothing but numbers. Each asks the network at a
known level, reads one signal out of the answer (the clean latent, the noise or the
flow), and goes on with a weighted sum of what it has: one or two latents, the last few
signals, fresh noise. So a sampler is a `Table` of those weights, worked out in float64
before the network runs, and one scan drives them all (`sampling.sample`).

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
    def num_terms(self) -> int:
        """Terms of a sum: the registers, then the signals."""
        return self.mix.shape[2]

    @property
    def num_signals(self) -> int:
        """Signals it remembers, the newest included."""
        return self.mix.shape[2] - self.num_registers


MOST_REGISTERS = 2
MOST_SIGNALS = 5
"""PLMS remembers the first step's second slope and four others."""
MOST_CALLS_PER_STEP = 2
BLOCK = 32
"""Network calls that the scan passes by at once where none of them takes place."""


class Padded(NamedTuple):
    """A table in the one shape that holds those of all samplers, call by call."""

    table: Table
    """Its rows first, then others that nothing reads."""
    live: Bool[Any, " n"] | None
    """Whether each network call takes place; None where all do."""
    two: Bool[Any, " n"] | None
    """Whether the sampler has two registers; with one, its signals come second. None
    where the table has its own shape."""
    slot: Int[Any, " n"] | None
    """The frame in which the result of each call is kept; None where none are."""


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


def pad(table: Table, *, max_steps: int, num_frames: int = 0) -> Padded:
    """Fill a table up to a shape that depends on the number of steps alone.

    One compiled program then runs every sampler: the calls that are added are not live,
    the scan passes them by, and the terms that are added have weight 0.

    Args:
      table: A sampler, of NumPy arrays.
      max_steps: The most steps that the program can make.
      num_frames: Frames that the program keeps.

    Raises:
      ValueError: If the table has more calls than so many steps make.
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
        # With the last row again, in which no number is strange.
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
    """Return a table of its own shape in the form of a padded one."""
    slot = frame_slots(table.step, num_frames) if num_frames else None
    return Padded(table, live=None, two=None, slot=slot)


def frame_slots(step: Int[np.ndarray, " n"], num_frames: int) -> np.ndarray:
    """Return in which frame the result of each network call is kept.

    Args:
      step: Step of each call, rising from 0.
      num_frames: Frames, at least 2, the start (slot 0) among them.

    Returns:
      A slot per call, int32. Calls that share a slot overwrite each other in order, so
      that the last slot ends with the last call; memory stays `num_frames` latents
      whatever the number of steps.
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
