"""Diffusers folders: which components there are, their configs and their tensors."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.files import printable
from ldm_jax.pretrained.strict_json import contained, read_json
from ldm_jax.pretrained.tensors import Tensors, open_tensors
from ldm_jax.types import InputError

PIPELINES = ("StableDiffusionPipeline", "LDMPipeline", "LDMTextToImagePipeline")

MODELS = (
    "UNet2DConditionModel",
    "UNet2DModel",
    "AutoencoderKL",
    "VQModel",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "LDMBertModel",
)

SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "HeunDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
)

TOKENIZERS = (
    "CLIPTokenizer",
    "CLIPTokenizerFast",
    "BertTokenizer",
    "BertTokenizerFast",
)

CONFIG_NAME_BY_CLASS: Mapping[str, str] = {
    **dict.fromkeys(MODELS, "config.json"),
    **dict.fromkeys(SCHEDULERS, "scheduler_config.json"),
    **dict.fromkeys(TOKENIZERS, "tokenizer_config.json"),
}
"""Every class that a component may be of, and the file that configures it."""

IGNORED_COMPONENTS = ("safety_checker", "feature_extractor", "image_encoder")
"""Of no use for drawing from a text: passed over whatever their class."""

WEIGHT_NAMES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
    "diffusion_pytorch_model.fp16.bin",
    "pytorch_model.fp16.bin",
)
"""Files of weights; the first that is there is read: full precision, then safety."""


class Component(NamedTuple):
    """One part of a pipeline."""

    name: str
    """Its role and folder, such as `unet`."""
    class_name: str
    """A key of `CONFIG_NAME_BY_CLASS`."""
    config: dict[str, Any]
    """Its JSON config."""
    directory: Path
    """Where its files are."""


class Folder(NamedTuple):
    """A diffusers folder."""

    root: Path
    """The folder."""
    pipeline: str | None
    """One of `PIPELINES`; None if the folder is one component."""
    components: dict[str, Component]
    """By name, without the ignored and the empty ones."""


def open_folder(path: Path) -> Folder:
    """Read the listing and the configs of a diffusers folder, and no tensor.

    Args:
      path: A folder with `model_index.json`, or of one model with `config.json`.

    Returns:
      What is in it.

    Raises:
      InputError: If something is missing, unknown, or leads out of the folder.
    """
    if (path / "model_index.json").exists():
        return _open_pipeline(path)
    if not (path / "config.json").exists():
        got = "no config in it" if path.is_dir() else "no folder there"
        raise InputError(
            f"{path}: got {got}, wanted model_index.json or config.json; try the "
            "folder that diffusers' save_pretrained wrote"
        )
    name = path.resolve().name
    config = read_json(contained(path, "config.json"))
    class_name = config.get("_class_name") or config.get("architectures")
    if isinstance(class_name, list) and class_name:
        class_name = class_name[0]
    component = Component(name, _known(path, class_name, MODELS), config, path)
    return Folder(path, None, {name: component})


def component_tensors(component: Component) -> Tensors:
    """Open the weights of a component: the first of `WEIGHT_NAMES` that is there.

    Args:
      component: A model.

    Returns:
      Its tensors, none of them read yet.

    Raises:
      InputError: If there are none, or they cannot be read.
    """
    for name in WEIGHT_NAMES:
        path = contained(component.directory, name)
        if path.exists():
            return open_tensors(path)
    raise InputError(
        f"{component.directory}: got a {component.class_name} without weights, wanted "
        f"one of {', '.join(WEIGHT_NAMES)}; try downloading it again"
    )


def _open_pipeline(path: Path) -> Folder:
    index = read_json(contained(path, "model_index.json"))
    pipeline = _known(path, index.get("_class_name"), PIPELINES)
    components = {
        name: _open_component(path, name, entry)
        for name, entry in index.items()
        if isinstance(entry, list)
        and not name.startswith("_")
        and name not in IGNORED_COMPONENTS
        and entry != [None, None]
    }
    return Folder(path, pipeline, components)


def _open_component(root: Path, name: str, entry: list[Any]) -> Component:
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise InputError(
            f"{root}: got a component named {printable(name)}, wanted a plain folder "
            "name; try another copy of the model"
        )
    got = entry[1] if len(entry) == 2 else entry  # a library and a class
    class_name = _known(f"{root}: {name}", got, tuple(CONFIG_NAME_BY_CLASS))
    directory = contained(root, name)
    if not directory.is_dir():
        raise InputError(
            f"{root}: got no folder {name}, wanted the {class_name} that "
            "model_index.json lists; try downloading it again"
        )
    config = read_json(contained(directory, CONFIG_NAME_BY_CLASS[class_name]))
    return Component(name, class_name, config, directory)


def _known(where: Path | str, class_name: object, known: tuple[str, ...]) -> str:
    if isinstance(class_name, str) and class_name in known:
        return class_name
    raise InputError(
        f"{where}: got the class {printable(str(class_name))}, wanted one of "
        f"{', '.join(known)}; try converting the weights to one of them"
    )
