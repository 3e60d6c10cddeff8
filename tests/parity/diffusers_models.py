"""Random configurations of diffusers' models, and the same models here."""

import random
import warnings

import jax
import numpy as np

from ldm_jax.build import build_model
from ldm_jax.latent_diffusion import init_autoencoder, init_unet, param_shapes
from ldm_jax.pretrained import diffusers_names as names
from ldm_jax.pretrained.diffusers_configs import (
    read_autoencoder,
    read_unet,
)
from ldm_jax.pretrained.diffusers_import import assemble_config
from ldm_jax.pretrained.layouts import read_tree
from ldm_jax.pretrained.tensors import Tensors
from tests.support.golden_cases import Inputs, projections
from tests.support.weights import random_tensors

KL = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
}


def random_unet(seed: int) -> tuple[str, dict]:
    """Draw a small UNet: widths, levels, heads, attention, projections, norms."""
    chance = random.Random(seed)
    crossed = seed % 2 == 0
    channels = chance.choice([16, 32, 48])
    levels = chance.choice([1, 2, 2, 3])
    widths = [channels * m for m in sorted(chance.choices([1, 2, 3], k=levels))]
    widths[0] = channels
    attended = [chance.random() < 0.6 for _ in widths]
    kind = "CrossAttn" if crossed else "Attn"
    resnet = not crossed and chance.random() < 0.5
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    down, up = plain if resnet else ("DownBlock2D", "UpBlock2D")
    config = {
        "sample_size": 2 ** (levels + 1),
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": widths,
        "layers_per_block": chance.choice([1, 2]),
        "down_block_types": [f"{kind}DownBlock2D" if a else down for a in attended],
        "up_block_types": [f"{kind}UpBlock2D" if a else up for a in attended[::-1]],
        "norm_num_groups": chance.choice([4, 8, 16]),
        "resnet_time_scale_shift": chance.choice(["default", "scale_shift"]),
        "num_class_embeds": chance.choice([None, 7]),
    }
    if not crossed:
        resample = "resnet" if resnet else "conv"
        return "UNet2DModel", {
            **config,
            "attention_head_dim": chance.choice([4, 8, 16]),
            "downsample_type": resample,
            "upsample_type": resample,
            "norm_eps": chance.choice([1e-5, 1e-6]),
            "attn_norm_num_groups": config["norm_num_groups"],
        }
    by_size = chance.random() < 0.5
    heads = [width // 8 for width in widths] if by_size else chance.choice([1, 2, 4])
    return "UNet2DConditionModel", {
        **config,
        "cross_attention_dim": chance.choice([12, 24]),
        "attention_head_dim": heads,
        "transformer_layers_per_block": chance.choice([1, 2]),
        "use_linear_projection": chance.random() < 0.5,
    }


def random_autoencoder(seed: int) -> tuple[str, dict]:
    """Draw a small autoencoder: KL or VQ, widths, levels, attention."""
    chance = random.Random(seed)
    channels = chance.choice([16, 32])
    levels = chance.choice([1, 2, 3])
    widths = [channels * m for m in sorted(chance.choices([1, 2, 3], k=levels))]
    widths[0] = channels
    attended = [chance.random() < 0.4 for _ in widths]
    down = ["Attn" * a + "DownEncoderBlock2D" for a in attended]
    up = ["Attn" * a + "UpDecoderBlock2D" for a in attended]
    config = {
        "in_channels": chance.choice([1, 3]),
        "block_out_channels": widths,
        "layers_per_block": chance.choice([1, 2]),
        "down_block_types": down,
        "up_block_types": up[::-1],
        "latent_channels": chance.choice([2, 4]),
        "norm_num_groups": chance.choice([4, 8]),
        "mid_block_add_attention": chance.random() < 0.7,
    }
    config["out_channels"] = config["in_channels"]
    if seed % 2 == 0:
        return "AutoencoderKL", config
    return "VQModel", {
        **config,
        "num_vq_embeddings": chance.choice([16, 40]),
        "vq_embed_dim": chance.choice([None, 3]),
    }


def make_torch(class_name: str, config: dict, seed: int):
    """Build diffusers' model with weights drawn from their names."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within its imports
        import diffusers

        model = getattr(diffusers, class_name)(**config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    tensors = random_tensors(shapes, seed)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
    return model.eval(), tensors


def unet_config(class_name: str, config: dict):
    """Return our config of a diffusers UNet, with a fixed autoencoder."""
    autoencoder = read_autoencoder("AutoencoderKL", KL)
    return assemble_config(autoencoder=autoencoder, unet=read_unet(class_name, config))


def autoencoder_config(class_name: str, config: dict):
    """Return our config of a diffusers autoencoder."""
    return assemble_config(autoencoder=read_autoencoder(class_name, config))


def config_and_kind(class_name: str, config: dict):
    """Return our config of a diffusers model, and the kind of the network."""
    if class_name.startswith("UNet"):
        return unet_config(class_name, config), "unet"
    return autoencoder_config(class_name, config), "autoencoder"


def our_unet(config, tensors: dict[str, np.ndarray]):
    """Build our UNet and read its parameters from diffusers' tensors."""
    model = build_model(config)
    shapes = param_shapes(init_unet, model)
    format_ = names.unet_format(config.diffusion)
    stored = Tensors.from_arrays(tensors)
    params = read_tree(shapes, format_, stored, what="unet")
    return model.unet, jax.device_put(params)


def our_autoencoder(config, tensors: dict[str, np.ndarray]):
    """Build our autoencoder and read its parameters from diffusers' tensors."""
    model = build_model(config)
    shapes = param_shapes(init_autoencoder, model)
    format_ = names.autoencoder_format(config.autoencoder)
    stored = Tensors.from_arrays(tensors)
    params = read_tree(shapes, format_, stored, what="vae")
    return model.autoencoder, jax.device_put(params)


def unet_inputs(config, seed: int, batch: int = 2) -> dict[str, np.ndarray]:
    """Draw inputs of a UNet, as float32 and int32, channels last."""
    draw = np.random.RandomState(seed)
    condition = config.diffusion.condition
    inputs = {
        "x": draw.normal(size=(batch, *config.latent_shape)).astype(np.float32),
        "t": draw.randint(0, 1000, batch).astype(np.int32),
    }
    if condition.label:
        inputs["label"] = draw.randint(0, config.data.num_classes + 1, batch).astype(
            np.int32
        )
    if condition.context != "none":
        shape = (batch, 5, condition.context_width)
        inputs["context"] = draw.normal(size=shape).astype(np.float32)
    return inputs


def torch_condition(inputs: dict[str, np.ndarray]) -> dict:
    """Return the conditions of `unet_inputs` under the names of diffusers."""
    import torch

    names = {"label": "class_labels", "context": "encoder_hidden_states"}
    return {
        theirs: torch.from_numpy(inputs[ours])
        for ours, theirs in names.items()
        if ours in inputs
    }


def to_torch(images: np.ndarray):
    """Turn an array with channels last into a tensor with channels first."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))


def from_torch(tensor) -> np.ndarray:
    """Undo `to_torch`."""
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def relative(ours, theirs) -> float:
    """Return the largest difference over the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def with_gradient(
    name: str, function, x: np.ndarray, gradient: bool
) -> dict[str, np.ndarray]:
    """Run a function of torch as `tests.support.golden_cases.run_ours` runs ours."""
    x = to_torch(x).requires_grad_(gradient)
    output = function(x)
    found = {name: from_torch(output)}
    if gradient:
        weight = projections(output.numel())[0].reshape(found[name].shape)
        (output * to_torch(weight)).sum().backward()
        found[f"{name}_gradient"] = from_torch(x.grad)
    return found


def run_theirs(
    class_name: str, model, inputs: Inputs, *, gradient: bool
) -> dict[str, np.ndarray]:
    """Compute what `tests.support.golden_cases.run_ours` computes."""
    import torch

    if class_name.startswith("UNet"):
        theirs = {"label": "class_labels", "context": "encoder_hidden_states"}
        kwargs = {
            name: torch.from_numpy(inputs[ours])
            for ours, name in theirs.items()
            if ours in inputs
        }
        t = torch.from_numpy(inputs["t"])
        x = inputs["x"]
        return with_gradient(
            "output", lambda x: model(x, t, **kwargs).sample, x, gradient
        )

    def encode(images):
        encoded = model.encode(images)
        if class_name == "VQModel":
            return encoded.latents
        latents = encoded.latent_dist
        return torch.cat([latents.mean, latents.logvar], dim=1)

    def decode(latents):
        return model.decode(latents).sample

    return {
        **with_gradient("moments", encode, inputs["images"], gradient),
        **with_gradient("images", decode, inputs["latents"], gradient),
    }
