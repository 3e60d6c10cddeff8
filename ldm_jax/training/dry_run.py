"""A dry run: everything built by shape alone, to check a config and report sizes."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax import config as config_lib
from ldm_jax.build import build_model, shape_of
from ldm_jax.config import Config, DataConfig
from ldm_jax.data.pipeline import Batch, LatentBatch
from ldm_jax.latent_diffusion import (
    LatentDiffusion,
    autoencoder_bytes,
    blank_inputs,
    init_autoencoder,
    init_conditioner,
    param_shapes,
    reading_embeddings,
    unet_bytes,
)
from ldm_jax.parallel.make_layout import Layout
from ldm_jax.parallel.memory import check_fits
from ldm_jax.parallel.reduce import reduce_over_axis
from ldm_jax.rng import root_key
from ldm_jax.training.autoencoder_stage import autoencoder_stage
from ldm_jax.training.diffusion_stage import diffusion_stage
from ldm_jax.training.diffusion_step import FrozenParams
from ldm_jax.training.loop import Stage
from ldm_jax.types import PyTree


def check_batches(config: Config, layout: Layout) -> None:
    """Raise `InputError` if a batch does not divide by devices and parts."""
    accumulate = config.parallel.accumulate
    for name in config.trained_stages:
        size = getattr(config, name).batch_size
        layout.check_batch_size(size, f"{name}.batch_size", accumulate=accumulate)


NARROW = 512
"""Channels below which networks fit any machine: tracing them takes half a second."""


def check_memory(config: Config, model: LatentDiffusion, layout: Layout) -> None:
    """Raise `InputError` if a stage that would be trained cannot fit the devices.

    Compared are the state with the gradients, and the largest array of a batch: all
    that is known before anything is compiled.
    """
    device, platform = layout.devices[0], layout.platform
    names = config.trained_stages
    parts = layout.num_devices * config.parallel.accumulate
    for name in names:
        size = getattr(config, name).batch_size
        sizes = [unet_bytes(model, platform)] if name == "diffusion" else []
        if name != "diffusion" or config.data.latents is None:
            sizes.append(autoencoder_bytes(model, platform))
        check_fits(
            max(sizes) * (size // parts),
            device,
            what=f"{name}.batch_size: got {size}, of which an array is",
            remedy="a smaller batch or image, or more of --parallel.accumulate",
        )
    settings = [getattr(config, name) for name in names]
    if all(one.channels * max(one.channel_multipliers) < NARROW for one in settings):
        return
    share = layout.num_devices if config.parallel.layout == "fsdp" else 1
    copies = len(layout.devices) if platform == "cpu" else 1  # in one memory
    for stage in stages_by_shape(config, model):
        state = jax.eval_shape(stage.init)
        check_fits(
            (tree_bytes(state) + tree_bytes(state.params)) * copies // share,
            device,
            what=f"{stage.name}.channels: got networks whose state and gradients are",
            remedy="smaller networks, or --parallel.layout fsdp on more devices",
        )


def describe(config: Config, layout: Layout) -> dict[str, Any]:
    """Build everything by shape alone and report sizes.

    Returns:
      JSON-compatible: digest of the config, parameters by network, bytes of state,
      batch per device and steps per epoch by stage that would be trained (null if the
      number of examples is not known).

    Raises:
      InputError: If a batch does not divide by the devices.
    """
    check_batches(config, layout)
    model = build_model(config)
    report: dict[str, Any] = {
        "digest": config_lib.digest(config),
        "parameters": {"autoencoder": _count(param_shapes(init_autoencoder, model))},
        "state_bytes": {},
        "batch_per_device": {},
        "steps_per_epoch": {},
    }
    if "diffusion" in config.stages:
        conditioner = param_shapes(init_conditioner, model)
        if jax.tree.leaves(conditioner):
            report["parameters"]["conditioner"] = _count(conditioner)
    for stage in stages_by_shape(config, model):
        state = jax.eval_shape(stage.init)
        if stage.name == "diffusion":
            report["parameters"]["unet"] = _count(state.params.unet)
        local = stage.batch_size // layout.num_devices
        step = functools.partial(stage.step, reduce=reduce_over_axis)
        key = jax.eval_shape(lambda: root_key(0))
        batch = batch_shapes(model, config.data, stage.name, local)
        jax.eval_shape(step, state, stage.frozen, batch, key)
        report["state_bytes"][stage.name] = tree_bytes(state)
        report["batch_per_device"][stage.name] = local
        report["steps_per_epoch"][stage.name] = (
            config.data.num_train_examples // stage.batch_size
            if config.data.num_train_examples
            else None
        )
    return report


def stages_by_shape(config: Config, model: LatentDiffusion) -> list[Stage]:
    """Build the stages that would be trained, with shapes in place of arrays.

    They can be compiled but not run.

    Raises:
      InputError: If the images are too small for LPIPS or the discriminator.
    """
    nowhere = Path()
    stages: list[Stage] = []
    if config.first_stage is None:
        stages.append(autoencoder_stage(config, model, nowhere))
    if "diffusion" in config.stages:
        trained = model.condition.trained
        frozen = FrozenParams(
            param_shapes(init_autoencoder, model),
            shape_of((), jnp.float32),
            {} if trained else param_shapes(init_conditioner, model),
        )
        stage = diffusion_stage(
            config,
            model,
            frozen,
            nowhere,
            null_embedding=null_embedding_shape(model, config.data),
        )
        stages.append(stage)
    return stages


def batch_shapes(
    model: LatentDiffusion, data: DataConfig, stage: str, size: int
) -> Batch | LatentBatch:
    """Return the shapes of a batch of `size` examples of a stage."""
    cached = data.latents is not None and stage == "diffusion"
    if cached and model.condition.freezes_text:
        model = reading_embeddings(model)
    inputs = jax.eval_shape(lambda: blank_inputs(model, batch_size=size))
    image = (size, *model.image_shape)
    segmented = model.condition.concat == "segmentation"
    batch = Batch(
        image=shape_of(image, jnp.uint8),
        label=shape_of((size,), jnp.int32),
        example_index=shape_of((size,), jnp.uint32),
        tokens=inputs.tokens,
        embedding=inputs.embedding,
        segmentation=shape_of(image[:-1], jnp.int32) if segmented else None,
    )
    if not cached:
        return batch
    return LatentBatch(shape_of((size, *model.moments_shape), jnp.float32), *batch[1:])


def null_embedding_shape(model: LatentDiffusion, data: DataConfig) -> Any:
    """Return the shape of a cache's null embedding; None if the run reads none.

    Reads no cache: it is assumed to hold text embeddings if the text encoder is frozen.
    """
    if data.latents is None or not model.condition.freezes_text:
        return None
    vectors = model.condition.as_vectors()
    return shape_of((vectors.embedding_length, vectors.embedding_width), jnp.float32)


def _count(params: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def tree_bytes(tree: PyTree) -> int:
    """Count the bytes of a tree of arrays or their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
