"""The choice of a layout: `pmap` or `fsdp`."""

import logging
from typing import Any

import jax

from ldm_jax.config import ParallelConfig
from ldm_jax.parallel.fsdp import FsdpLayout
from ldm_jax.parallel.layout import Layout
from ldm_jax.parallel.pmap import PmapLayout

__all__ = ["FsdpLayout", "Layout", "PmapLayout", "make_layout"]


def make_layout(config: ParallelConfig, devices: list[Any] | None = None) -> Layout:
    """Make the layout that a config names, over some devices of all processes, or all.

    An exact reduction uses no more devices than it has shards.
    """
    shards = config.exact_shards
    everyone = devices or jax.devices()
    used = _first_devices(everyone, shards) if shards else everyone
    if len(used) < len(everyone) and jax.process_index() == 0:
        logging.getLogger(__name__).warning(
            "parallel.shards: %d, so %d of the %d devices are used",
            *(shards, len(used), len(everyone)),
        )
    layout = FsdpLayout if config.layout == "fsdp" else PmapLayout
    return layout(used, shards=shards)


def _first_devices(everyone: list[Any], num: int) -> list[Any]:
    """Return the first devices of each process, as many of all as there may be."""
    by_process: dict[int, list[Any]] = {}
    for device in everyone:
        by_process.setdefault(device.process_index, []).append(device)
    share = max(1, num // len(by_process))
    return [device for own in by_process.values() for device in own[:share]]
