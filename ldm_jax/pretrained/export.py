"""A whole model written for strangers: a diffusers folder, or one CompVis file."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ldm_jax.config import Config, to_json
from ldm_jax.config.run import without_tokenizer
from ldm_jax.data.tokenizer import WORDPIECE_FILE, tokenizer_files
from ldm_jax.files import write_safetensors
from ldm_jax.pretrained import compvis, diffusers
from ldm_jax.pretrained.export_configs import (
    write_autoencoder,
    write_clip,
    write_scheduler,
    write_unet,
)
from ldm_jax.pretrained.layouts import flatten, write_tree
from ldm_jax.pretrained.model import (
    CONFIG_METADATA,
    OWN_CONFIG,
    SCALE_METADATA,
    ModelWeights,
)
from ldm_jax.types import InputError, PyTree

DtypeName = Literal["float32", "float16", "bfloat16"]
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS_NAME = "model.safetensors"
OWN_CONDITIONER = "conditioner"
NO_COMPONENT = [None, None]


def write_folder(
    weights: ModelWeights, out: Path, *, dtype: DtypeName = "float32"
) -> None:
    """Write a folder that diffusers opens, as a pipeline where one fits.

    Beside diffusers' own configs it holds ours, which says more: the conditions, the
    training, the data.

    Args:
      weights: What to write.
      out: The folder; empty.
      dtype: Of the numbers; float32 loses nothing.

    Raises:
      InputError: If no class of diffusers holds a network, or a number is too large
        for the dtype.
      OSError: If it cannot be written.
    """
    config, scale = weights.config, _scale_of(weights)
    parts: dict[str, tuple[str, dict[str, Any], PyTree]] = {}
    pipeline = _pipeline(config) if weights.unet is not None else None
    name, settings = write_autoencoder(config, latent_scale=scale)
    role = "vqvae" if pipeline == "LDMPipeline" else "vae"
    tensors = write_tree(weights.autoencoder, diffusers.autoencoder_format(config))
    parts[role] = (name, settings, tensors)
    if weights.unet is not None:
        name, settings = write_unet(config)
        tensors = write_tree(weights.unet, diffusers.unet_format(config))
        parts["unet"] = (name, settings, tensors)
    if config.diffusion.condition.context == "clip" and weights.conditioner:
        name, settings = write_clip(config)
        parts["text_encoder"] = (name, settings, _clip_tensors(weights))
    for role, (name, settings, tensors) in parts.items():
        folder = out / role
        folder.mkdir()
        settings = {"_class_name": name, **settings}
        _write_json(folder / "config.json", settings)
        is_text = role == "text_encoder"
        file = TEXT_WEIGHTS_NAME if is_text else WEIGHTS_NAME
        metadata = {"format": "pt"}
        write_safetensors(folder / file, _cast(tensors, dtype), metadata)
    if weights.conditioner and "text_encoder" not in parts:
        folder = out / OWN_CONDITIONER
        folder.mkdir()
        own = _cast(
            {
                k: np.asarray(v, np.float32)
                for k, v in flatten(weights.conditioner).items()
            },
            dtype,
        )
        write_safetensors(folder / TEXT_WEIGHTS_NAME, own)
    index = {role: ["diffusers", part[0]] for role, part in parts.items()}
    if weights.unet is not None:
        name, settings = write_scheduler(config)
        (out / "scheduler").mkdir()
        settings = {"_class_name": name, **settings}
        _write_json(out / "scheduler" / "scheduler_config.json", settings)
        index["scheduler"] = ["diffusers", name]
    _write_tokenizer(config, out)
    (out / OWN_CONFIG).write_text(to_json(without_tokenizer(config)))
    if pipeline is not None:
        _write_index(out, pipeline, index, has_tokenizer=(out / "tokenizer").exists())


def _pipeline(config: Config) -> str | None:
    """Name the pipeline that runs such a model; None if diffusers has none."""
    condition = config.diffusion.condition
    if condition.label or condition.concat != "none":
        return None
    if config.diffusion.schedule == "flow":
        return None  # its scheduler lacks `init_noise_sigma`, which they read
    if condition.context == "clip" and condition.clip.output != "pooled":
        return "StableDiffusionPipeline"
    return "LDMPipeline" if condition.context == "none" else None


def _write_index(
    out: Path, pipeline: str, index: dict[str, Any], *, has_tokenizer: bool
) -> None:
    if pipeline == "StableDiffusionPipeline":
        if not has_tokenizer:
            return
        index["text_encoder"] = ["transformers", index["text_encoder"][1]]
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
        index |= dict.fromkeys(
            ("safety_checker", "feature_extractor", "image_encoder"), NO_COMPONENT
        )
        index["requires_safety_checker"] = False
    _write_json(out / "model_index.json", {"_class_name": pipeline, **index})


def _write_tokenizer(config: Config, out: Path) -> None:
    tokenizer = config.diffusion.condition.tokenizer
    if tokenizer is None:
        return
    (out / "tokenizer").mkdir()
    for path in tokenizer_files(Path(tokenizer)):
        shutil.copyfile(path, out / "tokenizer" / path.name)
    settings = out / "tokenizer" / "tokenizer_config.json"
    if not settings.exists():
        length = config.diffusion.condition.num_tokens
        name = "PreTrainedTokenizerFast"
        if config.diffusion.condition.context == "clip":
            name = "CLIPTokenizer"
        elif (out / "tokenizer" / WORDPIECE_FILE).exists():
            name = "BertTokenizer"
        kind = {"tokenizer_class": name, "model_max_length": length}
        _write_json(settings, kind)


def _clip_tensors(weights: ModelWeights) -> dict[str, np.ndarray]:
    clip = weights.config.diffusion.condition.clip
    encoder = dict(weights.conditioner["encoder"])
    if clip.output == "penultimate":
        del encoder[f"layer_{clip.depth - 1}"]
    return write_tree(encoder, diffusers.clip_format())


def write_compvis(
    weights: ModelWeights, out: Path, *, dtype: DtypeName = "float32"
) -> None:
    """Write one safetensors file in CompVis naming, our config in its metadata.

    Args:
      weights: What to write.
      out: The file; must not be there.
      dtype: Of the numbers; float32 loses nothing.

    Raises:
      InputError: If the file is there, or a number is too large for the dtype.
      OSError: If it cannot be written.
    """
    if out.exists():
        raise InputError(f"--out: {out} is there; try another name")
    if out.suffix != ".safetensors":
        raise InputError(f"--out: got {out}, wanted a name that ends in .safetensors")
    config = weights.config
    autoencoder = write_tree(weights.autoencoder, compvis.autoencoder_format(config))
    metadata = {
        CONFIG_METADATA: to_json(without_tokenizer(config)),
        SCALE_METADATA: repr(_scale_of(weights)),
    }
    if weights.unet is None:
        _write_file(out, _cast(autoencoder, dtype), metadata)
        return
    unet = write_tree(weights.unet, compvis.unet_format(config))
    conditioner: dict[str, np.ndarray] = {}
    if weights.conditioner:
        format_ = compvis.conditioner_format(config)
        conditioner = compvis.join_in_proj(write_tree(weights.conditioner, format_))
    tensors = _cast(
        {
            **_prefixed(compvis.UNET_PREFIX, unet),
            **_prefixed(compvis.AUTOENCODER_PREFIX, autoencoder),
            **_prefixed(compvis.CONDITIONER_PREFIX, conditioner),
        },
        dtype,
    )
    _write_file(out, tensors, metadata)


def _write_file(
    out: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(out, tensors, metadata)


def _prefixed(prefix: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + key: value for key, value in tensors.items()}


def _cast(tensors: Mapping[str, np.ndarray], dtype: DtypeName) -> dict[str, np.ndarray]:
    if dtype == "float32":
        return dict(tensors)
    import ml_dtypes

    target = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    cast: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        with np.errstate(over="ignore"):
            cast[key] = value.astype(target)
        if not np.isfinite(cast[key].astype(np.float32)).all():
            raise InputError(
                f"--dtype: {key} has numbers too large for {dtype}; try bfloat16 or "
                "float32"
            )
    return cast


def _scale_of(weights: ModelWeights) -> float:
    if weights.latent_scale is None:
        raise InputError(
            "latent scale: not known for this model; finish the run that measures it"
        )
    return weights.latent_scale


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
