"""Images from keys: the sample function, and the recipe of what it made."""

import functools
import importlib.metadata
import json
from typing import NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ldm_jax.diffusion.guidance import classifier_free
from ldm_jax.diffusion.objectives import Denoiser, predicting_eps
from ldm_jax.diffusion.parameterize import PredictionName
from ldm_jax.diffusion.samplers import (
    STEP_BY_SAMPLER,
    SamplerName,
    Trajectory,
    make_levels,
    sample,
)
from ldm_jax.diffusion.schedules import Schedule
from ldm_jax.nn.autoencoder import Autoencoder
from ldm_jax.nn.conditioning import (
    Condition,
    Conditioner,
    ConditionInputs,
    null_inputs,
)
from ldm_jax.nn.unet import UNet
from ldm_jax.types import PyTree

VERSIONED_PACKAGES = ("ldm_jax", "jax", "jaxlib", "flax", "numpy")


class Networks(NamedTuple):
    """Everything static that sampling needs.

    Attributes:
      autoencoder: The first stage.
      unet: The second.
      conditioner: Prepares what the second is conditioned on.
      schedule: The noise levels it was trained on.
      prediction: What it predicts.
      latent_shape: Height, width and channels of a latent.
      num_classes: Real classes; the null class has this index.
      null_tokens: Tokens of the empty prompt.
      chunk: Images the network sees at once.
    """

    autoencoder: Autoencoder
    unet: UNet
    conditioner: Conditioner
    schedule: Schedule
    prediction: PredictionName
    latent_shape: tuple[int, int, int]
    num_classes: int
    null_tokens: tuple[int, ...]
    chunk: int


class SampleParams(NamedTuple):
    """The arrays that sampling needs.

    Attributes:
      autoencoder: Averaged parameters of the first stage.
      unet: Averaged parameters of the second.
      conditioner: Parameters of the conditioner; averaged if it was trained.
      latent_scale: What latents were multiplied by in training.
    """

    autoencoder: PyTree
    unet: PyTree
    conditioner: PyTree
    latent_scale: Float[Array, ""]


class Samples(NamedTuple):
    """What a sample function returns.

    Attributes:
      images: In [-1, 1], clipped.
      frames: The decoded latents on the way, `f` of them, the starting noise first;
        empty when none were asked for.
    """

    images: Float[Array, "b h w c"]
    frames: Float[Array, "f b h w c"]


@runtime_checkable
class SampleFn(Protocol):
    """A jitted sample function."""

    def __call__(
        self,
        params: SampleParams,
        keys: Key[Array, " b"],
        cond: ConditionInputs,
        guidance_scale: Float[Array, ""] | float = 1.0,
        eta: Float[Array, ""] | float = 0.0,
        uncond: ConditionInputs | None = None,
    ) -> Samples:
        """Make one image for each key and condition."""
        ...


def make_sample_fn(
    networks: Networks,
    *,
    sampler: SamplerName,
    num_steps: int,
    guided: bool = True,
    num_frames: int = 0,
) -> SampleFn:
    """Make a jitted `sample_fn(params, keys, cond, guidance_scale, eta, uncond)`.

    Image i is a function of the parameters, key i, condition i and the settings alone,
    bit for bit: alone, in any batch, in any order. (Matrix products of different
    batch sizes differ in their last bits. So the network always sees `chunk` images,
    the last chunk filled up, whatever the number of keys.)

    Compiled once per number of chunks; keys, conditions, scale and eta are inputs.

    Args:
      networks: What to sample with.
      sampler: `ddim` or `ddpm`.
      num_steps: Denoising steps, 1 to T, exactly.
      guided: Whether `guidance_scale` has effect. False saves half of the work; it is
        what scale 1 means.
      num_frames: Latents to keep on the way, 0 or 2 to `num_steps` + 1.

    Returns:
      The function. Its `cond` holds what the model reads, by image; `uncond` what it
      is guided away from, by default the null condition.

    Raises:
      ValueError: If `num_steps` or `num_frames` is out of range.
    """
    levels = make_levels(networks.schedule, num_steps)
    if num_frames and not 2 <= num_frames <= num_steps + 1:
        raise ValueError(
            f"num_frames: got {num_frames}, wanted 0 or 2 to {num_steps + 1}"
        )

    def sample_chunk(
        params: SampleParams,
        guidance_scale: Float[Array, ""],
        eta: Float[Array, ""],
        inputs: tuple[Key[Array, " b"], ConditionInputs, ConditionInputs],
    ) -> Samples:
        keys, cond, uncond = inputs
        trajectory = sample(
            _denoiser(networks, params, uncond if guided else None, guidance_scale),
            keys,
            prepare(networks, params, cond),
            eta=eta,
            levels=levels,
            step=STEP_BY_SAMPLER[sampler],
            shape=networks.latent_shape,
            num_frames=num_frames,
        )
        return decode(networks, params, trajectory)

    def sample_fn(
        params: SampleParams,
        keys: Key[Array, " b"],
        cond: ConditionInputs,
        guidance_scale: Float[Array, ""] | float = 1.0,
        eta: Float[Array, ""] | float = 0.0,
        uncond: ConditionInputs | None = None,
    ) -> Samples:
        num = keys.shape[0]
        if uncond is None:
            uncond = null_inputs(
                cond,
                num_classes=networks.num_classes,
                null_tokens=networks.null_tokens,
            )
        # The indices are padded, not the arrays: keys have a dtype of their own.
        fill = -num % networks.chunk
        slots = jnp.minimum(jnp.arange(num + fill), num - 1)
        slots = slots.reshape(-1, networks.chunk)
        chunk_fn = functools.partial(
            sample_chunk,
            params,
            jnp.asarray(guidance_scale, jnp.float32),
            jnp.asarray(eta, jnp.float32),
        )
        chunks = jax.lax.map(
            chunk_fn, jax.tree.map(lambda x: x[slots], (keys, cond, uncond))
        )
        images = chunks.images.reshape(-1, *chunks.images.shape[2:])[:num]
        frames = jnp.moveaxis(chunks.frames, 1, 0)
        frames = frames.reshape(num_frames, fill + num, *images.shape[1:])[:, :num]
        return Samples(images, frames)

    return jax.jit(sample_fn)


def prepare(
    networks: Networks, params: SampleParams, inputs: ConditionInputs
) -> Condition:
    """Turn what the user gives into what the UNet reads, once for all steps."""
    variables = {"params": params.conditioner}
    return cast(Condition, networks.conditioner.apply(variables, inputs))


def _denoiser(
    networks: Networks,
    params: SampleParams,
    uncond: ConditionInputs | None,
    guidance_scale: Float[Array, ""],
) -> Denoiser:
    """Make the network that a sampler sees: it predicts eps, guided if it is to be."""

    def plain(
        x_t: Float[Array, "b h w c"], t: Int[Array, " b"], cond: PyTree
    ) -> Float[Array, "b h w c"]:
        variables = {"params": params.unet}
        return cast(jax.Array, networks.unet.apply(variables, x_t, t, cond))

    abar = jnp.asarray(networks.schedule.abar, jnp.float32)
    denoise = predicting_eps(plain, abar=abar, prediction=networks.prediction)
    if uncond is None:
        return denoise
    null_cond = prepare(networks, params, uncond)
    return classifier_free(denoise, null_cond=null_cond, scale=guidance_scale)


def decode(networks: Networks, params: SampleParams, trajectory: Trajectory) -> Samples:
    """Decode a chunk's clean latents, and its frames one after the other."""

    def one(latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 e"]:
        images = networks.autoencoder.apply(
            {"params": params.autoencoder},
            latents / params.latent_scale,
            method=Autoencoder.decode,
        )
        return jnp.clip(cast(jax.Array, images), -1.0, 1.0)

    images = one(trajectory.x_0)
    if not trajectory.frames.shape[0]:
        return Samples(images, jnp.zeros((0, *images.shape), images.dtype))
    return Samples(images, jax.lax.map(one, trajectory.frames))


def recipe(
    *,
    seed: int,
    condition: dict[str, str],
    sampler: SamplerName,
    num_steps: int,
    eta: float,
    guidance_scale: float,
    checkpoint: str,
) -> dict[str, str]:
    """Say how an image was made, as text chunks of its PNG.

    Args:
      seed: Of the image.
      condition: What it shows, by kind: `label`, or `prompt`.
      sampler: Which one.
      num_steps: Denoising steps.
      eta: Share of fresh noise.
      guidance_scale: 1 is unguided.
      checkpoint: Digest of the run's state.

    Returns:
      Text by keyword.
    """
    versions = {name: importlib.metadata.version(name) for name in VERSIONED_PACKAGES}
    return {
        "seed": str(seed),
        **condition,
        "sampler": sampler,
        "steps": str(num_steps),
        "eta": repr(eta),
        "guidance_scale": repr(guidance_scale),
        "checkpoint": checkpoint,
        "versions": json.dumps(versions),
    }
