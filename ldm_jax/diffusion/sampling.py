"""Reverse diffusion: one scan that runs every sampler."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ldm_jax.diffusion.guidance import Call, Predictor
from ldm_jax.diffusion.tables import BLOCK, Padded, Table, unpadded
from ldm_jax.rng import Stream, image_step_keys, normal
from ldm_jax.types import PyTree


class Trajectory(NamedTuple):
    """Result of a sampler."""

    x_0: Float[Array, "b h w c"]
    """Latents at the last level, which is clean for all spacings but `ldm`."""
    frames: Float[Array, "f b h w c"]
    """Intermediate latents from the start to `x_0`; empty if none were requested."""


class Known(NamedTuple):
    """Known part of an image, which sampling must not change."""

    x_0: Float[Array, "b h w c"]
    """Clean latents."""
    eps: Float[Array, "b h w c"]
    """Noise that is added to them, the same at every level."""
    free: Float[Array, "b h w 1"]
    """1 where the image is sampled, 0 where it is known."""


class State(NamedTuple):
    """Carry of the scan."""

    registers: tuple[Float[Array, "b h w c"], ...]
    """Latents; the network is evaluated at the first."""
    signals: tuple[Float[Array, "b h w c"], ...]
    """Last signals, newest first."""
    frames: Float[Array, "f b h w c"]
    """Intermediate latents."""


def starting_noise(
    keys: Key[Array, " b"], shape: tuple[int, int, int]
) -> Float[Array, "b h w c"]:
    """Draw the initial noise of each image; noise i depends on key i alone."""
    return normal(image_step_keys(keys, Stream.SAMPLE_START), shape)


def sample(
    predict: Predictor,
    x_start: Float[Array, "b h w c"],
    keys: Key[Array, " b"],
    cond: PyTree,
    *,
    table: Table | Padded,
    known: Known | None = None,
    num_frames: int = 0,
) -> Trajectory:
    """Run a sampler as one `lax.scan`.

    Image i depends on start i, key i, condition i and the network alone. Memory does
    not depend on the number of steps. Calls that are not live are skipped.

    Args:
      predict: The network, guided or not.
      x_start: Latents at the first level, with known parts.
      keys: One key for each image, for noise during sampling.
      cond: Condition of each image.
      table: The sampler; the arrays of a padded table may be traced.
      known: Known part of the images; None for none.
      num_frames: Intermediate latents to return, at most the number of steps plus 1; of
        a padded table, the number that it was padded for. Static.

    Source:
      Lugmayr et al., RePaint, arXiv:2201.09865, eq. 8 (known parts).
    """
    if not isinstance(table, Padded):
        table = unpadded(table, num_frames=num_frames)
    frames = jnp.zeros((num_frames, *x_start.shape), x_start.dtype)
    if num_frames:
        frames = frames.at[0].set(x_start)
    start = State(
        registers=(x_start,) * table.table.num_registers,
        signals=(jnp.zeros_like(x_start),) * (table.table.num_signals - 1),
        frames=frames,
    )
    noise_weights = table.table.noise
    may_draw = not isinstance(noise_weights, np.ndarray) or bool(noise_weights.any())

    def step(state: State, xs: tuple[Int[Array, ""], Padded]) -> tuple[State, None]:
        index, call = xs
        row, x_t = call.table, state.registers[0]
        output = predict(x_t, Call(index, row.t), cond)
        signal = row.read[0] * x_t + row.read[1] * output
        signals = (signal, *state.signals)
        registers = _mix(_terms(state.registers, signals, two=call.two), row)
        if may_draw:
            noise = _fresh_noise(keys, index, x_t, drawn=row.noise.any())
            registers = [x + row.noise[i] * noise for i, x in enumerate(registers)]
        if known is not None:
            registers = [
                keep_known(x, known, row.alpha[i], row.sigma[i])
                for i, x in enumerate(registers)
            ]
        frames = state.frames
        if num_frames:
            frames = frames.at[call.slot].set(registers[0])
        return State(tuple(registers), signals[:-1], frames), None

    xs = (jnp.arange(table.table.num_calls), jax.tree.map(jnp.asarray, table))
    scan = jax.lax.scan if table.live is None else _scan_live
    end, _ = scan(step, start, xs)
    return Trajectory(end.registers[0], end.frames)


def _scan_live(
    step: Callable[[State, PyTree], tuple[State, None]], start: State, xs: PyTree
) -> tuple[State, None]:
    """Scan over the live calls, and skip the others by blocks."""

    def unless(live: Bool[Array, ""], fn: Callable, state: State, xs: PyTree) -> State:
        return jax.lax.cond(live, lambda state: fn(state, xs)[0], lambda s: s, state)

    def call(state: State, xs: PyTree) -> tuple[State, None]:
        return unless(xs[1].live, step, state, xs), None

    def block(state: State, xs: PyTree) -> tuple[State, None]:
        several = functools.partial(jax.lax.scan, call)
        return unless(xs[1].live.any(), several, state, xs), None

    blocks = jax.tree.map(lambda x: x.reshape(-1, BLOCK, *x.shape[1:]), xs)
    return jax.lax.scan(block, start, blocks)


def _terms(
    registers: tuple[Float[Array, "b h w c"], ...],
    signals: tuple[Float[Array, "b h w c"], ...],
    *,
    two: Bool[Array, ""] | None,
) -> tuple[Float[Array, "b h w c"], ...]:
    """Return the terms of a sum in the order of the sampler's unpadded table.

    A sampler with one register has its signals after it. A second register of weight 0
    in between would change the last bits of the sum, because compilers fuse each
    product with the sum before it.
    """
    if two is None:
        return (*registers, *signals)
    first, second = registers
    pairs = zip((second, *signals), (*signals, second), strict=True)
    return (first, *(jnp.where(two, a, b) for a, b in pairs))


def _mix(
    terms: tuple[Float[Array, "b h w c"], ...], row: Table
) -> list[Float[Array, "b h w c"]]:
    """Sum weighted terms; not as a matrix product, which may round to bfloat16."""
    registers = []
    for weights in row.mix:
        first, *rest = (
            weight * term for weight, term in zip(weights, terms, strict=True)
        )
        registers.append(sum(rest, start=first))
    return registers


def _fresh_noise(
    keys: Key[Array, " b"],
    index: Int[Array, ""],
    like: Float[Array, "b h w c"],
    *,
    drawn: Array,
) -> Float[Array, "b h w c"]:
    """Draw the noise of a call, unless its weight is 0."""
    return jax.lax.cond(
        drawn,
        lambda: normal(
            image_step_keys(keys, Stream.SAMPLE_STEP, index), like.shape[1:]
        ),
        lambda: jnp.zeros_like(like),
    )


def keep_known(
    x: Float[Array, "b h w c"], known: Known, alpha: Array, sigma: Array
) -> Float[Array, "b h w c"]:
    """Replace the known part of latents by its noisy version.

    Source:
      Lugmayr et al., RePaint, arXiv:2201.09865, eq. 8.
    """
    return jnp.where(known.free == 1.0, x, alpha * known.x_0 + sigma * known.eps)
