"""A stage of numbers that are exact in any order of summation, without networks.

Its parameters depend on every bit of every random draw: noise, times, dropped
conditions and the images. Equal digests mean equal draws.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from ldm_jax.build import open_iterator
from ldm_jax.config import CheckpointConfig, LogConfig, ParallelConfig
from ldm_jax.diffusion.schedules import draw_levels, make_schedule
from ldm_jax.parallel.make_layout import make_layout
from ldm_jax.parallel.multihost import stop_signal
from ldm_jax.parallel.reduce import BatchGradients
from ldm_jax.rng import Stream, example_keys, normal, root_key, uniform
from ldm_jax.training.diffusion_step import DiffusionMetrics
from ldm_jax.training.loop import LoopConfig, Stage, run_stage
from ldm_jax.training.state import TrainState
from tests.support.tiny import get_config

SCHEDULE = make_schedule(
    "ldm_linear",
    num_timesteps=1000,
    beta_start=0.0015,
    beta_end=0.0195,
    zero_terminal_snr=False,
)
BATCH = 8


def bits_of(bits):
    """Return twelve bits of every number, so that sums over a batch are exact."""
    return (jax.lax.bitcast_convert_type(bits, jnp.uint32) >> 11 & 0xFFF).astype("f4")


def toy_step(state, frozen, batch, root, *, reduce, nan_at=()):
    def gradient_fn(state, frozen, batch, root, *, axis_name):
        def keys(stream):
            return example_keys(root, stream, state.step, batch.example_index)

        noise = bits_of(normal(keys(Stream.NOISE), (2, 2, 2))).sum((1, 2, 3))
        times = draw_levels(SCHEDULE, keys(Stream.TIMESTEP)).t.astype(jnp.float32)
        dropped = bits_of(uniform(keys(Stream.CONDITION_DROPOUT)))
        pictures = batch.image.astype(jnp.float32).sum((1, 2, 3))
        rows = jnp.stack([noise, times, dropped, pictures]) / 2**16
        means = rows.mean(axis=1)
        for bad in nan_at:
            means = jnp.where(state.step == bad, jnp.nan, means)
        gradient = jnp.concatenate([means, jnp.full(4, 0.5 * means.sum())])
        broadcast = functools.partial(jnp.broadcast_to, gradient)
        gradients = jax.tree.map(lambda w: broadcast(w.shape), state.params)
        return BatchGradients(gradients, (means, gradient))

    reduced = reduce(gradient_fn, state, frozen, batch, root)
    means, gradient = reduced.means
    params = jax.tree.map(lambda w, g: w - g / 64, state.params, reduced.gradients)
    ema = jax.tree.map(lambda old, new: 0.5 * (old + new), state.ema, params)
    # Read the state as an optimiser does: unread arrays are not donated.
    last = jnp.where(state.step < 0, state.opt_state["last"], gradient)
    state = TrainState(state.step + 1, params, ema, {"last": last})
    return state, DiffusionMetrics(means.sum(), means[0])


def toy_state():
    # Noise cannot be compressed: a checkpoint has it in files of the process that
    # wrote it, where zeros would fit into the index that all processes read.
    noise = jax.random.bits(root_key(0), (64, 16, 8)) >> 20
    params = {"w": noise.astype(jnp.float32) / 2**12, "b": jnp.zeros(8)}
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, {"last": jnp.zeros(8)})


def toy_stage(*, num_steps=12, nan_at=(), drawn=None):
    def draw(ema, step):
        if drawn is not None:
            drawn.append(step)

    return Stage(
        name="diffusion",
        num_steps=num_steps,
        batch_size=BATCH,
        step=functools.partial(toy_step, nan_at=nan_at),
        init=toy_state,
        frozen=None,
        extra={"latent_scale": jnp.float32(1.0)},
        learning_rate=lambda step: 0.01,
        draw=draw,
    )


def run_toy(workdir, stage, *, parallel=None, devices=None, stop=None, **settings):
    """Run the toy stage, or resume it; return the result of the stage."""
    parallel = parallel or ParallelConfig()
    layout = make_layout(parallel, devices)
    Path(workdir).mkdir(exist_ok=True)
    config = get_config()
    settings = {
        "checkpoint": CheckpointConfig(every=stage.num_steps // 3, keep=3),
        "log": LogConfig(every=2, images_every=100),
        **settings,
    }

    def go(stop):
        return run_stage(
            stage,
            loop_config=LoopConfig(Path(workdir), parallel=parallel, **settings),
            layout=layout,
            iterator=open_iterator(config, batch_size=stage.batch_size, layout=layout),
            root_key=root_key(0),
            notes={},
            stop=stop,
        )

    if stop is not None:
        return go(stop)
    with stop_signal() as signal:
        return go(signal)
