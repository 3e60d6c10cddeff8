"""What `ldm plan` may be asked. Imports no JAX."""

import dataclasses
from typing import Any, Literal, NamedTuple

from ldm_jax.config import Config
from ldm_jax.tools.plan.topology import Topology
from ldm_jax.types import SamplerName

WorkName = Literal["autoencoder", "diffusion", "sample"]
ELSEWHERE = "elsewhere"
"""Stands for a first stage that a plan of the second never reads."""


class Request(NamedTuple):
    """One question."""

    config: Config
    """Of the run."""
    topology: Topology | None
    """Where; None for what JAX finds here."""
    work: WorkName
    """A stage's training step, or a call of the sampler."""
    batch_per_device: int | None
    """Images of a device; None for the config's share."""
    sampler: SamplerName
    """Which sampler."""
    num_steps: int
    """Of the sampler."""
    suggest: bool
    """Whether to look for what fits where this does not."""


def change(
    config: Config,
    work: WorkName,
    *,
    batch_size: int | None = None,
    remat: bool | None = None,
    **parallel: Any,
) -> Config:
    """Return a config with some of what decides the memory of a step changed.

    Args:
      config: To begin with.
      work: What is planned; the second stage is planned as if the first were done.
      batch_size: Global batch of the stage.
      remat: Whether the UNet's activations are computed twice.
      parallel: Fields of `config.parallel`.
    """
    first: dict[str, Any] = {}
    second: dict[str, Any] = {} if remat is None else {"remat": remat}
    if batch_size is not None:
        (first if work == "autoencoder" else second)["batch_size"] = batch_size
    taken = config.first_stage
    if work != "autoencoder" and taken is None:
        taken = ELSEWHERE
    return dataclasses.replace(
        config,
        first_stage=taken,
        autoencoder=dataclasses.replace(config.autoencoder, **first),
        diffusion=dataclasses.replace(config.diffusion, **second),
        parallel=dataclasses.replace(config.parallel, **parallel),
    )


def batch_size_of(config: Config, work: WorkName) -> int:
    """Return the images of a step over all devices."""
    first = work == "autoencoder"
    return (config.autoencoder if first else config.diffusion).batch_size
