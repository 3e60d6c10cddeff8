"""Diffusers folders: their components, configs and tensors."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.files import printable, read_json
from ldm_jax.pretrained.contained_path import contained
from ldm_jax.pretrained.diffusers_configs import FLOW_SCHEDULERS, SCHEDULER_DEFAULTS
from ldm_jax.pretrained.diffusers_names import rename_old_attention
from ldm_jax.pretrained.tensors import Tensors, open_tensors
from ldm_jax.types import InputError

OWN_CONFIG = "ldm_jax.json"
"""Our config in a folder that `write_folder` wrote."""

AUTOENCODERS = ("AutoencoderKL", "VQModel")
UNETS = ("UNet2DModel", "UNet2DConditionModel")
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")
MODELS = (*UNETS, *AUTOENCODERS, *TEXT_ENCODERS, "LDMBertModel")
SCHEDULERS = (*SCHEDULER_DEFAULTS, *FLOW_SCHEDULERS)
"""Schedulers of which a config may omit the noise levels; others must state them."""
CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
TOKENIZERS = (*CLIP_TOKENIZERS, "BertTokenizer", "BertTokenizerFast")
CLASSES_BY_ROLE: Mapping[str, tuple[str, ...]] = {
    "unet": UNETS,
    "vae": AUTOENCODERS,
    "vqvae": AUTOENCODERS,
    "text_encoder": TEXT_ENCODERS,
    "bert": ("LDMBertModel",),
    "tokenizer": TOKENIZERS,
}
"""Classes that a component of a usual name may have; a scheduler may have any."""
CLASS_BY_MODEL_TYPE = {"clip_text_model": "CLIPTextModel", "clip": "CLIPModel"}
"""Classes of a config of transformers that does not name its architecture."""

CONFIG_NAME_BY_CLASS: Mapping[str, str] = {
    **dict.fromkeys(MODELS, "config.json"),
    **dict.fromkeys(SCHEDULERS, "scheduler_config.json"),
    **dict.fromkeys(TOKENIZERS, "tokenizer_config.json"),
}
"""Config file of every component class that is known."""

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
WEIGHTS_PATTERN = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)"
    r"(?:\.(?P<first>[\w-]+))?\.(?:safetensors|bin)"
    r"(?:(?:\.(?P<second>[\w-]+))?\.index(?:\.(?P<third>[\w-]+))?\.json)?"
)
"""Any other name, with a variant such as `non_ema`, of a file or of an index."""
SHARD_PATTERN = re.compile(r".*-\d{5}-of-\d{5}")


class Component(NamedTuple):
    """One part of a pipeline."""

    name: str
    """Its role and folder, such as `unet`."""
    class_name: str
    """A key of `CONFIG_NAME_BY_CLASS`, or any scheduler."""
    config: dict[str, Any]
    """Its JSON config."""
    directory: Path
    """Its folder."""


class Folder(NamedTuple):
    """A diffusers folder."""

    root: Path
    """The folder."""
    pipeline: str | None
    """Class of the pipeline; None for models without one."""
    components: dict[str, Component]
    """Components by name, without ignored and empty ones."""

    def find(self, classes: tuple[str, ...]) -> Component | None:
        """Return the component of one of these classes; None if there is none."""
        for component in self.components.values():
            if component.class_name in classes:
                return component
        return None

    @property
    def scheduler(self) -> Component | None:
        """The component that is a scheduler of any class, if there is one."""
        for component in self.components.values():
            if is_scheduler(component.class_name):
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
    if contained(path, OWN_CONFIG).exists():
        parts = [p for p in sorted(path.iterdir()) if (p / "config.json").exists()]
        models = [_open_model(contained(path, part.name)) for part in parts]
    else:
        models = [_open_model(path)]
    return Folder(path, None, {model.name: model for model in models})


def component_tensors(component: Component) -> Tensors:
    """Open a model's weights: the first of `WEIGHT_NAMES`, else the only variant.

    Raises:
      InputError: If there are none, or they cannot be read.
    """
    for name in WEIGHT_NAMES:
        path = contained(component.directory, name)
        if path.exists():
            return rename_old_attention(open_tensors(path))
    if name := _other_weights(component.directory):
        path = contained(component.directory, name)
        return rename_old_attention(open_tensors(path))
    raise InputError(
        f"{component.directory}: got a {component.class_name} without weights, wanted "
        f"one of {', '.join(WEIGHT_NAMES)}; try downloading it again"
    )


def is_scheduler(class_name: object) -> bool:
    """Return whether a name is that of a scheduler class."""
    return isinstance(class_name, str) and bool(
        re.fullmatch(r"[A-Za-z]\w*Scheduler", class_name, re.ASCII)
    )


def _other_weights(directory: Path) -> str | None:
    """Find the weights whose name is not one of `WEIGHT_NAMES`.

    Raises:
      InputError: If there are several variants, whose numbers may differ.
    """
    names_by_variant: dict[str, list[str]] = {}
    for path in directory.iterdir():
        match = WEIGHTS_PATTERN.fullmatch(path.name)
        if match is not None and not SHARD_PATTERN.match(path.name):
            variant = match["first"] or match["second"] or match["third"] or ""
            names_by_variant.setdefault(variant, []).append(path.name)
    if not names_by_variant:
        return None
    variants = [""] if "" in names_by_variant else sorted(names_by_variant)
    if len(variants) > 1:
        raise InputError(
            f"{directory}: got weights of the variants {', '.join(variants)}, wanted "
            f"one or {WEIGHT_NAMES[0]}; try removing the others"
        )
    # Safetensors, then pickles; a file, then an index.
    return min(
        names_by_variant[variants[0]],
        key=lambda name: (".bin" in name, name.endswith(".json"), name),
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
    model_type = config.get("model_type")
    if class_name is None and isinstance(model_type, str):
        class_name = CLASS_BY_MODEL_TYPE.get(model_type)
    class_name = _known(path, class_name, MODELS)
    return Component(path.resolve().name, class_name, config, path)


def _open_pipeline(path: Path) -> Folder:
    index = read_json(contained(path, "model_index.json"))
    pipeline = index.get("_class_name")
    # Of a pipeline its components tell what it computes; SDXL has two text encoders.
    if not isinstance(pipeline, str) or "XL" in pipeline:
        raise InputError(
            f"{path}: got the class {printable(str(pipeline))}, wanted a pipeline of "
            "an autoencoder, a UNet and at most one text encoder, such as "
            "StableDiffusionPipeline; try another model"
        )
    ignored = set(IGNORED_COMPONENTS)
    if index.get("text_encoder") in (None, [None, None]):
        ignored -= {"image_encoder"}  # which then conditions the UNet
    components = {
        name: _open_component(path, name, entry)
        for name, entry in index.items()
        if isinstance(entry, list)
        and not name.startswith("_")
        and name not in ignored
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
    class_name = _component_class(f"{root}: {name}", name, got)
    directory = contained(root, name)
    if not directory.is_dir():
        raise InputError(
            f"{root}: got no folder {name}, wanted the {class_name} that "
            "model_index.json lists; try downloading it again"
        )
    file = CONFIG_NAME_BY_CLASS.get(class_name, "scheduler_config.json")
    path = contained(directory, file)
    # transformers needs no config of a tokenizer.
    if class_name in TOKENIZERS and not path.exists():
        return Component(name, class_name, {}, directory)
    return Component(name, class_name, read_json(path), directory)


def _component_class(where: str, name: str, got: object) -> str:
    if name == "scheduler" and not is_scheduler(got):
        raise InputError(
            f"{where}: got the class {printable(str(got))}, wanted a scheduler, such "
            f"as {SCHEDULERS[0]}; try converting it to one"
        )
    if name not in CLASSES_BY_ROLE and is_scheduler(got):
        return str(got)
    return _known(where, got, CLASSES_BY_ROLE.get(name, (*MODELS, *TOKENIZERS)))


def _known(where: Path | str, class_name: object, known: tuple[str, ...]) -> str:
    if isinstance(class_name, str) and class_name in known:
        return class_name
    raise InputError(
        f"{where}: got the class {printable(str(class_name))}, wanted one of "
        f"{', '.join(known)}; try converting the weights to one of them"
    )
