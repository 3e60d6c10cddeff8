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
    """Make the layout that a config names, over some devices or all.

    A process that is alone uses as many as an exact reduction has shards, at most.
    """
    shards = config.exact_shards
    everyone = devices or jax.devices()
    alone = len({device.process_index for device in everyone}) == 1
    if shards and alone and len(everyone) > shards:
        logging.getLogger(__name__).warning(
            "parallel.shards: %d, so %d of the %d devices are used",
            *(shards, shards, len(everyone)),
        )
        devices = everyone[:shards]
    layout = FsdpLayout if config.layout == "fsdp" else PmapLayout
    return layout(devices, shards=shards)
