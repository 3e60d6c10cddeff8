"""The original networks of latent-diffusion, built from our configs.

The originals are no package. `LDM_ORIGINALS` names a folder with their packages side by
side: `ldm` of CompVis/latent-diffusion, `taming` of CompVis/taming-transformers, and
`open_clip` of open_clip_torch, whose dependencies beside torch and einops are not
needed.
"""

import contextlib
import functools
import importlib
import os
import re
import sys
import types
import warnings
from collections.abc import Iterator

import numpy as np

from ldm_jax.config import ClipConfig, Config
from tests.parity.diffusers_models import from_torch, to_torch, with_gradient
from tests.support.golden_cases import Inputs, Table, draw_tensors

ORIGINALS = os.environ.get("LDM_ORIGINALS")
UNUSED = ("transformer.to_logits.", "model.logit_scale", "model.text_projection")
MODULES = {
    "autoencoder": "ldm.models.autoencoder",
    "encoders": "ldm.modules.encoders.modules",
    "openaimodel": "ldm.modules.diffusionmodules.openaimodel",
    "model": "ldm.modules.diffusionmodules.model",
    "attention": "ldm.modules.attention",
    "open_clip": "open_clip.transformer",
}


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Replace unused imports of the originals by empty modules."""
    import torch

    attributes = {
        "pytorch_lightning": {"LightningModule": torch.nn.Module},
        "omegaconf": {},
        "omegaconf.listconfig": {"ListConfig": tuple},
        "clip": {},
        "kornia": {},
        "torchvision": {},
        "torchvision.ops": {},
        "torchvision.ops.misc": {"FrozenBatchNorm2d": torch.nn.Identity},
        # The package imports its image towers, which the text encoder does not need.
        "open_clip": {"__path__": [f"{ORIGINALS}/open_clip"]},
    }
    added = attributes.keys() - sys.modules.keys()
    for name in added:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(attributes[name])
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


@functools.cache
def originals() -> types.SimpleNamespace:
    """Import the originals, without their recomputation of activations."""
    import torch

    found = {"torch": torch}
    with warnings.catch_warnings(), stand_ins():
        warnings.simplefilter("ignore")  # deprecations
        sys.path.insert(0, str(ORIGINALS))
        for short, name in MODULES.items():
            found[short] = importlib.import_module(name)
        sys.path.remove(str(ORIGINALS))
    for name in ("openaimodel", "attention"):
        found[name].checkpoint = lambda function, inputs, *_: function(*inputs)
    return types.SimpleNamespace(**found)


@contextlib.contextmanager
def groups(number: int) -> Iterator[None]:
    """Give every group norm that is built another number of groups than 32."""
    theirs = originals()
    norm = theirs.torch.nn.GroupNorm

    def normalize(channels: int, epsilon: float = 1e-6):
        return norm(number, channels, eps=epsilon)

    before = theirs.openaimodel.normalization, theirs.model.Normalize
    if number != 32:
        theirs.openaimodel.normalization = functools.partial(normalize, epsilon=1e-5)
        theirs.model.Normalize = theirs.attention.Normalize = normalize
    yield
    theirs.openaimodel.normalization, theirs.model.Normalize = before
    theirs.attention.Normalize = before[1]


def build(config: Config, kind: str):
    """Build an original network; its keys have no prefix."""
    builders = {"unet": _unet, "autoencoder": _autoencoder, "conditioner": _conditioner}
    module = config.autoencoder if kind == "autoencoder" else config.diffusion
    with groups(module.num_groups), stand_ins(), open(os.devnull, "w") as quiet:
        with contextlib.redirect_stdout(quiet):
            return builders[kind](config).eval()


def _unet(config: Config):
    ours, latent = config.diffusion, config.autoencoder.latent_channels
    condition = ours.condition
    return originals().openaimodel.UNetModel(
        image_size=config.latent_side,
        in_channels=latent + config.concat_channels,
        out_channels=latent,
        model_channels=ours.channels,
        channel_mult=ours.channel_multipliers,
        num_res_blocks=ours.num_res_blocks,
        attention_resolutions=ours.attention_downsampling,
        num_heads=-1 if ours.head_channels else ours.num_heads,
        num_head_channels=ours.head_channels or -1,
        use_scale_shift_norm=ours.scale_shift_norm,
        resblock_updown=ours.resblock_updown,
        use_spatial_transformer=ours.transformer_depth > 0,
        transformer_depth=ours.transformer_depth or 1,
        context_dim=condition.context_width or None,
        num_classes=config.data.num_classes + 1 if condition.label else None,
    )


def _autoencoder(config: Config):
    ours, data = config.autoencoder, config.data
    is_kl = ours.regularizer == "kl"
    networks = {
        "double_z": is_kl,
        "z_channels": ours.encoder_channels,
        "resolution": data.image_size,
        "in_channels": data.image_channels,
        "out_ch": data.image_channels,
        "ch": ours.channels,
        "ch_mult": ours.channel_multipliers,
        "num_res_blocks": ours.num_res_blocks,
        "attn_resolutions": ours.attention_resolutions,
        "attn_type": "vanilla" if ours.mid_attention else "none",
    }
    rest = {
        "ddconfig": networks,
        "lossconfig": {"target": "torch.nn.Identity"},
        "embed_dim": ours.latent_channels,
    }
    autoencoders = originals().autoencoder
    if is_kl:
        return autoencoders.AutoencoderKL(**rest)
    return autoencoders.VQModelInterface(n_embed=ours.codebook_size, **rest)


def _conditioner(config: Config):
    condition, theirs = config.diffusion.condition, originals()
    encoders = theirs.encoders
    if condition.concat == "segmentation":
        return encoders.SpatialRescaler(
            n_stages=condition.rescale_stages,
            in_channels=condition.num_segments,
            out_channels=condition.rescale_channels,
        )
    if condition.context == "class":
        rows = config.data.num_classes + 1
        return encoders.ClassEmbedder(condition.class_width, rows)
    if condition.context == "text":
        text = condition.text
        layers = encoders.Encoder(
            dim=text.width,
            depth=text.depth,
            heads=text.num_heads,
            attn_dim_head=text.head_width,
        )
        holder = theirs.torch.nn.Module()
        holder.transformer = encoders.TransformerWrapper(
            num_tokens=text.vocab_size, max_seq_len=text.length, attn_layers=layers
        )
        return holder
    clip = condition.clip
    holder = theirs.torch.nn.Module()
    if clip.activation == "quick_gelu":
        holder.transformer = theirs.torch.nn.Module()
        holder.transformer.text_model = _openai_clip(clip)
        return holder
    holder.model = theirs.open_clip.TextTransformer(
        context_length=clip.length,
        vocab_size=clip.vocab_size,
        width=clip.width,
        heads=clip.num_heads,
        layers=clip.depth,
        mlp_ratio=clip.mlp_width / clip.width,
        output_dim=clip.projection_width,
    )
    return holder


def _openai_clip(clip: ClipConfig):
    import transformers

    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=clip.vocab_size,
            max_position_embeddings=clip.length,
            hidden_size=clip.width,
            intermediate_size=clip.mlp_width,
            num_hidden_layers=clip.depth,
            num_attention_heads=clip.num_heads,
            hidden_act="quick_gelu",
            bos_token_id=0,
            eos_token_id=clip.eos_token_id,
        )
    )


def table(config: Config, kind: str) -> Table:
    """List the names and shapes of an original, without allocating its weights."""
    condition = config.diffusion.condition
    is_given = condition.context in ("none", "embedding")
    if kind == "conditioner" and is_given and condition.concat != "segmentation":
        return {}
    with originals().torch.device("meta"):
        state = build(config, kind).state_dict()
    found = {k: tuple(v.shape) for k, v in state.items() if not k.startswith(UNUSED)}
    if kind == "unet" and config.diffusion.linear_projection:
        # Stable Diffusion 2 has another `SpatialTransformer`, of the same names.
        projection = re.compile(r".*\.1\.proj_(in|out)\.weight")
        found |= {k: v[:2] for k, v in found.items() if projection.fullmatch(k)}
    return found


def load(module, table: Table, seed: int, gain: float) -> None:
    """Give an original weights drawn from their names."""
    tensors = draw_tensors(table, seed, gain)
    state = {key: originals().torch.from_numpy(x) for key, x in tensors.items()}
    found = module.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert all(key.startswith(UNUSED) for key in found.missing_keys)


def run(
    config: Config, kind: str, module, inputs: Inputs, *, gradient: bool
) -> dict[str, np.ndarray]:
    """Compute what `run_ours` computes."""
    torch = originals().torch
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    if kind == "conditioner":
        with torch.no_grad():
            return {"output": _condition(config, module, given)}
    if kind == "unet":
        extra = [to_torch(inputs["concat"])] if "concat" in inputs else []

        def unet(x):
            x = torch.cat([x, *extra], dim=1)
            return module(
                x, given["t"], context=given.get("context"), y=given.get("label")
            )

        return with_gradient("output", unet, inputs["x"], gradient)

    def encode(images):
        encoded = module.encode(images)
        if config.autoencoder.regularizer == "vq":
            return encoded
        return torch.cat([encoded.mean, encoded.logvar], dim=1)

    return {
        **with_gradient("moments", encode, inputs["images"], gradient),
        **with_gradient("images", module.decode, inputs["latents"], gradient),
    }


def _condition(config: Config, module, given) -> np.ndarray:
    condition = config.diffusion.condition
    if condition.concat == "segmentation":
        image = to_torch(given["image"].numpy())
        return from_torch(module(image))
    if condition.context == "class":
        return module({"class": given["label"]}).numpy()
    if condition.context == "text":
        return module.transformer(given["tokens"], return_embeddings=True).numpy()
    if condition.clip.activation == "quick_gelu":
        output = module.transformer.text_model(given["tokens"])
        return output.last_hidden_state.numpy()
    text = module.model
    x = text.token_embedding(given["tokens"]) + text.positional_embedding
    for block in text.transformer.resblocks[:-1]:  # as Stable Diffusion 2 does
        x = block(x, attn_mask=text.attn_mask)
    return text.ln_final(x).numpy()
