"""Configs of runs: frozen dataclasses that check their values.

All defaults are here. Nothing here imports JAX or NumPy, so that `--help` and the
errors of flags are fast.
"""

from ldm_jax.config.autoencoder import AdversaryConfig, AutoencoderConfig
from ldm_jax.config.condition import ClipConfig, ConditionConfig, TextConfig
from ldm_jax.config.diffusion import DiffusionConfig
from ldm_jax.config.run import Config
from ldm_jax.config.serialization import (
    CONFIG_FILE,
    differences,
    digest,
    flatten,
    from_json,
    read_config,
    to_json,
)
from ldm_jax.config.training import (
    IMAGES_AT_ONCE,
    OWN_LATENTS,
    CheckpointConfig,
    DataConfig,
    LayoutName,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    PreviewConfig,
    ScoresConfig,
)
from ldm_jax.config.validation import DtypeName

__all__ = [
    "CONFIG_FILE",
    "IMAGES_AT_ONCE",
    "OWN_LATENTS",
    "AdversaryConfig",
    "AutoencoderConfig",
    "CheckpointConfig",
    "ClipConfig",
    "ConditionConfig",
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "DtypeName",
    "LayoutName",
    "LogConfig",
    "OptimConfig",
    "ParallelConfig",
    "PreviewConfig",
    "ScoresConfig",
    "TextConfig",
    "differences",
    "digest",
    "flatten",
    "from_json",
    "read_config",
    "to_json",
]
