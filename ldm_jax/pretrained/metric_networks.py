"""Weights of networks that compare images: Inception for scores, LPIPS for training."""

import re
from pathlib import Path

import jax
import numpy as np

from ldm_jax.config import AutoencoderConfig
from ldm_jax.models.discriminator_lpips import VGG_BLOCKS, VGG_MIN_SIDE, Lpips
from ldm_jax.models.inception import INCEPTION_SIDE, Inception
from ldm_jax.pretrained.layouts import (
    Kernel,
    Stored,
    key_shapes,
    module_leaf,
    read_tree,
)
from ldm_jax.pretrained.layouts import Path as LeafPath
from ldm_jax.pretrained.tensors import Tensors, open_tensors
from ldm_jax.types import InputError, PyTree

UNUSED_ENDINGS = ("fc.bias", "num_batches_tracked")
"""Endings of keys of Inception that scores do not use: published ones omit the bias."""
LEAF_NAMES = {"mean": "running_mean", "variance": "running_var"}

LPIPS_PREFIXES = (
    "first_stage_model.loss.perceptual_loss.",
    "loss.perceptual_loss.",
)
"""Prefixes of LPIPS in checkpoints of an autoencoder."""
CONV_INDICES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""Indices of VGG16's convolutions among its layers, in torchvision's order."""
CONV_NAMES = [
    f"conv{block}_{i}"
    for block, (_, num_convs) in enumerate(VGG_BLOCKS, start=1)
    for i in range(1, num_convs + 1)
]


def load_inception(file: Path) -> PyTree:
    """Read the parameters of `Inception`, as NumPy arrays.

    Args:
      file: `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, torch-fidelity's
        `weights-inception-2015-12-05-6726825d.pth`, or the same as safetensors. No code
        in it is run.

    Raises:
      InputError: If it cannot be read, or is of another network.
    """
    tensors = open_tensors(file)
    used = {k: e for k, e in tensors.entries.items() if not k.endswith(UNUSED_ENDINGS)}
    what = f"{file}: the Inception network of FID"
    return read_tree(inception_shapes(), inception_format, Tensors(used), what=what)


def inception_format(path: LeafPath) -> Stored:
    """Apply the format of pytorch-fid and torch-fidelity."""
    names = list(path[:-1])
    if names[0] != "fc":
        names[0] = names[0].capitalize()
    return module_leaf(path, ".".join(names), leaf_names=LEAF_NAMES)


def inception_shapes() -> PyTree:
    """Return the shapes of the parameters of `Inception`."""
    image = jax.ShapeDtypeStruct((1, INCEPTION_SIDE, INCEPTION_SIDE, 3), np.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(Inception().init, key, image)["params"]


def load_perceptual(autoencoder: AutoencoderConfig) -> PyTree:
    """Read the parameters of LPIPS; None if the loss does not use it.

    Raises:
      InputError: If the loss uses it and its files are not given or not those of LPIPS.
    """
    if not autoencoder.perceptual_weight:
        return None
    if not autoencoder.perceptual_files:
        raise InputError(
            "perceptual_files: got none, wanted the weights of VGG16 and of LPIPS' "
            "linear heads; try --autoencoder.perceptual-files FILE ..., "
            "--autoencoder.perceptual-weight 0, or --first-stage to train none"
        )
    return load_lpips(autoencoder.perceptual_files)


def load_lpips(files: tuple[str, ...]) -> PyTree:
    """Read the parameters of `Lpips`, as NumPy arrays.

    A file may hold VGG16, the linear heads, or both: torchvision's VGG16
    (`features.N.*`), lpips' network (`net.sliceK.N.*`) and heads (`linK.model.1.*`),
    or a latent-diffusion checkpoint that contains them. Other tensors are not read.

    Args:
      files: Paths; together they must hold all parameters.

    Raises:
      InputError: If a file cannot be read, a tensor is in no file or differs between
        two, or it does not fit LPIPS.
    """
    shapes = lpips_shapes()
    wanted = key_shapes(shapes, lpips_format)
    file_by_key: dict[str, str] = {}
    found = Tensors({})
    for file in files:
        for key, entry in _lpips_tensors(open_tensors(Path(file))).entries.items():
            if key not in wanted:
                continue
            one = Tensors({key: entry})
            if key in found and not np.array_equal(found[key], one[key]):
                raise InputError(
                    f"perceptual_files: {file_by_key[key]} and {file} differ in {key}; "
                    "try only one of them"
                )
            found.entries[key], file_by_key[key] = entry, file
    if missing := [key for key in wanted if key not in found]:
        raise InputError(_missing_message(files, missing))
    for key, file in file_by_key.items():
        if key.startswith("lin") and (found[key] < 0.0).any():
            raise InputError(
                f"perceptual_files: {file}: {key} has negative weights, wanted none; "
                "try the heads of lpips 0.1 for VGG16"
            )
    return read_tree(shapes, lpips_format, found, what="perceptual_files: LPIPS")


def lpips_format(path: LeafPath) -> Stored:
    """Apply the format of torchvision's VGG16 and lpips' heads."""
    if path[0] == "vgg":
        index = CONV_INDICES[CONV_NAMES.index(path[1])]
        return module_leaf(path, f"features.{index}")
    head = path[0].removeprefix("head_")
    return Stored((f"lin{head}.model.1.weight",), Kernel(2))


def lpips_shapes() -> PyTree:
    """Return the shapes of the parameters of `Lpips`."""
    image = jax.ShapeDtypeStruct((1, VGG_MIN_SIDE, VGG_MIN_SIDE, 3), np.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(Lpips().init, key, image, image)["params"]


def _lpips_tensors(tensors: Tensors) -> Tensors:
    """Return a checkpoint's LPIPS or a whole file, with torchvision's names."""
    parts = [part for prefix in LPIPS_PREFIXES if (part := tensors.under(prefix))]
    entries = (parts or [tensors])[0].entries
    return Tensors(
        {re.sub(r"^net\.slice\d\.", "features.", k): e for k, e in entries.items()}
    )


def _missing_message(files: tuple[str, ...], missing: list[str]) -> str:
    parts = []
    if any(key.startswith("features.") for key in missing):
        parts.append("VGG16's convolutions (torchvision's vgg16 file)")
    if any(key.startswith("lin") for key in missing):
        parts.append("LPIPS' linear heads (lpips' vgg.pth)")
    return (
        f"perceptual_files: got {', '.join(files)}, which lack {' and '.join(parts)}, "
        f"such as {missing[0]}; try adding that file"
    )
