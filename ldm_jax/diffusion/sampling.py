"""Reverse diffusion: the one scan that drives every sampler."""

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
    """What a sampler returns."""

    x_0: Float[Array, "b h w c"]
    """The latents at the end, clean unless the levels end before."""
    frames: Float[Array, "f b h w c"]
    """Latents on the way, `f` of them, the start first and `x_0` last; empty when none
    were asked for."""


class Known(NamedTuple):
    """What is already known of an image, and is not to change."""

    x_0: Float[Array, "b h w c"]
    """Its clean latents."""
    eps: Float[Array, "b h w c"]
    """The noise they are given at every level, so that they follow one path."""
    free: Float[Array, "b h w 1"]
    """1 where the image is to be made, 0 where it is known."""


class State(NamedTuple):
    """What the scan carries."""

    registers: tuple[Float[Array, "b h w c"], ...]
    """Latents; the network is asked at the first."""
    signals: tuple[Float[Array, "b h w c"], ...]
    """The last signals, the newest first."""
    frames: Float[Array, "f b h w c"]
    """Those kept so far."""


def starting_noise(
    keys: Key[Array, " b"], shape: tuple[int, int, int]
) -> Float[Array, "b h w c"]:
    """Draw the noise that an image is made from; noise i depends on key i alone."""
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
    not depend on the number of steps. Calls that are not live take no time.

    Args:
      predict: The network, guided or not.
      x_start: Latents at the first level, known parts included.
      keys: One per image, for the noise on the way.
      cond: Condition of each image.
      table: The sampler, its levels, and what the network predicts. Padded, its arrays
        may be traced.
      known: What is not to change; None makes everything.
      num_frames: Frames to keep, at most one more than there are steps; of a padded
        table, as many as it was padded for. Static.

    Returns:
      The latents at the end and the kept frames.

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
    """Scan over the live calls; pass by the others, a block at a time."""

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
    """Put the terms of a sum in the order of the sampler's own table.

    A sampler of one register has its signals next to it. The second register in between
    would have weight 0, and change the last bits of the sum all the same: a compiler
    fuses each product with the sum before it.
    """
    if two is None:
        return (*registers, *signals)
    first, second = registers
    pairs = zip((second, *signals), (*signals, second), strict=True)
    return (first, *(jnp.where(two, a, b) for a, b in pairs))


def _mix(
    terms: tuple[Float[Array, "b h w c"], ...], row: Table
) -> list[Float[Array, "b h w c"]]:
    """Sum weighted terms; written out, as a matrix product may round to bfloat16."""
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
    """Put what is known, at a noise level, over what was made.

    Source:
      Lugmayr et al., RePaint, arXiv:2201.09865, eq. 8.
    """
    return jnp.where(known.free == 1.0, x, alpha * known.x_0 + sigma * known.eps)
