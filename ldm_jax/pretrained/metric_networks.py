"""Weights of LPIPS, from any of the files they come in, to the tree of `Lpips`."""

from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from ldm_jax.models.discriminator_lpips import VGG_BLOCKS
from ldm_jax.models.inception import INCEPTION_SIDE, Inception
from ldm_jax.pretrained.layouts import Home, plain, read_tree
from ldm_jax.pretrained.layouts import Path as LeafPath
from ldm_jax.pretrained.tensors import Tensors, open_tensors
from ldm_jax.types import InputError, PyTree

UNREAD = ("fc.bias", "num_batches_tracked")
"""Ends of keys of what scores do not use: published scores leave the bias out."""
LEAF_NAMES = {"mean": "running_mean", "variance": "running_var"}


def inception_format(path: LeafPath) -> Home:
    """Return where a leaf of `Inception` is in files of pytorch-fid, torch-fidelity."""
    names = list(path[:-1])
    if names[0] != "fc":
        names[0] = names[0].capitalize()
    return plain(path, ".".join(names), leaf_names=LEAF_NAMES)


def load_inception(file: Path) -> PyTree:
    """Read the parameters of `Inception`.

    Args:
      file: `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, torch-fidelity's
        `weights-inception-2015-12-05-6726825d.pth`, or the same as safetensors. Read
        without torch; nothing in it is run.

    Returns:
      The tree, NumPy arrays, float32.

    Raises:
      InputError: If it cannot be read, or is of another network.
    """
    tensors = open_tensors(file)
    kept = Tensors.from_arrays(
        {key: tensors[key] for key in tensors if not key.endswith(UNREAD)}
    )
    what = f"{file}: the Inception network of FID"
    return read_tree(inception_shapes(), inception_format, kept, what=what)


def inception_shapes() -> PyTree:
    """Return the shapes of the parameters of `Inception`."""
    side = INCEPTION_SIDE
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(Inception().init, key, image)["params"]


CHECKPOINT_PREFIXES = (
    "first_stage_model.loss.perceptual_loss.",
    "loss.perceptual_loss.",
)
"""Where a checkpoint of an autoencoder keeps LPIPS."""

CONV_INDICES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""Places of VGG16's convolutions among its layers, as torchvision counts them."""
CONVS_BY_SLICE = (2, 2, 3, 3, 3)
"""How many of them lpips keeps in each slice."""


def load_lpips(files: tuple[str, ...]) -> PyTree:
    """Read the parameters of `Lpips`.

    Each file may hold VGG16, the linear heads, or both: torchvision's VGG16
    (`features.N.*`), lpips' network (`net.sliceK.N.*`) and heads (`linK.model.1.*`),
    or a latent-diffusion checkpoint that has them inside. Other tensors are not read.

    Args:
      files: Paths; together they must hold all.

    Returns:
      The tree, NumPy arrays, float32.

    Raises:
      InputError: If a file cannot be read, a part is in none of them or in two that
        differ, or a tensor is not what LPIPS has there.
    """
    found: dict[str, tuple[str, np.ndarray]] = {}
    for file in files:
        tensors = _lpips_part(open_tensors(Path(file)))
        for key, place in _place_by_key().items():
            if key not in tensors:
                continue
            array = tensors[key]
            if place in found and not np.array_equal(found[place][1], array):
                raise InputError(
                    f"perceptual_files: {found[place][0]} and {file} differ in {key}; "
                    "try only one of them"
                )
            found[place] = (file, array)
    shapes = _shape_by_place()
    missing = [place for place in shapes if place not in found]
    if missing:
        raise InputError(_missing_message(files, missing))
    tree: PyTree = {"vgg": {}}
    for place, wanted in shapes.items():
        file, array = found[place]
        if array.shape != wanted:
            raise InputError(
                f"perceptual_files: {file}: {place} has the shape {array.shape}, "
                f"wanted {wanted}; try VGG16's own weights"
            )
        module, leaf = place.split(".")
        if module.startswith("head"):
            if (array < 0.0).any():
                raise InputError(
                    f"perceptual_files: {file}: {place} has negative weights, wanted "
                    "none; try the heads of lpips 0.1 for VGG16"
                )
            tree[module] = {"kernel": array.reshape(-1, 1)}
        elif leaf == "weight":
            kernel = array.transpose(2, 3, 1, 0)
            tree["vgg"].setdefault(module, {})["kernel"] = kernel
        else:
            tree["vgg"].setdefault(module, {})["bias"] = array
    return tree


def _lpips_part(tensors: Tensors) -> Tensors:
    """Return what a checkpoint has of LPIPS, or all of a file that is none."""
    for prefix in CHECKPOINT_PREFIXES:
        part = tensors.under(prefix)
        if part:
            return part
    return tensors


def _conv_names() -> list[str]:
    return [
        f"conv{block}_{i}"
        for block, (_, num_convs) in enumerate(VGG_BLOCKS, start=1)
        for i in range(1, num_convs + 1)
    ]


def _place_by_key() -> dict[str, str]:
    """Return our place (`conv1_1.weight`, `head_0.weight`) for every accepted key."""
    slices = [k for k, num in enumerate(CONVS_BY_SLICE, start=1) for _ in range(num)]
    places = {}
    for name, index, k in zip(_conv_names(), CONV_INDICES, slices, strict=True):
        for leaf in ("weight", "bias"):
            places[f"features.{index}.{leaf}"] = f"{name}.{leaf}"
            places[f"net.slice{k}.{index}.{leaf}"] = f"{name}.{leaf}"
    for k in range(len(VGG_BLOCKS)):
        places[f"lin{k}.model.1.weight"] = f"head_{k}.weight"
    return places


def _shape_by_place() -> dict[str, tuple[int, ...]]:
    """Return the shape, as torch has it, of every tensor that LPIPS needs."""
    shapes: dict[str, tuple[int, ...]] = {}
    names, channels_in = iter(_conv_names()), 3
    for channels, num_convs in VGG_BLOCKS:
        for _ in range(num_convs):
            name = next(names)
            shapes[f"{name}.weight"] = (channels, channels_in, 3, 3)
            shapes[f"{name}.bias"] = (channels,)
            channels_in = channels
    for k, (channels, _) in enumerate(VGG_BLOCKS):
        shapes[f"head_{k}.weight"] = (1, channels, 1, 1)
    return shapes


def _missing_message(files: Iterable[str], missing: list[str]) -> str:
    parts = []
    if any(place.startswith("conv") for place in missing):
        parts.append("VGG16's convolutions (torchvision's vgg16 file)")
    if any(place.startswith("head") for place in missing):
        parts.append("LPIPS' linear heads (lpips' vgg.pth)")
    return (
        f"perceptual_files: {', '.join(files)} together lack {' and '.join(parts)}, "
        f"for one {missing[0]}; try adding that file"
    )
