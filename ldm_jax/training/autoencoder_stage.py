"""The autoencoder stage of a run, and the scale of its latents."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from ldm_jax.build import load_split, open_iterator
from ldm_jax.config import AutoencoderConfig, Config
from ldm_jax.data.pipeline import BatchIterator, to_batch
from ldm_jax.files import write_json
from ldm_jax.images import grid, to_float, to_uint8, write_png
from ldm_jax.latent_diffusion import LatentDiffusion, init_autoencoder
from ldm_jax.models.autoencoder import Autoencoder
from ldm_jax.models.discriminator_lpips import VGG_MIN_SIDE, Lpips, PatchDiscriminator
from ldm_jax.parallel.make_layout import Layout
from ldm_jax.parallel.multihost import first_alone, from_first, together
from ldm_jax.rng import Stream, root_key, stream_key
from ldm_jax.training.autoencoder_loss import AutoencoderObjective
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
from ldm_jax.training.workdir import SCALE_FILE, read_scale, state_check
from ldm_jax.types import InputError, PyTree, RunError

NUM_RECONSTRUCTIONS = 16
GRID_COLUMNS = 8
MIN_CRITIC_SIDE = 3
"""Smallest map from which the last two layers of the discriminator make a logit."""


def autoencoder_stage(
    config: Config, model: LatentDiffusion, workdir: Path, *, perceptual: PyTree = None
) -> Stage:
    """Build the autoencoder stage.

    Args:
      perceptual: Parameters of LPIPS. None stands for their shapes: the stage can then
        be compiled but not run.

    Raises:
      InputError: If the images are too small for LPIPS or the discriminator.
    """
    settings = config.autoencoder
    optimizer = make_optimizer(settings.optim, num_steps=settings.steps)
    objective = make_objective(settings, model)
    if objective.adversary is not None:
        in_shards = config.parallel.exact_shards > 0
        adversary = objective.adversary._replace(in_shards=in_shards)
        objective = objective._replace(adversary=adversary)
    step = functools.partial(
        autoencoder_step, model=model, objective=objective, optimizer=optimizer
    )
    reconstruct = make_reconstruct(model)

    def init() -> TrainState:
        key = root_key(config.seed)
        state = init_state(init_autoencoder(model, key), optimizer)
        if objective.adversary is None:
            return state
        critic = init_critic(model, objective.adversary, key)
        return state._replace(critic=critic)

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
        frozen=perceptual_shapes(settings, model) if perceptual is None else perceptual,
        extra={},
        learning_rate=learning_rate_schedule(settings.optim, num_steps=settings.steps),
        draw=draw,
        check=state_check(workdir, "autoencoder"),
    )


def make_objective(
    settings: AutoencoderConfig, model: LatentDiffusion
) -> AutoencoderObjective:
    """Make the objective that a config describes.

    Raises:
      InputError: If the images are too small for the discriminator.
    """
    return AutoencoderObjective(
        reconstruction_loss=settings.reconstruction_loss,
        reduction=settings.reduction,
        perceptual_weight=settings.perceptual_weight,
        kl_weight=settings.kl_weight,
        codebook_weight=settings.codebook_weight,
        commitment=settings.commitment,
        commitment_beta=settings.commitment_beta,
        adversary=make_adversary(settings, model),
    )


def make_adversary(
    settings: AutoencoderConfig, model: LatentDiffusion
) -> Adversary | None:
    """Make the discriminator that a config describes, if it has one.

    Raises:
      InputError: If the images are too small for it.
    """
    adversary, side = settings.adversary, min(model.image_shape[:2])
    if not adversary.enabled:
        return None
    if side // 2**adversary.num_layers < MIN_CRITIC_SIDE:
        deepest = (side // MIN_CRITIC_SIDE).bit_length() - 1
        remedy = f"at most {deepest}" if deepest > 0 else "larger images"
        raise InputError(
            f"autoencoder.adversary.num_layers: got {adversary.num_layers}, wanted "
            f"{remedy} where images have {side}x{side} pixels"
        )
    # Its own steps begin with its first update.
    num_steps = max(settings.steps - adversary.start_step, 1)
    return Adversary(
        discriminator=PatchDiscriminator(
            channels=adversary.channels,
            num_layers=adversary.num_layers,
            dtype=jnp.dtype(settings.dtype),
        ),
        optimizer=make_transformation(adversary.optim, num_steps=num_steps),
        start_step=adversary.start_step,
        ramp_steps=adversary.ramp_steps,
        weight=adversary.weight,
        loss=adversary.loss,
        sync_batch_norm=adversary.sync_batch_norm,
    )


def init_critic(
    model: LatentDiffusion, adversary: Adversary, key: Key[Array, ""]
) -> CriticState:
    """Draw the discriminator's parameters from the root key of a run."""
    init = jax.jit(functools.partial(adversary.discriminator.init, axis_name=None))
    params = init(stream_key(key, Stream.INIT_CRITIC), _blank_image(model))["params"]
    return CriticState(params, adversary.optimizer.init(params))


def perceptual_shapes(settings: AutoencoderConfig, model: LatentDiffusion) -> PyTree:
    """Return the shapes of the parameters of LPIPS; None if its weight is 0.

    Raises:
      InputError: If the images are too small for LPIPS.
    """
    if not settings.perceptual_weight:
        return None
    image = _blank_image(model)
    side = min(image.shape[1:3])
    if side < VGG_MIN_SIDE:
        raise InputError(
            f"data.image_size: got {side}, wanted at least {VGG_MIN_SIDE} for LPIPS; "
            "try --autoencoder.perceptual-weight 0"
        )
    init = functools.partial(Lpips().init, jax.random.key(0))
    return cast(Any, jax.eval_shape(init, image, image))["params"]


def latent_scale(
    config: Config,
    model: LatentDiffusion,
    params: PyTree,
    layout: Layout,
    workdir: Path,
) -> Float[Array, ""]:
    """Return the scale of the latents: from the run's folder or config, or measured.

    Args:
      params: Averaged parameters of the first stage.

    Returns:
      The scale, float32; it is in the folder afterwards.

    Raises:
      InputError: If the file in the folder is damaged.
      RunError: If it is not a positive number.
      OSError: If it cannot be written.
    """
    with together():
        known = read_scale(workdir)
    known = from_first(known)
    if known is not None:
        return jnp.asarray(known, jnp.float32)
    settings = config.autoencoder
    if settings.latent_scale is not None:
        scale = jnp.asarray(settings.latent_scale, jnp.float32)
    else:
        iterator = open_iterator(config, batch_size=settings.batch_size, layout=layout)
        scale = measure_latent_scale(
            model,
            params,
            root_key(config.seed),
            iterator=iterator,
            num_batches=settings.scale_batches,
            layout=layout,
        )
    if not 0.0 < float(scale) < math.inf:
        raise RunError(
            f"autoencoder: the scale of its latents is {float(scale)}, wanted a "
            "positive number; try a lower --autoencoder.optim.lr in a new --workdir"
        )
    path = workdir / "autoencoder" / SCALE_FILE
    content = {"latent_scale": float(scale)}
    first_alone(lambda: write_json(path, content, run=workdir))
    return scale


def measure_latent_scale(
    model: LatentDiffusion,
    params: PyTree,
    key: Key[Array, ""],
    *,
    iterator: BatchIterator,
    num_batches: int,
    layout: Layout,
) -> Float[Array, ""]:
    """Measure one over the standard deviation of the sampled latents.

    It is taken over several batches and all devices: the estimate of the original code,
    from the first batch, depends on the number of devices.

    Args:
      params: Averaged parameters of the first stage.
      key: The root key of the run.
      iterator: Batches of images; closed afterwards.

    Source:
      Rombach et al., arXiv:2112.10752, app. G ("component-wise variance").
    """
    step = layout.map_step(functools.partial(latent_moments, model=model))
    state, placed_key = layout.place(params), layout.place(key)
    rows = []
    try:
        for _ in range(num_batches):
            batch = layout.split(to_batch(next(iterator)))
            state, moments = step(state, None, batch, placed_key)
            rows.append(jax.device_get(layout.local(moments)))
    finally:
        iterator.close()
    mean, mean_square = np.asarray(rows, np.float64).mean(axis=0)
    return jnp.asarray(1.0 / np.sqrt(mean_square - mean**2), jnp.float32)


def make_reconstruct(
    model: LatentDiffusion,
) -> Callable[[PyTree, UInt8[np.ndarray, "b h w c"]], UInt8[np.ndarray, "b h w c"]]:
    """Make a function from 8-bit images to their reconstructions from the mode."""

    @jax.jit
    def run(params: PyTree, images: UInt8[Array, "b h w c"]) -> Array:
        def through(autoencoder: Autoencoder, x: Array) -> Array:
            return autoencoder.decode(autoencoder.encode(x).mode())

        variables = {"params": params}
        x = to_float(images)
        with jax.default_matmul_precision(model.precision):
            return cast(Array, model.autoencoder.apply(variables, x, method=through))

    return lambda params, images: to_uint8(np.asarray(run(params, images)))


def _blank_image(model: LatentDiffusion) -> Float[Array, "1 h w c"]:
    return jnp.zeros((1, *model.image_shape))
