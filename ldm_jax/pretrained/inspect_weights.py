"""A summary of what weights hold, without reading a tensor."""

import collections
import math
from pathlib import Path
from typing import Any

from ldm_jax.pretrained.diffusers_folder import (
    AUTOENCODERS,
    TEXT_ENCODERS,
    TOKENIZERS,
    UNETS,
    Folder,
    component_tensors,
    open_folder,
)
from ldm_jax.pretrained.model_weights import WEIGHTS_FILE, file_config
from ldm_jax.pretrained.open_weights import is_run
from ldm_jax.pretrained.tensors import Tensors, open_tensors


def inspect(path: Path) -> dict[str, Any]:
    """Return the format, parts, number of parameters and dtypes of weights, for JSON.

    Args:
      path: A folder or a file.

    Raises:
      InputError: If its format is unknown.
    """
    if path.is_dir() and (path / WEIGHTS_FILE).exists():
        return {"format": "ldm_jax", **_summary(open_tensors(path / WEIGHTS_FILE))}
    if is_run(path):
        return {"format": "ldm_jax run", "try": f"ldm export {path} --out FOLDER"}
    if path.is_dir():
        return _inspect_folder(open_folder(path))
    tensors = open_tensors(path)
    return {
        "format": "file",
        "carries_config": file_config(tensors) is not None,
        "tensors_by_group": collections.Counter(key.split(".")[0] for key in tensors),
        **_summary(tensors),
    }


def _inspect_folder(folder: Folder) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for name, component in folder.components.items():
        parts[name] = {"class": component.class_name}
        if component.class_name in (*AUTOENCODERS, *UNETS, *TEXT_ENCODERS):
            parts[name] |= _summary(component_tensors(component))
        elif component.class_name not in TOKENIZERS:
            kept = ("beta_schedule", "prediction_type")
            parts[name] |= {key: component.config.get(key) for key in kept}
    return {"format": "diffusers", "pipeline": folder.pipeline, "parts": parts}


def _summary(tensors: Tensors) -> dict[str, Any]:
    return {
        "tensors": len(tensors),
        "parameters": sum(math.prod(tensors.shape(key)) for key in tensors),
        "tensors_by_dtype": collections.Counter(tensors.dtype(key) for key in tensors),
    }
