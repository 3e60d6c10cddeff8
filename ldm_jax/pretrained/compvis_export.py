"""Export of a model as one safetensors file in CompVis naming."""

from pathlib import Path

from ldm_jax.config import to_json
from ldm_jax.config.run import without_tokenizer
from ldm_jax.files import write_safetensors
from ldm_jax.pretrained import compvis_names
from ldm_jax.pretrained.layouts import write_tree
from ldm_jax.pretrained.model_weights import (
    CONFIG_METADATA,
    SCALE_METADATA,
    DtypeName,
    ModelWeights,
    cast,
    known_scale,
)
from ldm_jax.types import InputError


def write_compvis(
    weights: ModelWeights, out: Path, *, dtype: DtypeName = "float32"
) -> None:
    """Write one safetensors file in CompVis naming, with our config in its metadata.

    Args:
      out: The file; must not exist.
      dtype: Dtype of the parameters; float32 is lossless.

    Raises:
      InputError: If the file exists or cannot be written, or a number is too large for
        the dtype.
    """
    if out.exists():
        raise InputError(f"--out: {out} is there; try another name")
    config = weights.config
    tensors = write_tree(weights.autoencoder, compvis_names.autoencoder_format)
    if weights.unet is not None:
        unet_format = compvis_names.unet_format(config.diffusion)
        format_ = compvis_names.conditioner_format(config.diffusion.condition)
        conditioner = write_tree(weights.conditioner, format_)
        tensors = {
            prefix + key: value
            for prefix, part in (
                (compvis_names.UNET_PREFIX, write_tree(weights.unet, unet_format)),
                (compvis_names.AUTOENCODER_PREFIX, tensors),
                (
                    compvis_names.CONDITIONER_PREFIX,
                    compvis_names.join_in_proj(conditioner),
                ),
            )
            for key, value in part.items()
        }
    metadata = {
        CONFIG_METADATA: to_json(without_tokenizer(config)),
        SCALE_METADATA: repr(known_scale(weights)),
    }
    converted = cast(tensors, dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(out, converted, metadata)
