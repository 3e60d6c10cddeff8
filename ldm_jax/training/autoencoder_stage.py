"""Stage 1, built: its step, its pictures, and the scale of its latents."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from ldm_jax.build import init_autoencoder, load_split, open_iterator
from ldm_jax.config import Config
from ldm_jax.data.pipeline import to_batch
from ldm_jax.files import write_json
from ldm_jax.images import grid, to_float, to_uint8, write_png
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.autoencoder import Autoencoder
from ldm_jax.models.discriminator_lpips import VGG_MIN_SIDE, Lpips, PatchDiscriminator
from ldm_jax.parallel.make_layout import Layout
from ldm_jax.parallel.multihost import first_alone, gather_texts
from ldm_jax.rng import Stream, root_key, stream_key
from ldm_jax.training.autoencoder_loss import Objective
from ldm_jax.training.autoencoder_step import autoencoder_step, latent_moments
from ldm_jax.training.gan_loss import Adversary
from ldm_jax.training.loop import Stage
from ldm_jax.training.state import (
    CriticState,
    TrainState,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    make_transformation,
)
from ldm_jax.types import InputError, PyTree, RunError

NUM_RECONSTRUCTIONS = 16
GRID_COLUMNS = 8
SCALE_FILE = "latent_scale.json"
MIN_CRITIC_SIDE = 3
"""Smallest map that the discriminator's last two layers make a logit of."""


def autoencoder_stage(
    config: Config, model: LatentDiffusion, workdir: Path, *, perceptual: PyTree = None
) -> Stage:
    """Build stage 1.

    Args:
      perceptual: What `load_perceptual` read. None stands for shapes, with which all
        can be done but train.

    Returns:
      The stage.

    Raises:
      InputError: If the images are too small for LPIPS or the adversary.
    """
    settings = config.autoencoder
    optimizer = make_optimizer(settings.optim, num_steps=settings.steps)
    adversary = build_adversary(config)
    step = functools.partial(
        autoencoder_step,
        autoencoder=model.autoencoder,
        optimizer=optimizer,
        latent_shape=model.latent_shape,
        objective=Objective(
            reconstruction_loss=settings.reconstruction_loss,
            reduction=settings.reduction,
            perceptual_weight=settings.perceptual_weight,
            kl_weight=settings.kl_weight,
            codebook_weight=settings.codebook_weight,
            commitment=settings.commitment,
            commitment_beta=settings.commitment_beta,
        ),
        adversary=adversary,
        accumulate=config.parallel.accumulate,
    )
    reconstruct = make_reconstruct(model)

    def init() -> TrainState:
        state = init_state(init_autoencoder(config, model), optimizer)
        if adversary is None:
            return state
        critic = init_critic(config, adversary.critic)
        opt_state = adversary.optimizer.init(critic)
        return state._replace(critic=CriticState(critic, opt_state))

    def draw(ema: PyTree, step_number: int) -> None:
        images = load_split(config, "test", limit=NUM_RECONSTRUCTIONS).image
        outputs = reconstruct(ema, images)
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
        init=init,
        frozen=perceptual_shapes(config) if perceptual is None else perceptual,
        extra={},
        learning_rate=learning_rate_schedule(settings.optim, num_steps=settings.steps),
        draw=draw,
    )


def build_adversary(config: Config) -> Adversary | None:
    """Build the adversary that a config asks for, if any.

    Raises:
      InputError: If the images are too small for it.
    """
    settings, side = config.autoencoder.adversary, config.data.image_size
    if not settings.enabled:
        return None
    if side // 2**settings.num_layers < MIN_CRITIC_SIDE:
        deepest = (side // MIN_CRITIC_SIDE).bit_length() - 1
        remedy = f"at most {deepest}" if deepest > 0 else "larger images"
        raise InputError(
            f"autoencoder.adversary.num_layers: got {settings.num_layers}, wanted "
            f"{remedy} where images have {side}x{side} pixels"
        )
    # The adversary's steps are counted from the first that it makes.
    own_steps = max(config.autoencoder.steps - settings.start_step, 1)
    return Adversary(
        critic=PatchDiscriminator(
            channels=settings.channels,
            num_layers=settings.num_layers,
            dtype=jnp.dtype(config.autoencoder.dtype),
        ),
        optimizer=make_transformation(settings.optim, num_steps=own_steps),
        start_step=settings.start_step,
        ramp_steps=settings.ramp_steps,
        weight=settings.weight,
        loss=settings.loss,
        sync_batch_norm=settings.sync_batch_norm,
    )


def init_critic(config: Config, critic: PatchDiscriminator) -> PyTree:
    """Draw the adversary's parameters from the run's root key."""
    key = stream_key(root_key(config.seed), Stream.INIT_CRITIC)
    init = jax.jit(functools.partial(critic.init, axis_name=None))
    return init(key, _blank_image(config))["params"]


def perceptual_shapes(config: Config) -> PyTree:
    """Return the shapes of what `load_perceptual` reads; None if a config does without.

    Raises:
      InputError: If the images are too small for LPIPS.
    """
    if not config.autoencoder.perceptual_weight:
        return None
    side = config.data.image_size
    if side < VGG_MIN_SIDE:
        raise InputError(
            f"data.image_size: got {side}, wanted at least {VGG_MIN_SIDE} for LPIPS; "
            "try --autoencoder.perceptual-weight 0"
        )
    image = _blank_image(config)
    init = functools.partial(Lpips().init, jax.random.key(0))
    return cast(Any, jax.eval_shape(init, image, image))["params"]


def measure_latent_scale(
    config: Config, model: LatentDiffusion, params: PyTree, layout: Layout
) -> Float[Array, ""]:
    """Measure one over the standard deviation of the sampled latents.

    Over `autoencoder.scale_batches` batches and all devices; the first-batch estimate
    of the original code is not repeatable on several devices.

    Args:
      config: The run's; a `latent_scale` in it is taken as it is.
      params: The first stage's averaged parameters.
      layout: Where to compute.

    Returns:
      The scale, float32.

    Source:
      Rombach et al., arXiv:2112.10752, app. G ("component-wise variance").
    """
    if config.autoencoder.latent_scale is not None:
        return jnp.asarray(config.autoencoder.latent_scale, jnp.float32)
    batch_size = config.autoencoder.batch_size
    iterator = open_iterator(config, batch_size=batch_size, layout=layout)
    step = layout.map_step(
        functools.partial(
            latent_moments,
            autoencoder=model.autoencoder,
            latent_shape=model.latent_shape,
        )
    )
    state, key = layout.place(params), layout.place(root_key(config.seed))
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


def known_latent_scale(
    config: Config,
    model: LatentDiffusion,
    params: PyTree,
    layout: Layout,
    workdir: Path,
) -> Float[Array, ""]:
    """Measure the latent scale once; a killed run finds it in the folder.

    Args:
      params: The first stage's averaged parameters.
      layout: Where to compute.

    Returns:
      The scale, float32.

    Raises:
      RunError: If it is no positive number.
      OSError: If it cannot be written.
    """
    path = workdir / "autoencoder" / SCALE_FILE
    known = gather_texts(path.read_text() if path.exists() else "")[0]
    if known:
        return jnp.asarray(json.loads(known)["latent_scale"], jnp.float32)
    scale = measure_latent_scale(config, model, params, layout)
    if not 0.0 < float(scale) < math.inf:
        raise RunError(
            f"autoencoder: the scale of its latents is {float(scale)}, wanted a "
            "positive number; try a lower --autoencoder.optim.lr in a new --workdir"
        )
    first_alone(lambda: write_json(path, {"latent_scale": float(scale)}))
    return scale


def make_reconstruct(
    model: LatentDiffusion,
) -> Callable[[PyTree, UInt8[np.ndarray, "b h w c"]], UInt8[np.ndarray, "b h w c"]]:
    """Make a function from uint8 images to their reconstructions, by the mode."""

    @jax.jit
    def run(params: PyTree, images: UInt8[Array, "b h w c"]) -> Array:
        def through(autoencoder: Autoencoder, x: Array) -> Array:
            return autoencoder.decode(autoencoder.encode(x).mode())

        variables = {"params": params}
        x = to_float(images)
        return cast(Array, model.autoencoder.apply(variables, x, method=through))

    return lambda params, images: to_uint8(np.asarray(run(params, images)))


def _blank_image(config: Config) -> Float[Array, "1 h w c"]:
    data = config.data
    return jnp.zeros((1, data.image_size, data.image_size, data.image_channels))
