"""Diffusers folders: their components, configs and tensors."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.files import printable
from ldm_jax.pretrained.contained_path import contained
from ldm_jax.pretrained.strict_json import read_json
from ldm_jax.pretrained.tensors import Tensors, open_tensors
from ldm_jax.types import InputError

OWN_CONFIG = "ldm_jax.json"
"""Our config in a folder that `write_folder` wrote."""

PIPELINES = ("StableDiffusionPipeline", "LDMPipeline", "LDMTextToImagePipeline")
AUTOENCODERS = ("AutoencoderKL", "VQModel")
UNETS = ("UNet2DModel", "UNet2DConditionModel")
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
MODELS = (*UNETS, *AUTOENCODERS, *TEXT_ENCODERS, "LDMBertModel")
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
CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
TOKENIZERS = (*CLIP_TOKENIZERS, "BertTokenizer", "BertTokenizerFast")

CONFIG_NAME_BY_CLASS: Mapping[str, str] = {
    **dict.fromkeys(MODELS, "config.json"),
    **dict.fromkeys(SCHEDULERS, "scheduler_config.json"),
    **dict.fromkeys(TOKENIZERS, "tokenizer_config.json"),
}
"""Config file of every component class that is accepted."""

IGNORED_COMPONENTS = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that text-to-image sampling does not use."""

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
"""Names of weights files in order of preference: full precision, then safetensors."""


class Component(NamedTuple):
    """One part of a pipeline."""

    name: str
    """Its role and folder, such as `unet`."""
    class_name: str
    """A key of `CONFIG_NAME_BY_CLASS`."""
    config: dict[str, Any]
    """Its JSON config."""
    directory: Path
    """Its folder."""


class Folder(NamedTuple):
    """A diffusers folder."""

    root: Path
    """The folder."""
    pipeline: str | None
    """One of `PIPELINES`; None for models without a pipeline."""
    components: dict[str, Component]
    """Components by name, without ignored and empty ones."""

    def find(self, classes: tuple[str, ...]) -> Component | None:
        """Return the component of one of these classes; None if there is none."""
        for component in self.components.values():
            if component.class_name in classes:
                return component
        return None

    def get(self, classes: tuple[str, ...]) -> Component:
        """Return the component of one of these classes.

        Raises:
          InputError: If there is none.
        """
        component = self.find(classes)
        if component is None:
            raise InputError(
                f"{self.root}: got {', '.join(self.components) or 'nothing'}, wanted a "
                f"{' or '.join(classes)} among it; try the folder of the whole pipeline"
            )
        return component


def open_folder(path: Path) -> Folder:
    """Read the index and the configs of a diffusers folder, and no tensor.

    Args:
      path: A pipeline (`model_index.json`), one model (`config.json`), or a folder with
        `OWN_CONFIG` and models in sub-folders.

    Raises:
      InputError: If something is missing, unknown, or leads out of the folder.
    """
    if (path / "model_index.json").exists():
        return _open_pipeline(path)
    if (path / OWN_CONFIG).exists():
        parts = [p for p in sorted(path.iterdir()) if (p / "config.json").exists()]
        models = [_open_model(part) for part in parts]
    else:
        models = [_open_model(path)]
    return Folder(path, None, {model.name: model for model in models})


def component_tensors(component: Component) -> Tensors:
    """Open the weights of a model: the first of `WEIGHT_NAMES` that is there.

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


def _open_model(path: Path) -> Component:
    if not (path / "config.json").exists():
        got = "no config in it" if path.is_dir() else "no folder there"
        raise InputError(
            f"{path}: got {got}, wanted model_index.json or config.json; try the "
            "folder that diffusers' save_pretrained wrote"
        )
    config = read_json(contained(path, "config.json"))
    class_name = config.get("_class_name") or config.get("architectures")
    if isinstance(class_name, list) and class_name:
        class_name = class_name[0]
    class_name = _known(path, class_name, MODELS)
    return Component(path.resolve().name, class_name, config, path)


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
