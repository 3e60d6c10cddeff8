"""Files of other programs: both read them to the same numbers, or both refuse."""

import inspect
import json
import re

import ml_dtypes
import numpy as np
import pytest

from ldm_jax.diffusion.schedules import make_schedule
from ldm_jax.files import write_safetensors
from ldm_jax.pretrained import diffusers_configs
from ldm_jax.pretrained import torch_pickle as pickles
from ldm_jax.pretrained.diffusers_configs import (
    SCHEDULER_DEFAULTS,
    UNSUPPORTED_FIELDS,
    read_autoencoder,
    read_clip,
    read_scheduler,
    read_unet,
)
from ldm_jax.pretrained.diffusers_folder import Component, component_tensors
from ldm_jax.pretrained.diffusers_names import autoencoder_format, unet_format
from ldm_jax.pretrained.layouts import write_tree
from ldm_jax.pretrained.open_weights import open_weights
from ldm_jax.pretrained.tensors import open_tensors
from ldm_jax.types import InputError
from tests.data.test_tokenizer import write_clip
from tests.parity.needs import THEIR_WARNINGS_IGNORED, diffusers, torch
from tests.support.pretrained import compvis_arrays, with_condition

pytestmark = THEIR_WARNINGS_IGNORED


# Schedulers.

NO_BETAS = {}
LDM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER_CONFIGS = {
    "nothing stated": NO_BETAS,
    "sd": {**LDM, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    "sd turbo": {**LDM, "timestep_spacing": "trailing", "sigma_max": None},
    "sdxl": {**LDM, "interpolation_type": "linear", "sample_max_value": 1.0},
    "half stated": {"beta_schedule": "scaled_linear", "num_train_timesteps": 500},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "image": {**LDM, "prediction_type": "sample"},
    "v": {**LDM, "prediction_type": "v_prediction"},
}


def scheduler_names() -> list[str]:
    found = []
    for name in dir(diffusers()):
        if name.endswith("Scheduler") and not name.startswith("Flax"):
            if "num_train_timesteps" in fields_of(name):
                found.append(name)
    return found


def fields_of(name: str):
    return inspect.signature(getattr(diffusers(), name).__init__).parameters


def their_levels(name: str, values: dict):
    """Return the signal powers of a scheduler; None if it has none or refuses."""
    try:
        scheduler = getattr(diffusers(), name).from_config(values)
    except (NotImplementedError, ValueError, TypeError, ImportError):
        return None
    return getattr(scheduler, "alphas_cumprod", None)


@pytest.mark.parametrize("case", SCHEDULER_CONFIGS)
def test_a_scheduler_of_any_class_gives_the_noise_levels_of_diffusers(case):
    compared = 0
    for name in scheduler_names():
        values = SCHEDULER_CONFIGS[case]
        theirs = their_levels(name, values)
        known = name in SCHEDULER_DEFAULTS
        states_all = "beta_start" in values or case == "cosine"
        if theirs is None or not (known or states_all):
            continue
        if "CogVideoX" in name or name == "ConsistencyDecoderScheduler":
            continue  # theirs are shifted, or of their own
        found = read_scheduler(name, values)
        found.pop("prediction")
        ours = make_schedule(
            found["schedule"],
            num_timesteps=found["num_timesteps"],
            beta_start=found["beta_start"],
            beta_end=found["beta_end"],
            zero_terminal_snr=found["zero_terminal_snr"],
        )
        assert np.abs(ours.abar - theirs.numpy()).max() < 1e-5, name
        compared += 1
    assert compared >= 15


def test_a_schedule_that_no_scheduler_of_diffusers_knows_is_refused_by_both():
    values, refused = {**LDM, "beta_schedule": "a_new_one"}, 0
    for name in scheduler_names():
        if "beta_schedule" not in fields_of(name):
            continue
        try:
            getattr(diffusers(), name).from_config(values)
        except (NotImplementedError, ValueError):
            with pytest.raises(InputError, match=f"{name}: beta_schedule: got 'a_new"):
                read_scheduler(name, values)
            refused += 1
        else:
            raise AssertionError(f"diffusers reads it: {name}")
    assert refused >= 15


def test_every_scheduler_whose_defaults_are_known_is_one_of_diffusers():
    names = scheduler_names()
    for name, (start, end, schedule) in SCHEDULER_DEFAULTS.items():
        if name not in names:
            continue  # its class wants another package
        fields = fields_of(name)
        assert fields["beta_start"].default == start
        assert fields["beta_end"].default == end
        assert fields["beta_schedule"].default == schedule


# Fields of configs.

PLAIN = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
SMALL = {
    "UNet2DModel": {
        **PLAIN,
        "down_block_types": ["AttnDownBlock2D"] * 2,
        "up_block_types": ["AttnUpBlock2D"] * 2,
    },
    "UNet2DConditionModel": {
        **PLAIN,
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
    },
    "AutoencoderKL": {
        "block_out_channels": [16, 32],
        "down_block_types": ["AttnDownEncoderBlock2D"] * 2,
        "up_block_types": ["AttnUpDecoderBlock2D"] * 2,
        "norm_num_groups": 8,
    },
    "VQModel": {
        "block_out_channels": [16, 32],
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        "norm_num_groups": 8,
        "num_vq_embeddings": 16,
    },
}


def read_config(name: str, values: dict):
    read = read_unet if name.startswith("UNet") else read_autoencoder
    return read(name, values)


@pytest.mark.parametrize("name", SMALL)
def test_every_field_of_diffusers_is_read_or_refused(name, monkeypatch):
    seen = []

    class Recorder(diffusers_configs.Fields):
        def done(self):
            seen.append(set(self._read))

    monkeypatch.setattr(diffusers_configs, "Fields", Recorder)
    for resampling in ("conv", "resnet"):
        read_config(name, {**SMALL[name], "downsample_type": resampling})
    fields = set(inspect.signature(getattr(diffusers(), name).__init__).parameters)
    assert fields - {"self"} <= set.union(*seen) | set(UNSUPPORTED_FIELDS[name])


@pytest.mark.parametrize("name", SMALL)
def test_what_diffusers_writes_of_a_model_is_read(name):
    model = getattr(diffusers(), name)(**SMALL[name])
    values = json.loads(model.to_json_string())
    assert read_config(name, values) == read_config(name, SMALL[name])


# Names of files.


def small_model(name: str, seed: int = 0):
    torch.manual_seed(seed)
    return getattr(diffusers(), name)(**SMALL[name])


def equal(ours, state) -> bool:
    return set(ours) == set(state) and all(
        np.array_equal(ours[key], value.float().numpy()) for key, value in state.items()
    )


@pytest.mark.parametrize("variant", [None, "fp16", "non_ema", "ema", "bf16"])
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_are_found_under_every_name_of_diffusers(
    variant, pickled, sharded, tmp_path
):
    cls, model = diffusers().UNet2DModel, small_model("UNet2DModel")
    model.save_pretrained(
        tmp_path,
        variant=variant,
        safe_serialization=not pickled,
        max_shard_size="100KB" if sharded else "10GB",
    )
    assert bool(list(tmp_path.glob("*.index.*"))) == sharded
    theirs = cls.from_pretrained(tmp_path, variant=variant, use_safetensors=not pickled)
    component = Component("unet", "UNet2DModel", {}, tmp_path)
    assert equal(component_tensors(component), theirs.state_dict())


def test_the_index_of_a_variant_may_have_its_old_name(tmp_path):
    model = small_model("UNet2DModel")
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    (index,) = tmp_path.glob("*.index.fp16.json")
    index.rename(tmp_path / index.name.replace(".index.fp16.", ".fp16.index."))
    theirs = diffusers().UNet2DModel.from_pretrained(tmp_path, variant="fp16")
    component = Component("unet", "UNet2DModel", {}, tmp_path)
    assert equal(component_tensors(component), theirs.state_dict())


def small_clip():
    import transformers

    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=99,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return transformers.CLIPTextModel(config)


@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_are_found_under_every_name_of_transformers(variant, sharded, tmp_path):
    import transformers

    model = small_clip()
    size = "10KB" if sharded else "10GB"
    model.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    assert bool(list(tmp_path.glob("*.index.*"))) == sharded
    theirs = transformers.CLIPTextModel.from_pretrained(tmp_path, variant=variant)
    component = Component("text_encoder", "CLIPTextModel", {}, tmp_path)
    found = component_tensors(component)
    ours = {key.removeprefix("text_model."): found[key] for key in found}
    state = {
        key.removeprefix("text_model."): value
        for key, value in theirs.state_dict().items()
        if not key.endswith("position_ids")
    }
    assert equal(ours, state)


def test_the_text_encoder_of_a_whole_clip_is_read(tmp_path):
    import transformers

    text = small_clip().config.to_dict()
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision)
    )
    whole.save_pretrained(tmp_path)
    theirs = transformers.CLIPTextModel.from_pretrained(tmp_path).config
    ours = read_clip("CLIPModel", json.loads((tmp_path / "config.json").read_text()))
    assert ours["width"] == theirs.hidden_size and ours["depth"] == 2
    assert ours["mlp_width"] == theirs.intermediate_size
    assert ours["eos_token_id"] == theirs.eos_token_id
    assert ours["activation"] == theirs.hidden_act


# Old names of attention.

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
ATTENTION = re.compile(r"(attentions\.\d+\.)(to_q|to_k|to_v|to_out\.0)\.")


@pytest.mark.parametrize("name", ["UNet2DModel", "AutoencoderKL", "VQModel"])
@pytest.mark.parametrize("pickled", [False, True])
def test_attention_has_its_old_names_at_every_level(name, pickled, tmp_path):
    from safetensors.torch import save_file

    model = small_model(name)
    model.save_pretrained(tmp_path)
    old = {
        ATTENTION.sub(lambda m: f"{m[1]}{OLD[m[2]]}.", key): value.contiguous()
        for key, value in model.state_dict().items()
    }
    assert sum("proj_attn" in key for key in old) >= 6
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.unlink()
    if pickled:
        torch.save(old, file.with_suffix(".bin"))
    else:
        save_file(old, file)
    theirs = type(model).from_pretrained(tmp_path)
    found = component_tensors(Component("x", name, {}, tmp_path))
    assert equal(found, theirs.state_dict()) and equal(found, model.state_dict())


# Names in pickles.


NOT_READ = re.compile(
    # Quantised, sparse, nested and other tensors that no file of these models has.
    r".*(sparse|nested|meta_tensor|qtensor|wrapper|v3|from_numpy|per_|bits|float4|"
    r"Complex\w*Storage|torch\.cuda\.\w+Tensor|storage\.|QU?[iI]nt\w*Storage|"
    r"torch\.u?int[1-7]$|torch\.qu?int).*"
)


def allowed_names() -> list[tuple[str, ...]]:
    """List what `torch.load` lets a file of weights name."""
    from torch._weights_only_unpickler import _get_allowed_globals

    names = [full for full in _get_allowed_globals() if not NOT_READ.fullmatch(full)]
    assert len(names) > 40
    return [full.rpartition(".")[::2] for full in names]


def test_a_tensor_with_attributes_and_a_parameter_are_read(tmp_path):
    values = {
        "tensor": torch.arange(3.0),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    for value in values.values():
        value.note = "a"
    torch.save(values, tmp_path / "a.bin")
    theirs = torch.load(tmp_path / "a.bin", weights_only=True)
    ours = open_tensors(tmp_path / "a.bin")
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[k], theirs[k].detach().numpy()) for k in theirs)


def test_what_torch_lets_a_file_of_weights_name_is_not_refused():
    refused = []
    for module, name in allowed_names():
        body = b"\x80\x02" + f"c{module}\n{name}\n.".encode()
        try:
            pickles.load(body)
        except pickles.RefusedError:
            refused.append(f"{module}.{name}")
    assert not refused


# Community files.


def rounded(dtype, *, cast_up=False):
    """Store all in half precision, the table of noise levels as well."""
    table = make_schedule(
        "ldm_linear", num_timesteps=1000, beta_start=0.0015, beta_end=0.0195
    ).abar

    def change(arrays):
        halves = {
            key: value.astype(dtype)
            for key, value in {**arrays, "alphas_cumprod": table}.items()
        }
        up = {key: value.astype(np.float32) for key, value in halves.items()}
        return up if cast_up else halves

    return change


def beside(**extra):
    return lambda arrays: {**arrays, **{k: np.ones(2, np.float32) for k in extra}}


def without(prefix):
    return lambda arrays: {k: v for k, v in arrays.items() if not k.startswith(prefix)}


def with_matrices(arrays):
    name = re.compile(r".*\.attn_1\.\w+\.weight")
    return {
        k: v.reshape(v.shape[:2]) if name.fullmatch(k) else v for k, v in arrays.items()
    }


SINGLE_FILES = {
    "as it is": dict,
    "fp16": rounded(np.float16),
    "bf16": rounded(ml_dtypes.bfloat16),
    "fp16 cast up": rounded(np.float16, cast_up=True),
    "counters": beside(**{"model_ema.decay": 0, "model_ema.num_updates": 0}),
    "average of the vae": beside(**{"first_stage_model.model_ema.decay": 0}),
    "losses": beside(**{"first_stage_model.loss.logvar": 0}),
    "trainer": beside(**{"epoch": 0, "optimizer.lr": 0}),
    "textual inversion": beside(**{"embedding_manager.string_to_param": 0}),
    "control": beside(**{"control_model.zero_convs.0.0.weight": 0}),
    "position ids": beside(
        **{"cond_stage_model.transformer.text_model.embeddings.position_ids": 0}
    ),
    "projection": beside(
        **{
            "cond_stage_model.transformer.text_projection.weight": 0,
            "cond_stage_model.logit_scale": 0,
        }
    ),
    "matrices": with_matrices,
    "no text encoder": without("cond_stage_model."),
    "no unet": without("model.diffusion_model."),
    "no autoencoder": without("first_stage_model."),
}


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    """A small Stable Diffusion as diffusers reads it, whose config files may use."""
    from ldm_jax.pretrained.diffusers_export import write_folder

    root = tmp_path_factory.mktemp("sd")
    (root / "tokenizer").mkdir()
    write_clip(root / "tokenizer", "sd1")
    weights, _ = compvis_arrays("clip")
    config = with_condition(weights.config, tokenizer=str(root / "tokenizer"))
    (root / "folder").mkdir()
    write_folder(weights._replace(config=config), root / "folder")
    return root / "folder"


@pytest.mark.parametrize("case", SINGLE_FILES)
def test_a_community_file_is_read_by_both_or_by_none(case, sd_folder, tmp_path):
    _, arrays = compvis_arrays("clip")
    arrays = SINGLE_FILES[case](arrays)
    path = tmp_path / "a.safetensors"
    write_safetensors(path, arrays)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from tests.support.models import config_of\n"
        "def get_config():\n    return config_of('clip')\n"
    )
    errors = []
    try:
        pipeline = diffusers().StableDiffusionPipeline.from_single_file(
            str(path), config=str(sd_folder), local_files_only=True
        )
    except Exception as error:  # of many kinds
        pipeline = None
        errors.append(error)
    try:
        found = open_weights(path, config_file=recipe).read()
    except InputError as error:
        found = None
        errors.append(error)
    assert (pipeline is None) == (found is None), errors
    if found is not None:
        written_out = write_tree(found.unet, unet_format(found.config.diffusion))
        assert equal(written_out, pipeline.unet.state_dict())
        vae = write_tree(
            found.autoencoder, autoencoder_format(found.config.autoencoder)
        )
        assert equal(vae, pipeline.vae.state_dict())
