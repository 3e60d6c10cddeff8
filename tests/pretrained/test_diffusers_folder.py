import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from ldm_jax.files import write_safetensors
from ldm_jax.pretrained.diffusers_folder import (
    CONFIG_NAME_BY_CLASS,
    WEIGHT_NAMES,
    Component,
    component_tensors,
    open_folder,
)
from ldm_jax.types import InputError

MATRIX = np.arange(6, dtype=np.float32).reshape(2, 3)
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "image_encoder": [None, None],
    "requires_safety_checker": True,
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_folder(root: Path, **changes) -> Path:
    """Write Stable Diffusion's layout, with no weights in it."""
    write_json(root / "model_index.json", {**INDEX, **changes})
    for name in PARTS:
        write_json(root / name / CONFIG_NAME_BY_CLASS[INDEX[name][1]], {"of": name})
    return root


def unet(directory: Path) -> Component:
    directory.mkdir(exist_ok=True)
    return Component("unet", "UNet2DConditionModel", {}, directory)


def refusal(root: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_folder(root)
    message = str(caught.value)
    assert "\n" not in message and "try " in message and str(root) in message
    return message.replace(str(root), "")


def test_a_pipeline_is_its_components_with_their_configs(tmp_path):
    folder = open_folder(write_folder(tmp_path))
    assert folder.root == tmp_path and folder.pipeline == "StableDiffusionPipeline"
    assert set(folder.components) == set(PARTS)
    assert folder.components["vae"] == Component(
        "vae", "AutoencoderKL", {"of": "vae"}, tmp_path / "vae"
    )


def test_the_ldm_text_to_image_pipeline_is_known(tmp_path):
    index = {
        "_class_name": "LDMTextToImagePipeline",
        "bert": ["latent_diffusion", "LDMBertModel"],
        "tokenizer": ["transformers", "BertTokenizer"],
        "vqvae": ["diffusers", "AutoencoderKL"],
    }
    write_json(tmp_path / "model_index.json", index)
    for path in ("bert/config", "tokenizer/tokenizer_config", "vqvae/config"):
        write_json(tmp_path / f"{path}.json", {})
    assert set(open_folder(tmp_path).components) == {"bert", "tokenizer", "vqvae"}


@pytest.mark.parametrize(
    "name",
    ["StableDiffusionImg2ImgPipeline", "StableDiffusionPAGPipeline"]
    + ["LatentConsistencyModelPipeline", "StableDiffusionInpaintPipelineLegacy"],
)
def test_what_a_pipeline_is_made_of_decides_and_not_its_name(name, tmp_path):
    folder = open_folder(write_folder(tmp_path, _class_name=name))
    assert folder.pipeline == name and set(folder.components) == set(PARTS)


@pytest.mark.parametrize(
    "name",
    ["DEISMultistepScheduler", "LCMScheduler", "EDMEulerScheduler", "XScheduler"],
)
def test_a_scheduler_of_any_class_is_opened(name, tmp_path):
    folder = open_folder(write_folder(tmp_path, scheduler=["diffusers", name]))
    assert folder.scheduler == Component(
        "scheduler", name, {"of": "scheduler"}, tmp_path / "scheduler"
    )


@pytest.mark.parametrize(
    ("role", "words", "others"),
    [
        ("unet", ["UNet2DModel"], ["Scheduler", "Tokenizer", "Autoencoder"]),
        ("vae", ["AutoencoderKL", "VQModel"], ["UNet2DModel", "Tokenizer"]),
        ("scheduler", ["DDIMScheduler"], ["UNet2D", "CLIP"]),
        ("tokenizer", ["CLIPTokenizer"], ["Scheduler", "CLIPTextModel"]),
        ("text_encoder", ["CLIPTextModel"], ["Tokenizer", "UNet2D"]),
    ],
)
def test_an_error_lists_what_a_component_may_be_and_no_more(
    role, words, others, tmp_path
):
    message = refusal(write_folder(tmp_path, **{role: ["diffusers", "Other"]}))
    assert all(word in message for word in words)
    assert not any(other in message for other in others)


def test_a_tokenizer_needs_no_config(tmp_path):
    root = write_folder(tmp_path)
    (root / "tokenizer" / "tokenizer_config.json").unlink()
    assert open_folder(root).components["tokenizer"].config == {}


def test_an_absent_component_is_skipped(tmp_path):
    folder = open_folder(write_folder(tmp_path, text_encoder=[None, None]))
    assert "text_encoder" not in folder.components


@pytest.mark.parametrize(
    ("config", "class_name"),
    [
        ({"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
        ({"architectures": ["CLIPTextModel"]}, "CLIPTextModel"),
        ({"model_type": "clip_text_model"}, "CLIPTextModel"),
        ({"architectures": None, "model_type": "clip_text_model"}, "CLIPTextModel"),
        ({"architectures": ["CLIPModel"], "model_type": "clip"}, "CLIPModel"),
    ],
)
def test_a_folder_may_be_one_component(config, class_name, tmp_path):
    write_json(tmp_path / "vae" / "config.json", config)
    folder = open_folder(tmp_path / "vae")
    assert folder.pipeline is None
    assert folder.components == {
        "vae": Component("vae", class_name, config, tmp_path / "vae")
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "StableDiffusionXLPipeline"},
        {"_class_name": None},
        {"scheduler": ["diffusers", "AutoencoderKL"]},
        {"scheduler": ["diffusers", "os.Scheduler"]},
        {"unet": ["diffusers", "DDIMScheduler"]},
        {"vae": ["diffusers", "UNet2DConditionModel"]},
        {"text_encoder": None, "image_encoder": ["transformers", "CLIPVisionModel"]},
        {"_class_name": ["StableDiffusionPipeline"]},
        {"unet": ["diffusers", "UNet3DConditionModel"]},
        {"unet": ["diffusers", None]},
        {"unet": ["os", "system"]},
        {"unet": ["UNet2DConditionModel", "diffusers"]},
        {"unet": ["UNet2DConditionModel"]},
        {"unet": ["diffusers", ["UNet2DConditionModel"]]},
    ],
)
def test_an_unknown_class_is_refused(changes, tmp_path):
    assert "got the class" in refusal(write_folder(tmp_path, **changes))


@pytest.mark.parametrize(
    "config",
    [{}, {"_class_name": "DDIMScheduler"}, {"architectures": ["BertModel"]}]
    + [{"architectures": []}, {"_class_name": 3}]
    + [{"model_type": "clip_vision_model"}, {"model_type": ["clip"]}],
)
def test_an_unknown_single_component_is_refused(config, tmp_path):
    write_json(tmp_path / "config.json", config)
    assert "got the class" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["../unet", "/unet", "a/b", "..", ".", "", "a\\b", "\0", "ü", "a b", "-x"]
)
def test_a_component_must_have_a_plain_name(name, tmp_path):
    write_json(tmp_path / "unet" / "config.json", {})
    root = write_folder(tmp_path / "in", **{name: ["diffusers", "UNet2DModel"]})
    assert "plain folder name" in refusal(root)


def test_a_missing_component_folder_is_named(tmp_path):
    root = write_folder(tmp_path)
    (root / "vae" / "config.json").rename(root / "config.json")
    (root / "vae").rmdir()
    assert "vae" in refusal(root)


def test_a_missing_config_is_named(tmp_path):
    root = write_folder(tmp_path)
    (root / "scheduler" / "scheduler_config.json").unlink()
    assert "scheduler_config.json" in refusal(root)


def test_a_folder_without_a_config_is_refused(tmp_path):
    assert "no config" in refusal(tmp_path)
    assert "no folder" in refusal(tmp_path / "none")


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", "", "{", "[" * 99_999, "\udcff"]
)
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json"])
def test_json_that_is_not_an_object_is_refused(name, content, tmp_path):
    root = write_folder(tmp_path)
    (root / name).write_bytes(content.encode(errors="surrogateescape"))
    assert name in refusal(root)


def test_opening_a_folder_opens_no_tensor(tmp_path):
    root = write_folder(tmp_path)
    (root / "unet" / WEIGHT_NAMES[0]).write_bytes(b"damaged")
    folder = open_folder(root)
    with pytest.raises(InputError, match="damaged"):
        component_tensors(folder.components["unet"])


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet", "unet/config.json", "config.json"]
)
def test_a_link_that_leaves_the_folder_is_refused(name, tmp_path):
    root, outside = write_folder(tmp_path / "in"), tmp_path / "out"
    if name == "config.json":
        (root / "model_index.json").rename(root / name)
    (root / name).rename(outside)
    (root / name).symlink_to(outside)
    assert "leaves the folder" in refusal(root)


def test_weights_behind_a_link_that_leaves_the_folder_are_refused(tmp_path):
    write_safetensors(tmp_path / "x", {"w": MATRIX})
    component = unet(tmp_path / "unet")
    (component.directory / WEIGHT_NAMES[0]).symlink_to(tmp_path / "x")
    with pytest.raises(InputError, match="leaves the folder"):
        component_tensors(component)


def test_a_link_inside_the_folder_is_followed(tmp_path):
    root = write_folder(tmp_path)
    (root / "vae").rename(root / "vae_1")
    (root / "vae").symlink_to("vae_1")
    assert open_folder(root).components["vae"].config == {"of": "vae"}


def write_cache(cache: Path) -> Path:
    """Write the layout of the Hugging Face cache: every file is a link to a blob."""
    snapshot = write_folder(cache / "snapshots" / "abc")
    write_safetensors(snapshot / "unet" / WEIGHT_NAMES[0], {"w": MATRIX})
    (cache / "blobs").mkdir()
    for i, path in enumerate(sorted(snapshot.rglob("*.*"))):
        path.rename(cache / "blobs" / str(i))
        up = "../" * len(path.relative_to(cache).parts[:-1])
        path.symlink_to(f"{up}blobs/{i}")
    return snapshot


def test_the_hugging_face_cache_is_read_through_its_links(tmp_path):
    folder = open_folder(write_cache(tmp_path))
    assert folder.components["vae"].config == {"of": "vae"}
    assert np.array_equal(component_tensors(folder.components["unet"])["w"], MATRIX)


def test_one_component_of_the_cache_is_read_through_its_links(tmp_path):
    snapshot = write_cache(tmp_path)
    assert np.array_equal(component_tensors(unet(snapshot / "unet"))["w"], MATRIX)


def test_shards_in_the_cache_are_read_through_their_links(tmp_path):
    directory = write_cache(tmp_path) / "unet"
    (directory / WEIGHT_NAMES[0]).rename(directory / "1.safetensors")
    write_json(directory / WEIGHT_NAMES[2], {"weight_map": {"w": "1.safetensors"}})
    assert np.array_equal(component_tensors(unet(directory))["w"], MATRIX)


@pytest.mark.parametrize("way", ["blob", "other_cache", "below_blobs", "blobs"])
def test_a_cache_may_link_to_its_own_blobs_alone(way, tmp_path):
    cache, outside = tmp_path / "cache", tmp_path / "out"
    snapshot = write_cache(cache)
    link = snapshot / "unet" / "config.json"
    outside.mkdir()
    write_json(outside / "x", {})
    if way == "blob":  # a blob that is itself a link
        (cache / "blobs" / "x").symlink_to(outside / "x")
        target = cache / "blobs" / "x"
    elif way == "other_cache":
        write_json(tmp_path / "other" / "blobs" / "x", {})
        target = tmp_path / "other" / "blobs" / "x"
    elif way == "below_blobs":
        write_json(cache / "blobs" / "deep" / "x", {})
        target = cache / "blobs" / "deep" / "x"
    else:
        (cache / "blobs").rename(tmp_path / "moved")
        (cache / "blobs").symlink_to(tmp_path / "moved")
        target = link.resolve()
    link.unlink()
    link.symlink_to(target)
    assert "leaves the folder" in refusal(snapshot)


def write_weights(directory: Path, name: str, key: str) -> None:
    if name.endswith(".json"):
        shard = f"{key}-1.safetensors"
        write_safetensors(directory / shard, {key: MATRIX})
        write_json(directory / name, {"weight_map": {key: shard}})
    elif name.endswith(".bin"):
        torch = pytest.importorskip("torch")
        torch.save({key: torch.from_numpy(MATRIX)}, directory / name)
    else:
        write_safetensors(directory / name, {key: MATRIX})


@pytest.mark.parametrize("place", range(len(WEIGHT_NAMES)))
def test_the_first_file_in_the_fixed_order_is_read(place, tmp_path):
    component = unet(tmp_path / "unet")
    for i in range(place, len(WEIGHT_NAMES)):
        write_weights(component.directory, WEIGHT_NAMES[i], f"k{i}")
    assert list(component_tensors(component)) == [f"k{place}"]


OTHER_NAMES = [
    "diffusion_pytorch_model.bin.index.json",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.non_ema.safetensors",
    "diffusion_pytorch_model.bf16.safetensors",
    "model.ema-only.safetensors",
    "diffusion_pytorch_model.non_ema.bin",
    "diffusion_pytorch_model.safetensors.index.non_ema.json",
    "diffusion_pytorch_model.safetensors.non_ema.index.json",
    "diffusion_pytorch_model.bin.index.fp16.json",
    "pytorch_model.bin.fp16.index.json",
]


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_the_only_variant_is_read_under_any_of_its_names(name, tmp_path):
    component = unet(tmp_path / "unet")
    write_weights(component.directory, name, "k")
    write_safetensors(
        component.directory / "model.fp16-00001-of-00002.safetensors", {"x": MATRIX}
    )
    write_safetensors(component.directory / "pytorch_lora.safetensors", {"x": MATRIX})
    assert list(component_tensors(component)) == ["k"]
    write_weights(component.directory, WEIGHT_NAMES[0], "whole")
    assert list(component_tensors(component)) == ["whole"]


def test_one_of_several_variants_is_not_guessed(tmp_path):
    component = unet(tmp_path / "unet")
    for variant in ("ema", "non_ema"):
        name = f"diffusion_pytorch_model.{variant}.safetensors"
        write_weights(component.directory, name, variant)
    message = refusal_of(component)
    assert "ema, non_ema" in message and "try " in message
    write_weights(component.directory, "diffusion_pytorch_model.bin.index.json", "k")
    assert list(component_tensors(component)) == ["k"]


def refusal_of(component: Component) -> str:
    with pytest.raises(InputError) as caught:
        component_tensors(component)
    return str(caught.value)


def test_weights_of_a_variant_behind_a_link_that_leaves_are_refused(tmp_path):
    component = unet(tmp_path / "unet")
    write_safetensors(tmp_path / "x", {"w": MATRIX})
    name = "diffusion_pytorch_model.non_ema.safetensors"
    (component.directory / name).symlink_to(tmp_path / "x")
    assert "leaves the folder" in refusal_of(component)


def test_weight_names_order_safetensors_first_and_full_precision_first():
    first_pickle = WEIGHT_NAMES.index("diffusion_pytorch_model.bin")
    assert all(name.endswith(".bin") for name in WEIGHT_NAMES[first_pickle:])
    assert not any("bin" in name for name in WEIGHT_NAMES[:first_pickle])
    for names in (WEIGHT_NAMES[:first_pickle], WEIGHT_NAMES[first_pickle:]):
        halves = ["fp16" in name for name in names]
        assert halves == sorted(halves)


def test_a_component_without_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match="without weights"):
        component_tensors(unet(tmp_path / "unet"))


def test_a_bin_file_goes_through_the_restricted_unpickler(tmp_path):
    component, proof = unet(tmp_path / "unet"), tmp_path / "proof"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {proof}",)

    path = component.directory / "diffusion_pytorch_model.bin"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match=r"posix\.system"):
        component_tensors(component)
    assert not proof.exists()
