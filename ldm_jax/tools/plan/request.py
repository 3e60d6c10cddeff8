"""The question that `ldm plan` answers. Imports no JAX."""

import dataclasses
from typing import Any, Literal, NamedTuple

from ldm_jax.config import Config
from ldm_jax.tools.plan.topology import Topology
from ldm_jax.types import SamplerName

WorkName = Literal["autoencoder", "diffusion", "sample"]
ELSEWHERE = "elsewhere"
"""Placeholder of a first stage, which a plan of the second stage does not read."""


class PlanRequest(NamedTuple):
    """A program to plan, and the devices to plan it for."""

    config: Config
    """Config of the run."""
    topology: Topology | None
    """Slice of a TPU pod; None for the devices of this machine."""
    work: WorkName
    """Training step of a stage, or a sampling call."""
    batch_per_device: int | None
    """Images of a device; None for the config's batch size over the devices."""
    sampler: SamplerName
    """Sampler of a sampling call."""
    num_steps: int
    """Sampling steps."""
    suggest: bool
    """Whether to look for changes with which the program fits."""


def change(
    request: PlanRequest,
    *,
    batch_size: int | None = None,
    remat: bool | None = None,
    **parallel: Any,
) -> PlanRequest:
    """Change config fields that the memory of a step depends on.

    The second stage is planned as if the first were finished.

    Args:
      batch_size: Batch size of the stage, over all devices.
      remat: Whether the UNet recomputes activations in the backward pass.
      parallel: Fields of `config.parallel`.
    """
    config = request.config
    first: dict[str, Any] = {}
    second: dict[str, Any] = {} if remat is None else {"remat": remat}
    if batch_size is not None:
        (first if request.work == "autoencoder" else second)["batch_size"] = batch_size
    first_stage = config.first_stage
    if request.work != "autoencoder" and first_stage is None:
        first_stage = ELSEWHERE
    config = dataclasses.replace(
        config,
        first_stage=first_stage,
        autoencoder=dataclasses.replace(config.autoencoder, **first),
        diffusion=dataclasses.replace(config.diffusion, **second),
        parallel=dataclasses.replace(config.parallel, **parallel),
    )
    return request._replace(config=config)


def resolve(request: PlanRequest, num_devices: int) -> PlanRequest:
    """Set the config's batch size from `batch_per_device`, if it is given."""
    if request.work == "sample" or request.batch_per_device is None:
        return change(request)
    return change(request, batch_size=request.batch_per_device * num_devices)
