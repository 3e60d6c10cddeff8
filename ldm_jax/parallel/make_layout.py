"""The choice of a layout: `pmap` or `fsdp`."""

from typing import Any

from ldm_jax.config import ParallelConfig
from ldm_jax.parallel.fsdp import FsdpLayout
from ldm_jax.parallel.layout import Layout
from ldm_jax.parallel.pmap import PmapLayout

__all__ = ["FsdpLayout", "Layout", "PmapLayout", "make_layout"]


def make_layout(config: ParallelConfig, devices: list[Any] | None = None) -> Layout:
    """Make the layout that a config names, over some devices or all."""
    if config.layout == "fsdp":
        return FsdpLayout(devices, shards=config.exact_shards)
    return PmapLayout(devices, shards=config.exact_shards)
