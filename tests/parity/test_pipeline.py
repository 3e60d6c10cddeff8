"""An exported model is a diffusers pipeline: the same text gives the same image."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.config import Config
from ldm_jax.diffusion.timesteps import make_levels
from ldm_jax.pretrained.diffusers_export import write_folder
from ldm_jax.pretrained.layouts import key_shapes, read_tree
from ldm_jax.pretrained.model_weights import ModelWeights
from ldm_jax.pretrained.open_weights import (
    network_shapes,
    open_weights,
    to_sample_params,
)
from ldm_jax.pretrained.tensors import Tensors
from ldm_jax.rng import Stream, image_keys, image_step_keys, normal
from ldm_jax.sampling.conditions import condition_inputs
from ldm_jax.sampling.sample_fn import make_sample_fn
from ldm_jax.sampling.sampling_config import SamplingConfig
from tests.data.test_tokenizer import write_clip
from tests.parity.diffusers_models import from_torch, relative, to_torch
from tests.parity.needs import THEIR_WARNINGS_IGNORED, diffusers, torch
from tests.support import models
from tests.support.pretrained import compvis_arrays, with_condition
from tests.support.weights import random_tensors

pytestmark = THEIR_WARNINGS_IGNORED

STEPS = 10
SCALE = 3.0
TEXTS = ["hello cat", "at's HELLO"]


def load_pipeline(name: str, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = getattr(diffusers(), name).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_model(config: Config, seed: int = 0) -> ModelWeights:
    """Draw parameters by diffusers' names, as a network of reasonable gain."""
    from ldm_jax.pretrained import diffusers_names as names

    shapes = network_shapes(config)

    def draw(tree, format_, what):
        tensors = random_tensors(key_shapes(tree, format_), seed)
        return read_tree(tree, format_, Tensors.from_arrays(tensors), what=what)

    conditioner = {}
    if shapes.conditioner:
        encoder = shapes.conditioner["encoder"]
        conditioner = {"encoder": draw(encoder, names.clip_format(), "text encoder")}
    return ModelWeights(
        config,
        draw(shapes.autoencoder, names.autoencoder_format(config.autoencoder), "vae"),
        draw(shapes.unet, names.unet_format(config.diffusion), "unet"),
        conditioner,
        0.5,
    )


@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_a_text_to_image_pipeline_of_diffusers_gives_our_images(kind, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    write_clip(tokenizer, "sd2" if kind == "open_clip" else "sd1")
    config = with_condition(models.config_of(kind), tokenizer=str(tokenizer))
    folder = tmp_path / "folder"
    folder.mkdir()
    write_folder(diffusers_model(config), folder)

    opened = open_weights(folder)
    model = opened.model
    params = to_sample_params(opened.read())
    keys = image_keys([3, 4])
    sample_fn = make_sample_fn(model, guided=True)
    rows = [{"prompt": text, "negative_prompt": "at"} for text in TEXTS]
    cond, uncond = condition_inputs(model, rows)
    ours = sample_fn(
        params,
        keys,
        cond,
        SamplingConfig(steps=STEPS, guidance_scale=(SCALE,)),
        uncond=uncond,
    ).images

    pipeline = load_pipeline("StableDiffusionPipeline", folder)
    noise = normal(image_step_keys(keys, Stream.SAMPLE_START), model.latent_shape)
    theirs = pipeline(
        TEXTS,
        negative_prompt=["at", "at"],
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        latents=to_torch(np.asarray(noise)),
        height=config.data.image_size,
        width=config.data.image_size,
        output_type="pt",
    ).images
    levels = make_levels(model.schedule, STEPS)
    assert pipeline.scheduler.timesteps.tolist() == levels.t[:-1].tolist()
    pixels = (np.asarray(ours) + 1) / 2
    assert relative(pixels, from_torch(theirs)) < 1e-3
    assert np.abs(pixels[0] - pixels[1]).max() > 0.05  # the texts and seeds differ


def test_an_unconditional_pipeline_of_diffusers_gives_our_images(tmp_path):
    config = models.config_of("none")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_folder(diffusers_model(config), folder)
    pipeline = load_pipeline("LDMPipeline", folder)
    opened = open_weights(folder)
    params = to_sample_params(opened.read())
    keys = image_keys([3, 4])
    from ldm_jax.models.conditioning import ConditionInputs

    sample_fn = make_sample_fn(opened.model, guided=False)
    settings = SamplingConfig(steps=STEPS)
    ours = np.asarray(sample_fn(params, keys, ConditionInputs(), settings).images)

    shape = opened.model.latent_shape
    noise = normal(image_step_keys(keys, Stream.SAMPLE_START), shape)
    latents = to_torch(np.asarray(noise))
    pipeline.scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            predicted = pipeline.unet(latents, t).sample
            latents = pipeline.scheduler.step(predicted, t, latents).prev_sample
        decoded = pipeline.vqvae.decode(latents / 0.5).sample
    # Rounding may choose another of two near codes: nearly all pixels are equal.
    error = np.abs(ours - np.clip(from_torch(decoded), -1, 1))
    assert np.median(error) < 1e-4
    assert (error > 1e-2).mean() < 0.02


@pytest.mark.parametrize("kind", ["label", "class", "text", "embedding"])
def test_an_exported_unet_has_equal_outputs_in_diffusers(kind, tmp_path):
    config = models.config_of(kind)
    weights = models.model_of(config)
    write_folder(weights, tmp_path)
    crossed = kind != "label"
    name = "UNet2DConditionModel" if crossed else "UNet2DModel"
    unet = getattr(diffusers(), name).from_pretrained(tmp_path, subfolder="unet")
    draw = np.random.RandomState(0)
    x = draw.normal(size=(2, *config.latent_shape)).astype(np.float32)
    from ldm_jax.build import build_model
    from ldm_jax.models.conditioning import Condition

    t, label = np.asarray([7, 900], np.int32), np.asarray([0, 10], np.int32)
    width = config.diffusion.condition.context_width
    context = draw.normal(size=(2, 3, width)).astype(np.float32)
    cond = Condition(
        label=None if crossed else jnp.asarray(label),
        context=jnp.asarray(context) if crossed else None,
    )
    kwargs = (
        {"encoder_hidden_states": torch.from_numpy(context)}
        if crossed
        else {"class_labels": torch.from_numpy(label)}
    )
    theirs = unet(to_torch(x), torch.from_numpy(t), **kwargs).sample
    apply = jax.jit(build_model(config).unet.apply)
    params = jax.device_put(weights.unet)
    ours = apply({"params": params}, jnp.asarray(x), jnp.asarray(t), cond)
    assert relative(ours, from_torch(theirs)) < 1e-4


@pytest.mark.parametrize("shards", ["10GB", "100KB"])
def test_folders_saved_by_diffusers_are_read_whole_and_in_shards(shards, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    write_clip(tokenizer, "sd1")
    config = with_condition(models.config_of("clip"), tokenizer=str(tokenizer))
    weights = diffusers_model(config)
    folder, again = tmp_path / "folder", tmp_path / "again"
    folder.mkdir()
    write_folder(weights, folder)
    pipeline = load_pipeline("StableDiffusionPipeline", folder)
    pipeline.save_pretrained(again, max_shard_size=shards)
    indices = list(again.rglob("*.index.json"))
    assert bool(indices) == (shards == "100KB")
    found = open_weights(again).read()
    assert models.same(found.unet, weights.unet)
    assert models.same(found.autoencoder, weights.autoencoder)
    assert models.same(found.conditioner, weights.conditioner)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_checkpoint_in_compvis_naming_is_read(zipped, tmp_path):
    weights, arrays = compvis_arrays()
    state = {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}
    path, config_file = tmp_path / "model.ckpt", tmp_path / "recipe.py"
    torch.save(
        {"state_dict": state, "epoch": 3, "optimizer_states": [{"lr": 1e-4}]},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    config_file.write_text(
        "from tests.support.models import config_of\n"
        "def get_config():\n    return config_of('label')\n"
    )
    found = open_weights(path, config_file=config_file).read()
    assert models.same(found.unet, weights.unet)
    assert models.same(found.autoencoder, weights.autoencoder)
    assert found.latent_scale == weights.config.autoencoder.latent_scale


def test_a_unet_with_null_attention_head_dim_equals_diffusers():
    """Null means one head, as wide as the level."""
    from tests.parity import diffusers_models

    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["AttnDownBlock2D"] * 2,
        "up_block_types": ["AttnUpBlock2D"] * 2,
        "norm_num_groups": 8,
        "attention_head_dim": None,
    }
    weights, tensors = diffusers_models.make_torch("UNet2DModel", config, 0)
    ours = diffusers_models.unet_config("UNet2DModel", dict(weights.config))
    unet, params = diffusers_models.our_unet(ours, tensors)
    draw = np.random.RandomState(0)
    x = draw.normal(size=(2, *ours.latent_shape)).astype(np.float32)
    t = np.asarray([7, 900], np.int32)
    from ldm_jax.models.conditioning import Condition

    apply = jax.jit(unet.apply)
    found = apply({"params": params}, jnp.asarray(x), jnp.asarray(t), Condition())
    with torch.no_grad():
        theirs = weights(to_torch(x), torch.from_numpy(t)).sample
    assert relative(found, from_torch(theirs)) < 1e-4
