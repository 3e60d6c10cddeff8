"""From a config to everything it names; the only file that chooses by name."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from ldm_jax import config as config_lib
from ldm_jax.config import Config
from ldm_jax.data.pipeline import (
    Batch,
    BatchIterator,
    load_all,
    make_iterator,
    to_batch,
)
from ldm_jax.data.sources import Source, Split, open_source
from ldm_jax.diffusion.schedules import make_schedule
from ldm_jax.generate import Networks, SampleParams, make_sample_fn
from ldm_jax.images import grid, to_float, to_uint8, write_png
from ldm_jax.nn.autoencoder import Autoencoder
from ldm_jax.nn.unet import UNet
from ldm_jax.rng import Stream, image_keys, root_key, stream_key
from ldm_jax.training.autoencoder_step import autoencoder_step, latent_moments
from ldm_jax.training.diffusion_step import FirstStage, diffusion_step
from ldm_jax.training.loop import Stage
from ldm_jax.training.parallel import PmapLayout
from ldm_jax.training.state import (
    TrainState,
    init_state,
    learning_rate_schedule,
    make_optimizer,
)
from ldm_jax.types import InputError, PyTree

GRID_SEEDS = 4
GRID_CLASSES = 10
NUM_RECONSTRUCTIONS = 16
GRID_COLUMNS = 8


def build_networks(config: Config) -> Networks:
    """Build both networks, unbound, and the schedule."""
    first, second = config.autoencoder, config.diffusion
    autoencoder = Autoencoder(
        channels=first.channels,
        channel_multipliers=first.channel_multipliers,
        num_res_blocks=first.num_res_blocks,
        attention_resolutions=first.attention_resolutions,
        mid_attention=first.mid_attention,
        latent_channels=first.latent_channels,
        image_channels=config.data.image_channels,
        num_groups=first.num_groups,
        dtype=jnp.dtype(first.dtype),
    )
    unet = UNet(
        out_channels=first.latent_channels,
        channels=second.channels,
        channel_multipliers=second.channel_multipliers,
        num_res_blocks=second.num_res_blocks,
        attention_downsampling=second.attention_downsampling,
        num_heads=second.num_heads,
        num_classes=config.data.num_classes,
        num_groups=second.num_groups,
        dtype=jnp.dtype(second.dtype),
    )
    schedule = make_schedule(
        second.schedule,
        num_timesteps=second.num_timesteps,
        beta_start=second.beta_start,
        beta_end=second.beta_end,
    )
    return Networks(
        autoencoder=autoencoder,
        unet=unet,
        schedule=schedule,
        latent_shape=config.latent_shape,
        num_classes=config.data.num_classes,
        chunk=config.sampling.chunk,
    )


def init_autoencoder(config: Config, networks: Networks) -> PyTree:
    """Draw the first stage's parameters from the run's root key."""
    data = config.data
    image = jnp.zeros((1, data.image_size, data.image_size, data.image_channels))
    noise = jnp.zeros((1, *networks.latent_shape))
    key = stream_key(root_key(config.seed), Stream.INIT_AUTOENCODER)
    return jax.jit(networks.autoencoder.init)(key, image, noise)["params"]


def init_unet(config: Config, networks: Networks) -> PyTree:
    """Draw the second stage's parameters from the run's root key."""
    latent = jnp.zeros((1, *networks.latent_shape))
    zero = jnp.zeros((1,), jnp.int32)
    key = stream_key(root_key(config.seed), Stream.INIT_UNET)
    return jax.jit(networks.unet.init)(key, latent, zero, zero)["params"]


def open_split(config: Config, split: Split) -> Source:
    """Open a split and check that it is what the config says.

    Raises:
      InputError: If classes, channels or the number of examples differ.
    """
    data = config.data
    source = open_source(data.source, split, directory=data.directory)
    found = {"num_classes": source.num_classes}
    if split == "train":
        found["num_train_examples"] = len(source.examples)
    for name, value in found.items():
        if getattr(data, name) != value:
            raise InputError(
                f"data.{name}: got {getattr(data, name)}, but {data.source} has {value}"
            )
    return source


def open_iterator(
    config: Config, *, batch_size: int, layout: PmapLayout
) -> BatchIterator:
    """Open this process' part of the endless training stream, at its start."""
    return make_iterator(
        open_split(config, "train").examples,
        batch_size=batch_size,
        image_size=config.data.image_size,
        image_channels=config.data.image_channels,
        seed=config.seed,
        process_index=layout.process_index,
        process_count=layout.process_count,
    )


def load_split(config: Config, split: Split, *, limit: int | None = None) -> Batch:
    """Load a split, or its first `limit` examples, as the run sees its images."""
    examples = open_split(config, split).examples
    return load_all(
        examples,
        image_size=config.data.image_size,
        image_channels=config.data.image_channels,
        limit=limit,
    )


def autoencoder_stage(config: Config, networks: Networks, workdir: Path) -> Stage:
    """Build stage 1."""
    settings = config.autoencoder
    optimizer = make_optimizer(settings.optim, num_steps=settings.steps)
    step = functools.partial(
        autoencoder_step,
        autoencoder=networks.autoencoder,
        optimizer=optimizer,
        latent_shape=networks.latent_shape,
        reconstruction_loss=settings.reconstruction_loss,
        kl_weight=settings.kl_weight,
        ema_decay=settings.optim.ema_decay,
    )
    reconstruct = make_reconstruct(networks)

    def draw(state: TrainState, step_number: int) -> None:
        images = load_split(config, "test", limit=NUM_RECONSTRUCTIONS).image
        outputs = reconstruct(state.ema, images)
        rows = [
            part[i : i + GRID_COLUMNS]
            for i in range(0, len(images), GRID_COLUMNS)
            for part in (images, outputs)
        ]
        name = f"reconstructions_{step_number:06d}.png"
        picture = grid(np.concatenate(rows), columns=GRID_COLUMNS)
        write_png(workdir / "autoencoder" / name, picture)

    return Stage(
        name="autoencoder",
        num_steps=settings.steps,
        batch_size=settings.batch_size,
        step=step,
        init=lambda: init_state(init_autoencoder(config, networks), optimizer),
        frozen=None,
        extra={},
        learning_rate=learning_rate_schedule(settings.optim, num_steps=settings.steps),
        draw=draw,
    )


def diffusion_stage(
    config: Config, networks: Networks, first_stage: FirstStage, workdir: Path
) -> Stage:
    """Build stage 2 on a finished stage 1."""
    settings = config.diffusion
    optimizer = make_optimizer(settings.optim, num_steps=settings.steps)
    step = functools.partial(
        diffusion_step,
        autoencoder=networks.autoencoder,
        unet=networks.unet,
        optimizer=optimizer,
        abar=jnp.asarray(networks.schedule.abar, jnp.float32),
        latent_shape=networks.latent_shape,
        null_cond=networks.num_classes,
        condition_dropout=settings.condition_dropout,
        ema_decay=settings.optim.ema_decay,
    )
    sample_fn = make_sample_fn(
        networks, sampler="ddim", num_steps=config.sampling.grid_steps
    )
    classes = list(range(min(networks.num_classes, GRID_CLASSES)))

    def draw(state: TrainState, step_number: int) -> None:
        params = SampleParams(first_stage.params, state.ema, first_stage.latent_scale)
        samples = sample_fn(
            params,
            image_keys([seed for seed in range(GRID_SEEDS) for _ in classes]),
            jnp.asarray(classes * GRID_SEEDS),
            config.sampling.grid_guidance_scale,
            0.0,
        )
        name = f"samples_{step_number:06d}.png"
        picture = grid(to_uint8(np.asarray(samples.images)), columns=len(classes))
        write_png(workdir / "diffusion" / name, picture)

    return Stage(
        name="diffusion",
        num_steps=settings.steps,
        batch_size=settings.batch_size,
        step=step,
        init=lambda: init_state(init_unet(config, networks), optimizer),
        frozen=first_stage,
        extra={"latent_scale": first_stage.latent_scale},
        learning_rate=learning_rate_schedule(settings.optim, num_steps=settings.steps),
        draw=draw,
    )


def measure_latent_scale(
    config: Config, networks: Networks, params: PyTree, layout: PmapLayout
) -> Float[Array, ""]:
    """Measure one over the standard deviation of the sampled latents.

    Over `autoencoder.scale_batches` batches and all devices; the first-batch estimate
    of the original code is not repeatable on several devices.

    Args:
      config: The run's.
      networks: The run's.
      params: The first stage's averaged parameters.
      layout: Where to compute.

    Returns:
      The scale, float32.

    Source:
      Rombach et al., arXiv:2112.10752, app. G ("component-wise variance").
    """
    batch_size = config.autoencoder.batch_size
    iterator = open_iterator(config, batch_size=batch_size, layout=layout)
    step = layout.map_step(
        functools.partial(
            latent_moments,
            autoencoder=networks.autoencoder,
            latent_shape=networks.latent_shape,
        )
    )
    state, key = layout.replicate(params), layout.replicate(root_key(config.seed))
    rows = []
    try:
        for _ in range(config.autoencoder.scale_batches):
            batch = layout.split(to_batch(next(iterator)))
            state, moments = step(state, None, batch, key)
            rows.append(jax.device_get(layout.local(moments)))
    finally:
        iterator.close()
    mean, mean_square = np.asarray(rows, np.float64).mean(axis=0)
    return jnp.asarray(1.0 / np.sqrt(mean_square - mean**2), jnp.float32)


def make_reconstruct(
    networks: Networks,
) -> Callable[[PyTree, UInt8[np.ndarray, "b h w c"]], UInt8[np.ndarray, "b h w c"]]:
    """Make a function from uint8 images to their reconstructions, by the mode."""

    @jax.jit
    def run(params: PyTree, images: UInt8[Array, "b h w c"]) -> Array:
        def through(autoencoder: Autoencoder, x: Array) -> Array:
            return autoencoder.decode(autoencoder.encode(x).mean)

        variables = {"params": params}
        x = to_float(images)
        return cast(Array, networks.autoencoder.apply(variables, x, method=through))

    return lambda params, images: to_uint8(np.asarray(run(params, images)))


def check_batches(config: Config, layout: PmapLayout) -> None:
    """Raise `InputError` if a batch does not divide by the devices."""
    layout.check_batch_size(config.autoencoder.batch_size, "autoencoder.batch_size")
    layout.check_batch_size(config.diffusion.batch_size, "diffusion.batch_size")


def describe(config: Config, layout: PmapLayout) -> dict[str, Any]:
    """Build everything by shape only and say how large it is.

    Args:
      config: Of the run.
      layout: The devices it would run on.

    Returns:
      JSON-compatible: digest of the config, parameters by network, bytes of state by
      stage, batch per device and steps per epoch by stage.

    Raises:
      InputError: If a batch does not divide by the devices.
    """
    check_batches(config, layout)
    networks = build_networks(config)
    data, nowhere = config.data, Path()
    first = autoencoder_stage(config, networks, nowhere)
    first_state = jax.eval_shape(first.init)
    frozen = FirstStage(first_state.ema, shape_of((), jnp.float32))
    second_stage = diffusion_stage(config, networks, frozen, nowhere)
    second_state = jax.eval_shape(second_stage.init)
    stages = (first, first_state, None), (second_stage, second_state, frozen)
    report: dict[str, Any] = {
        "digest": config_lib.digest(config),
        "parameters": {
            "autoencoder": _count(first_state.params),
            "unet": _count(second_state.params),
        },
        "state_bytes": {},
        "batch_per_device": {},
        "steps_per_epoch": {},
    }
    for stage, state, stage_frozen in stages:
        local = stage.batch_size // layout.num_devices
        image = (local, data.image_size, data.image_size, data.image_channels)
        batch = Batch(
            shape_of(image, jnp.uint8),
            shape_of((local,), jnp.int32),
            shape_of((local,), jnp.uint32),
        )
        step = functools.partial(stage.step, axis_name=None)
        key = jax.eval_shape(lambda: root_key(0))
        jax.eval_shape(step, state, stage_frozen, batch, key)
        report["state_bytes"][stage.name] = _bytes(state)
        report["batch_per_device"][stage.name] = local
        report["steps_per_epoch"][stage.name] = (
            data.num_train_examples // stage.batch_size
        )
    return report


def shape_of(shape: tuple[int, ...], dtype: Any) -> Any:
    """Stand for an array where only its shape is asked for."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _count(params: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
