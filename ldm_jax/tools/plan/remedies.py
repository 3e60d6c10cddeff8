"""What to change where a step does not fit. Imports no JAX."""

from typing import NamedTuple

from ldm_jax.config import Config
from ldm_jax.tools.plan.arguments import WorkName, change
from ldm_jax.tools.plan.hlo import Shortage
from ldm_jax.types import InputError

MAX_PARTS = 64


class Remedy(NamedTuple):
    """A change that may make a step fit."""

    name: str
    """What to add to the command line."""
    config: Config
    """With the change."""
    batch_per_device: int
    """Images of a device after it."""


def remedies(
    config: Config,
    work: WorkName,
    *,
    shortage: Shortage,
    kept_bytes: float,
    num_devices: int,
    batch_per_device: int,
) -> list[Remedy]:
    """List changes worth a compilation, those that cost least first.

    What arithmetic rules out is left out: where parameters, their optimiser's state and
    their average alone are too large for a chip, all that is listed cuts them by fsdp.
    Parts and smaller batches come in the size that would fit if only what is not kept
    between steps shrank with them, and twice that.

    Args:
      config: That does not fit.
      work: What was planned.
      shortage: By how much.
      kept_bytes: Of state and frozen parameters on a device.
      num_devices: They are cut over, if they are.
      batch_per_device: Images of a device.

    Returns:
      The changes; none is known to fit before it is compiled.
    """
    if work == "sample":
        halves = _halves(batch_per_device, shortage, kept_bytes)
        return [_smaller(config, images) for images in halves]
    found: list[Remedy] = []
    base, prefix, kept = config, "", kept_bytes
    can_cut = config.parallel.layout == "pmap" and num_devices > 1
    if can_cut and kept_bytes >= shortage.available:
        base = _try(config, work, layout="fsdp")
        if base is None:
            return []
        prefix, kept = "--layout fsdp", kept_bytes / num_devices
        found.append(Remedy(prefix, base, batch_per_device))
    options: list[tuple[str, Config | None, int]] = []
    if work == "diffusion" and not config.diffusion.remat:
        flag = "--diffusion.remat"
        options.append((flag, _try(base, work, remat=True), batch_per_device))
    already = config.parallel.accumulate
    for images in _halves(batch_per_device // already, shortage, kept):
        parts = batch_per_device // images
        if batch_per_device % parts == 0 and parts <= MAX_PARTS:
            changed = _try(base, work, accumulate=parts)
            options.append((f"--accumulate {parts}", changed, batch_per_device))
    if can_cut and not prefix:
        options.append(
            ("--layout fsdp", _try(config, work, layout="fsdp"), batch_per_device)
        )
    for images in _halves(batch_per_device, shortage, kept):
        if images % already == 0:
            size = images * num_devices
            changed = _try(base, work, batch_size=size)
            options.append((f"--batch-per-device {images}", changed, images))
    for flag, changed, images in options:
        if changed is not None:
            found.append(Remedy(f"{prefix} {flag}".strip(), changed, images))
    return found


def _try(config: Config, work: WorkName, **fields: int | str | bool) -> Config | None:
    try:
        return change(config, work, **fields)  # pyright: ignore[reportArgumentType]
    except InputError:
        return None  # an adversary takes a whole batch, and no part of it


def _smaller(config: Config, images: int) -> Remedy:
    return Remedy(f"--batch-per-device {images}", config, images)


def _halves(images: int, shortage: Shortage, kept: float) -> list[int]:
    """Return two smaller numbers of images: one that should fit, and half of it."""
    free = max(shortage.available - kept, 0.0)
    wanted = max(shortage.needed - kept, 1.0)
    fitting = images
    while fitting > 1 and (fitting == images or wanted * fitting / images > free):
        fitting //= 2
    return [n for n in dict.fromkeys((fitting, fitting // 2)) if 1 <= n < images]
