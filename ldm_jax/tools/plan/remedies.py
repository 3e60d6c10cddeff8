"""Changes with which a program that does not fit may fit. Imports no JAX."""

from collections.abc import Iterator
from typing import NamedTuple

from ldm_jax.tools.plan.hlo import Shortage
from ldm_jax.tools.plan.request import PlanRequest, change
from ldm_jax.types import InputError

MAX_PARTS = 64


class Remedy(NamedTuple):
    """A change with which a program may fit."""

    name: str
    """Flags to add to the command."""
    request: PlanRequest
    """The changed request."""


def remedies(
    request: PlanRequest,
    *,
    shortage: Shortage,
    kept_bytes: float,
    num_devices: int,
    batch_per_device: int,
) -> list[Remedy]:
    """List changes worth compiling, the cheapest at run time first.

    Changes that cannot help are left out: if the state alone exceeds a device's memory,
    every change includes fsdp. Numbers of parts and batch sizes are those that would
    fit if everything but the state shrank with them, and half of that.

    Args:
      request: A request that does not fit.
      shortage: Memory that it needs.
      kept_bytes: Bytes of state and frozen parameters on a device.
      num_devices: Devices that fsdp splits them over.
      batch_per_device: Images of a device.
    """
    if request.work == "sample":
        return [
            Remedy(
                f"--batch-per-device {images}",
                request._replace(batch_per_device=images),
            )
            for images in _halves(batch_per_device, shortage, kept_bytes)
        ]
    request = request._replace(batch_per_device=batch_per_device)
    found: list[Remedy] = []
    base, prefix, kept = request, "", kept_bytes
    can_shard = request.config.parallel.layout == "pmap" and num_devices > 1
    if can_shard and kept_bytes >= shortage.available:
        base = _try(request, layout="fsdp")
        if base is None:
            return []
        prefix, kept = "--layout fsdp", kept_bytes / num_devices
        found.append(Remedy(prefix, base))
        can_shard = False
    options = _options(
        base,
        shortage=shortage,
        kept_bytes=kept,
        num_devices=num_devices,
        batch_per_device=batch_per_device,
        can_shard=can_shard,
    )
    return found + [
        Remedy(f"{prefix} {flag}".strip(), changed)
        for flag, changed in options
        if changed is not None
    ]


def _options(
    base: PlanRequest,
    *,
    shortage: Shortage,
    kept_bytes: float,
    num_devices: int,
    batch_per_device: int,
    can_shard: bool,
) -> Iterator[tuple[str, PlanRequest | None]]:
    """Yield flags and the request that they give; None if the config refuses it."""
    if base.work == "diffusion" and not base.config.diffusion.remat:
        yield "--diffusion.remat", _try(base, remat=True)
    already = base.config.parallel.accumulate
    for images in _halves(batch_per_device // already, shortage, kept_bytes):
        parts = batch_per_device // images
        if batch_per_device % parts == 0 and parts <= MAX_PARTS:
            yield f"--accumulate {parts}", _try(base, accumulate=parts)
    if can_shard:
        yield "--layout fsdp", _try(base, layout="fsdp")
    for images in _halves(batch_per_device, shortage, kept_bytes):
        if images % already == 0:
            smaller = base._replace(batch_per_device=images)
            changed = _try(smaller, batch_size=images * num_devices)
            yield f"--batch-per-device {images}", changed


def _try(request: PlanRequest, **fields: int | str | bool) -> PlanRequest | None:
    try:
        return change(request, **fields)  # pyright: ignore[reportArgumentType]
    except InputError:
        return None  # a discriminator needs whole batches


def _halves(images: int, shortage: Shortage, kept: float) -> list[int]:
    """Return two smaller numbers of images: one that should fit, and half of it."""
    free = max(shortage.available - kept, 0.0)
    wanted = max(shortage.needed - kept, 1.0)
    fitting = images
    while fitting > 1 and (fitting == images or wanted * fitting / images > free):
        fitting //= 2
    return [n for n in dict.fromkeys((fitting, fitting // 2)) if 1 <= n < images]
