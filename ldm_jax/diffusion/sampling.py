"""Reverse diffusion: the one scan that drives every sampler."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ldm_jax.diffusion.guidance import Call, Predictor
from ldm_jax.diffusion.solvers import Table
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
    table: Table,
    live: Bool[Any, " n"] | None = None,
    known: Known | None = None,
    num_frames: int = 0,
) -> Trajectory:
    """Run a sampler as one `lax.scan`.

    Image i depends on start i, key i, condition i and the network alone. Memory does
    not depend on the number of steps. Calls that are not live take no time.

    Args:
      predict: The network, guided or not.
      x_start: Latents at the first level, what is known included.
      keys: One per image, for the noise on the way.
      cond: Condition of each image.
      table: The sampler, its levels, and what the network predicts. Its arrays may be
        traced, but for `step` where frames are kept.
      live: Whether each call takes place, see `tables.pad`; None where all do.
      known: What is not to change; None makes everything.
      num_frames: Frames to keep, at most one more than there are steps. Static.

    Returns:
      The latents at the end and the kept frames.

    Source:
      Lugmayr et al., RePaint, arXiv:2201.09865, eq. 8 (known parts).
    """
    rows = jax.tree.map(jnp.asarray, table)
    slots = jnp.zeros(table.num_calls, jnp.int32)
    if num_frames:
        slots = jnp.asarray(frame_slots(np.asarray(table.step), num_frames))
    frames = jnp.zeros((num_frames, *x_start.shape), x_start.dtype)
    if num_frames:
        frames = frames.at[0].set(x_start)
    start = State(
        registers=(x_start,) * table.num_registers,
        signals=(jnp.zeros_like(x_start),) * (table.num_signals - 1),
        frames=frames,
    )
    may_draw = not isinstance(table.noise, np.ndarray) or bool(table.noise.any())

    def body(
        state: State, xs: tuple[Int[Array, ""], Int[Array, ""], Table]
    ) -> tuple[State, None]:
        index, slot, row = xs
        x_t = state.registers[0]
        output = predict(x_t, Call(index, row.t), cond)
        signal = row.read[0] * x_t + row.read[1] * output
        signals = (signal, *state.signals)
        registers = _mix((*state.registers, *signals), row)
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
            frames = frames.at[slot].set(registers[0])
        return State(tuple(registers), signals[:-1], frames), None

    def body_if_live(
        state: State, xs: tuple[Bool[Array, ""], PyTree]
    ) -> tuple[State, None]:
        return jax.lax.cond(xs[0], body, lambda state, _: (state, None), state, xs[1])

    xs = (jnp.arange(table.num_calls), slots, rows)
    if live is None:
        end, _ = jax.lax.scan(body, start, xs)
    else:
        end, _ = jax.lax.scan(body_if_live, start, (jnp.asarray(live), xs))
    return Trajectory(end.registers[0], end.frames)


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


def frame_slots(step: Int[np.ndarray, " n"], num_frames: int) -> np.ndarray:
    """Say in which frame the result of each network call is kept.

    Args:
      step: Step of each call, rising from 0.
      num_frames: Frames, the start (slot 0) among them; 0 keeps none.

    Returns:
      A slot per call, int32. Calls that share a slot overwrite each other in order, so
      that the last slot ends with the last call; memory stays `num_frames` latents
      whatever the number of steps.
    """
    done = step + 1
    return np.ceil(done * max(num_frames - 1, 0) / done[-1]).astype(np.int32)
