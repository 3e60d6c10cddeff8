"""From a config to what it describes; the only file that chooses by name."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.config import (
    AutoencoderConfig,
    ConditionConfig,
    Config,
    DataConfig,
    DiffusionConfig,
)
from ldm_jax.data.bert_tokenizer import load_bert_tokenizer
from ldm_jax.data.byte_pair_tokenizer import empty_prompt, load_byte_pairs
from ldm_jax.data.caption_tokens import TokenizedExamples
from ldm_jax.data.clip_tokenizer import load_clip_tokenizer
from ldm_jax.data.folder import Need
from ldm_jax.data.pipeline import (
    Augment,
    Batch,
    BatchIterator,
    load_all,
    make_iterator,
    prepare_example,
)
from ldm_jax.data.sources import Source, open_source, reading_threads
from ldm_jax.data.tokenizer import TOKENIZER_FILE, WORDPIECE_FILE, Tokenizer
from ldm_jax.diffusion.schedules import (
    EdmSchedule,
    FlowSchedule,
    Schedule,
    make_schedule,
)
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.autoencoder import Autoencoder
from ldm_jax.models.conditioning import (
    ClassEmbedding,
    Conditioner,
    SpatialRescaler,
)
from ldm_jax.models.text_encoders import ClipTextTransformer, TextTransformer
from ldm_jax.models.unet import UNet
from ldm_jax.parallel.make_layout import Layout
from ldm_jax.types import InputError

Split = Literal["train", "test"]
INPUT_BY_CONTEXT: dict[str, Literal["none", "label", "tokens", "embedding"]] = {
    "none": "none",
    "class": "label",
    "text": "tokens",
    "clip": "tokens",
    "embedding": "embedding",
}


def build_model(config: Config) -> LatentDiffusion:
    """Build the model that a config describes."""
    first, second, data = config.autoencoder, config.diffusion, config.data
    return LatentDiffusion(
        autoencoder=build_autoencoder(first, data),
        unet=build_unet(
            second,
            latent_channels=first.latent_channels,
            num_classes=data.num_classes,
        ),
        conditioner=build_conditioner(second, num_classes=data.num_classes),
        schedule=build_schedule(second),
        prediction=second.prediction,
        sigma_data=second.sigma_data,
        image_shape=(data.image_size, data.image_size, data.image_channels),
        latent_shape=config.latent_shape,
        condition=second.condition,
        num_classes=data.num_classes,
        null_tokens=null_tokens(second.condition),
        chunk=config.sampling.chunk,
        precision=config.precision,
    )


def build_autoencoder(first: AutoencoderConfig, data: DataConfig) -> Autoencoder:
    """Build the first stage."""
    return Autoencoder(
        regularizer=first.regularizer,
        channels=first.channels,
        channel_multipliers=first.channel_multipliers,
        num_res_blocks=first.num_res_blocks,
        attention_levels=first.attention_levels(data.image_size),
        mid_attention=first.mid_attention,
        z_channels=first.encoder_channels,
        latent_channels=first.latent_channels,
        codebook_size=first.codebook_size,
        image_channels=data.image_channels,
        num_groups=first.num_groups,
        dtype=jnp.dtype(first.dtype),
    )


def build_schedule(second: DiffusionConfig) -> Schedule:
    """Build the noise levels of training."""
    match second.schedule:
        case "flow":
            return FlowSchedule(second.num_timesteps)
        case "edm":
            return EdmSchedule(
                num_timesteps=second.num_timesteps,
                sigma_min=second.sigma_min,
                sigma_max=second.sigma_max,
                sigma_data=second.sigma_data,
                log_mean=second.log_sigma_mean,
                log_std=second.log_sigma_std,
            )
        case discrete:
            return make_schedule(
                discrete,
                num_timesteps=second.num_timesteps,
                beta_start=second.beta_start,
                beta_end=second.beta_end,
                zero_terminal_snr=second.zero_terminal_snr,
            )


def build_unet(
    second: DiffusionConfig, *, latent_channels: int, num_classes: int
) -> UNet:
    """Build the UNet."""
    return UNet(
        out_channels=latent_channels,
        channels=second.channels,
        channel_multipliers=second.channel_multipliers,
        num_res_blocks=second.num_res_blocks,
        attention_downsampling=second.attention_downsampling,
        num_heads=second.num_heads,
        head_channels=second.head_channels,
        transformer_depth=second.transformer_depth,
        num_classes=num_classes if second.condition.label else 0,
        pooled_context=second.condition.pooled,
        coordinates=second.coordinates,
        scale_shift_norm=second.scale_shift_norm,
        resblock_updown=second.resblock_updown,
        num_groups=second.num_groups,
        epsilon=second.norm_epsilon,
        remat=second.remat,
        dtype=jnp.dtype(second.dtype),
    )


def build_conditioner(second: DiffusionConfig, *, num_classes: int) -> Conditioner:
    """Build the network that prepares the UNet's condition."""
    condition, dtype = second.condition, jnp.dtype(second.dtype)
    encoder, rescaler = None, None
    match condition.context:
        case "class":
            encoder = ClassEmbedding(num_classes, condition.class_width, dtype)
        case "text":
            encoder = TextTransformer(**dataclasses.asdict(condition.text), dtype=dtype)
        case "clip":
            encoder = ClipTextTransformer(
                **dataclasses.asdict(condition.clip), dtype=dtype
            )
        case "none" | "embedding":
            pass
    if condition.concat == "segmentation":
        rescaler = SpatialRescaler(
            condition.rescale_stages, condition.rescale_channels, dtype
        )
    return Conditioner(
        reads=INPUT_BY_CONTEXT[condition.context],
        encoder=encoder,
        rescaler=rescaler,
        adds_label=condition.label,
    )


def null_tokens(condition: ConditionConfig) -> tuple[int, ...]:
    """Return the tokens of the empty prompt; all 0 without a tokenizer.

    Raises:
      InputError: If the tokenizer's files cannot be read.
    """
    if condition.tokenizer is None:
        return (0,) * condition.num_tokens
    if condition.learns_tokenizer:
        return empty_prompt(condition.num_tokens)
    tokens = open_tokenizer(condition).encode([""])[0]
    return tuple(int(token) for token in tokens)


def open_tokenizer(condition: ConditionConfig) -> Tokenizer:
    """Open the tokenizer of a model that reads text.

    Raises:
      InputError: If no tokenizer is named, or its files cannot be read.
    """
    if condition.tokenizer is None:
        raise InputError(
            "diffusion.condition.tokenizer: not given, wanted the folder of the "
            "tokenizer's files to read words; try --tokenizer FOLDER"
        )
    folder = Path(condition.tokenizer)
    if condition.context == "clip":
        load = load_clip_tokenizer
    elif (folder / TOKENIZER_FILE).exists() and not (folder / WORDPIECE_FILE).exists():
        load = load_byte_pairs
    else:
        load = load_bert_tokenizer
    tokenizer = load(folder, length=condition.num_tokens)
    if tokenizer.vocab_size > condition.vocab_size:
        raise InputError(
            f"diffusion.condition.tokenizer: {condition.tokenizer} has "
            f"{tokenizer.vocab_size} tokens, wanted at most the model's "
            f"{condition.vocab_size}; try the tokenizer it was trained with"
        )
    return tokenizer


def open_split(config: Config, split: Split) -> Source:
    """Open a split, after a check that its examples match the config.

    Raises:
      InputError: If classes, channels, conditions or the number of examples differ.
    """
    data, condition = config.data, config.diffusion.condition
    trains_diffusion = "diffusion" in config.stages
    name = data.train_split if split == "train" else data.test_split
    needs = needs_of(condition) if trains_diffusion else ()
    source = open_source(
        data.source,
        name,
        directory=data.directory,
        needs=needs,
        image_size=data.image_size,
        max_broken_files=data.max_broken_files,
    )
    found = {}
    if "label" in needs:
        found["num_classes"] = source.num_classes
    if split == "train" and data.num_train_examples:
        found["num_train_examples"] = len(source.examples)
    for name, value in found.items():
        if getattr(data, name) != value:
            raise InputError(
                f"data.{name}: got {getattr(data, name)}, but {data.source} has "
                f"{value}; try --data.{name.replace('_', '-')} {value}"
            )
    first = source.examples[0]
    if "caption" in needs and "tokens" not in first and "caption" in first:
        if condition.learns_tokenizer:  # nothing but captions to check before training
            first = {**first, "tokens": null_tokens(condition)}
        else:
            words = TokenizedExamples(source.examples, open_tokenizer(condition))
            source, first = source._replace(examples=words), words[0]
    if trains_diffusion:
        check_example(condition, first, source=data.source)
    return source


def needs_of(condition: ConditionConfig) -> tuple[Need, ...]:
    """Return what examples must have for a condition, besides images."""
    needs: dict[Need, bool] = {
        "label": condition.uses_classes,
        "caption": condition.uses_tokens,
    }
    return tuple(need for need, needed in needs.items() if needed)


def check_example(
    condition: ConditionConfig, example: Mapping[str, Any], *, source: str
) -> None:
    """Check that an example of a source has the condition of a model.

    Raises:
      InputError: If an array is missing, or has another shape or range.
    """
    wanted: dict[str, tuple[int, ...] | None] = {}
    if condition.uses_classes:
        wanted["label"] = ()
    if condition.uses_tokens:
        wanted["tokens"] = (condition.num_tokens,)
    if condition.context == "embedding":
        wanted["embedding"] = (condition.embedding_length, condition.embedding_width)
    if condition.concat == "segmentation":
        wanted["segmentation"] = None
    for name, shape in wanted.items():
        if name not in example:
            raise InputError(
                f"data.source: {source} has no {name!r} but "
                f"{', '.join(example)}; the model is conditioned on it"
            )
        got = np.shape(example[name])
        if shape is not None and got != shape:
            raise InputError(
                f"data.source: {name!r} of {source} has the shape {got}, wanted {shape}"
            )
    limits = {"tokens": condition.vocab_size, "segmentation": condition.num_segments}
    for name in wanted.keys() & limits.keys():
        if np.max(example[name]) >= limits[name] or np.min(example[name]) < 0:
            raise InputError(
                f"data.source: {name!r} of {source} holds "
                f"{np.max(example[name])}, wanted 0 to {limits[name] - 1}"
            )


def open_iterator(config: Config, *, batch_size: int, layout: Layout) -> BatchIterator:
    """Open this process' part of the endless training stream, at its start."""
    data = config.data
    augment = Augment(config.seed, crop=data.crop == "random", flip=data.flip)
    prepare = functools.partial(
        prepare_example,
        image_size=data.image_size,
        image_channels=data.image_channels,
        augment=augment if augment.crop or augment.flip else None,
    )
    return make_iterator(
        open_split(config, "train").examples,
        prepare,
        batch_size=batch_size,
        seed=config.seed,
        process_index=layout.process_index,
        process_count=layout.process_count,
        num_threads=reading_threads(data.source),
    )


def load_split(config: Config, split: Split, *, limit: int | None = None) -> Batch:
    """Load a split, or `limit` of its examples, as the run sees its images."""
    examples = open_split(config, split).examples
    return load_all(
        examples,
        image_size=config.data.image_size,
        image_channels=config.data.image_channels,
        limit=limit,
    )


def shape_of(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return a stand-in for an array of which only the shape is used."""
    return jax.ShapeDtypeStruct(shape, dtype)
