"""A run by shapes only: what it would take."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax import config as config_lib
from ldm_jax.build import (
    blank_inputs,
    build_model,
    init_autoencoder,
    init_conditioner,
    shape_of,
)
from ldm_jax.config import Config
from ldm_jax.config.run import with_states
from ldm_jax.data.pipeline import Batch, LatentBatch
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.parallel.make_layout import Layout
from ldm_jax.parallel.reduce import average_here
from ldm_jax.rng import root_key
from ldm_jax.training.autoencoder_stage import autoencoder_stage
from ldm_jax.training.diffusion_stage import diffusion_stage
from ldm_jax.training.diffusion_step import Frozen
from ldm_jax.training.loop import Stage
from ldm_jax.types import PyTree


def check_batches(config: Config, layout: Layout) -> None:
    """Raise `InputError` if a batch does not divide by the devices."""
    parts = config.parallel.accumulate
    if config.first_stage is None:
        layout.check_batch_size(
            config.autoencoder.batch_size, "autoencoder.batch_size", accumulate=parts
        )
    if "diffusion" in config.stages:
        layout.check_batch_size(
            config.diffusion.batch_size, "diffusion.batch_size", accumulate=parts
        )


def describe(config: Config, layout: Layout) -> dict[str, Any]:
    """Build everything by shape only and say how large it is.

    Args:
      layout: The devices it would run on.

    Returns:
      JSON-compatible: digest of the config, parameters by network, bytes of state by
      stage, batch per device and steps per epoch by stage (null if the number of
      examples is not known). Only stages that would be trained are told; the
      autoencoder's parameters always.

    Raises:
      InputError: If a batch does not divide by the devices.
    """
    check_batches(config, layout)
    model = build_model(config)
    stages = stages_by_shape(config, model)
    report: dict[str, Any] = {
        "digest": config_lib.digest(config),
        "parameters": {"autoencoder": _count(first_shapes(config, model))},
        "state_bytes": {},
        "batch_per_device": {},
        "steps_per_epoch": {},
    }
    if "diffusion" in config.stages:
        conditioner = conditioner_shapes(config, model)
        if jax.tree.leaves(conditioner):
            report["parameters"]["conditioner"] = _count(conditioner)
    for stage in stages:
        state = jax.eval_shape(stage.init)
        if stage.name == "diffusion":
            report["parameters"]["unet"] = _count(state.params.unet)
        local = stage.batch_size // layout.num_devices
        step = functools.partial(stage.step, average=average_here)
        key = jax.eval_shape(lambda: root_key(0))
        batch = batch_shapes(config, stage.name, local)
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
    """Build the stages that would be trained, of shapes where a run has arrays.

    Returns:
      Stage 1 unless it is taken from elsewhere, and stage 2 if there is one; all can be
      done with them but run.

    Raises:
      InputError: If the images are too small for LPIPS or the adversary.
    """
    nowhere = Path()
    stages: list[Stage] = []
    if config.first_stage is None:
        stages.append(autoencoder_stage(config, model, nowhere))
    if "diffusion" in config.stages:
        trained = config.diffusion.condition.trained
        frozen = Frozen(
            first_shapes(config, model),
            shape_of((), jnp.float32),
            {} if trained else conditioner_shapes(config, model),
        )
        null_state = null_state_shape(config)
        stages.append(
            diffusion_stage(config, model, frozen, nowhere, null_state=null_state)
        )
    return stages


def first_shapes(config: Config, model: LatentDiffusion) -> PyTree:
    """Return the shapes of the autoencoder's parameters."""
    return jax.eval_shape(lambda: init_autoencoder(config, model))


def conditioner_shapes(config: Config, model: LatentDiffusion) -> PyTree:
    """Return the shapes of the conditioner's parameters; {} if it has none."""
    return jax.eval_shape(lambda: init_conditioner(config, model))


def batch_shapes(config: Config, stage: str, size: int) -> Batch | LatentBatch:
    """Return the shapes of a batch of `size` examples of a stage."""
    data = config.data
    of_latents = data.latents is not None and stage == "diffusion"
    if of_latents and config.diffusion.condition.freezes_text:
        config = with_states(config)
    inputs = jax.eval_shape(lambda: blank_inputs(config, batch_size=size))
    image = (size, data.image_size, data.image_size)
    segmented = config.diffusion.condition.concat == "segmentation"
    batch = Batch(
        image=shape_of((*image, data.image_channels), jnp.uint8),
        label=shape_of((size,), jnp.int32),
        example_index=shape_of((size,), jnp.uint32),
        tokens=inputs.tokens,
        embedding=inputs.embedding,
        segmentation=shape_of(image, jnp.int32) if segmented else None,
    )
    if not of_latents:
        return batch
    return LatentBatch(shape_of((size, *config.moments_shape), jnp.float32), *batch[1:])


def null_state_shape(config: Config) -> Any:
    """Return the shape of a cache's null state; None if a config reads none.

    Reads no cache: it is taken to hold text states if the text encoder is frozen.
    """
    condition = config.diffusion.condition
    if config.data.latents is None or not condition.freezes_text:
        return None
    vectors = condition.as_vectors()
    return shape_of((vectors.embedding_length, vectors.embedding_width), jnp.float32)


def _count(params: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def tree_bytes(tree: PyTree) -> int:
    """Count the bytes of a tree of arrays or their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
