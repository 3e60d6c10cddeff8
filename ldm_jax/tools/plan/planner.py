"""Plans: a program is compiled, and changed until it fits."""

import importlib.metadata
from typing import Any

import jax

from ldm_jax import config as config_lib
from ldm_jax.parallel.make_layout import make_layout
from ldm_jax.tools.plan.chips import Chip
from ldm_jax.tools.plan.compiling import (
    Compiled,
    Say,
    chip_of,
    compile_program,
    usable_bytes,
)
from ldm_jax.tools.plan.estimate import estimate, scale_row
from ldm_jax.tools.plan.kernels import kernel_cycles
from ldm_jax.tools.plan.programs import (
    Work,
    open_devices,
    sample_work,
    step_work,
)
from ldm_jax.tools.plan.remedies import remedies
from ldm_jax.tools.plan.report import NOTE, collective_rows
from ldm_jax.tools.plan.request import PlanRequest, resolve
from ldm_jax.tools.plan.topology import Topology

SCALES = (4, 16, 64, 256, 1024, 4096)


def plan(request: PlanRequest, say: Say) -> dict[str, Any]:
    """Compile a training step or a sampling call, and report what it would take.

    Args:
      request: The program and the devices.
      say: Called with lines of progress.

    Returns:
      JSON-compatible values of one device, in bytes and seconds: `fits`, `memory`,
      `model_flops`, `compiler` (its counts), `estimate` (None if the compiler estimates
      no cycles), `collectives`, `suggestions` (changes that were compiled if it does
      not fit) and `scale` (a step on more chips, by formula).

    Raises:
      InputError: If libtpu knows no such slice, or the batch size does not divide.
      RunError: If a program cannot be compiled for another reason than its size.
    """
    devices = open_devices(request.topology)
    layout = make_layout(request.config.parallel, devices)
    device = layout.devices[0]
    chip = chip_of(device)
    chip_name = chip.name if chip else device.device_kind
    available = usable_bytes(device, chip, layout.num_devices)
    request = resolve(request, layout.num_devices)
    work = _work(request, devices)
    label = f"for {layout.num_devices} x {chip_name}"
    found = compile_program(work.lower, label=label, say=say)
    report = {
        "topology": request.topology.name if request.topology else "local",
        "chip": chip_name,
        "num_devices": layout.num_devices,
        "work": request.work,
        "setting": _setting(request),
        "batch_per_device": work.images,
        "digest": config_lib.digest(request.config),
        "fits": _fits(found, available),
        "memory": _memory(found, work, available),
        "model_flops": work.flops,
        "compiler": {"flops": found.flops, "bytes_moved": found.moved},
        "roofline_seconds": _roofline(chip, found, work),
        "estimate": _estimate(chip, request.topology, found, work),
        "collectives": collective_rows(found.collectives),
        "compile_seconds": found.seconds,
        "versions": _versions(),
        "suggestions": [],
        "scale": _scale(chip, found, work),
    }
    if not report["fits"] and request.suggest:
        report["suggestions"] = _suggest(request, found, work, devices, available, say)
    return report


def _work(request: PlanRequest, devices: list[Any] | None) -> Work:
    prepare = sample_work if request.work == "sample" else step_work
    return prepare(request, devices)


def _suggest(
    request: PlanRequest,
    found: Compiled,
    work: Work,
    devices: list[Any] | None,
    available: float,
    say: Say,
) -> list[dict[str, Any]]:
    """Compile one change after the other until one fits."""
    rows: list[dict[str, Any]] = []
    if found.shortage is None:
        return rows
    say("does not fit; looking for changes that do (--no-suggest skips this)")
    for remedy in remedies(
        request,
        shortage=found.shortage,
        kept_bytes=work.state_bytes + work.frozen_bytes,
        num_devices=work.num_devices,
        batch_per_device=work.images,
    ):
        other = _work(remedy.request, devices)
        tried = compile_program(other.lower, label=f"with {remedy.name}", say=say)
        rows.append(
            {
                "change": remedy.name,
                "fits": _fits(tried, available),
                "needed": _memory(tried, other, available)["needed"],
                "available": available,
                "compile_seconds": tried.seconds,
            }
        )
        if rows[-1]["fits"]:
            break
    return rows


def _fits(found: Compiled, available: float) -> bool:
    if found.memory is None:
        return False
    return not available or found.memory.needed <= available


def _memory(found: Compiled, work: Work, available: float) -> dict[str, Any]:
    memory, shortage = found.memory, found.shortage
    needed = memory.needed if memory else shortage.needed if shortage else 0.0
    return {
        "available": shortage.available if shortage else available,
        "needed": needed,
        "state": work.state_bytes,
        "frozen": work.frozen_bytes,
        "batch": work.input_bytes,
        "gradients": work.gradient_bytes,
        "arguments": memory.arguments if memory else None,
        "temporaries": memory.temporaries if memory else None,
        "code": memory.code if memory else None,
        "peak": memory.peak if memory else None,
    }


def _setting(request: PlanRequest) -> dict[str, Any]:
    config = request.config
    first, second = config.autoencoder, config.diffusion
    sampled = request.work == "sample"
    return {
        "layout": config.parallel.layout,
        "accumulate": config.parallel.accumulate,
        "remat": second.remat and request.work == "diffusion",
        "dtype": first.dtype if request.work == "autoencoder" else second.dtype,
        "sampler": request.sampler if sampled else None,
        "num_steps": request.num_steps if sampled else None,
    }


def _roofline(chip: Chip | None, found: Compiled, work: Work) -> float | None:
    if chip is None or found.memory is None:
        return None
    return max(work.flops / chip.peak, found.moved / chip.bandwidth)


def _estimate(
    chip: Chip | None, topology: Topology | None, found: Compiled, work: Work
) -> dict[str, Any] | None:
    if chip is None or not chip.clock or not found.cycles:
        return None
    shape = topology.shape if topology else ()
    result = estimate(
        chip,
        shape,
        cycles=_cycles(chip, found),
        collectives=found.collectives,
        flops=work.flops,
    )
    return {
        **result._asdict(),
        "cycles": _cycles(chip, found),
        "kernel_cycles": kernel_cycles(chip, found.kernels),
        "images_per_second_per_chip": work.images / result.seconds,
        "note": NOTE,
    }


def _cycles(chip: Chip, found: Compiled) -> int:
    return found.cycles + kernel_cycles(chip, found.kernels)


def _scale(chip: Chip | None, found: Compiled, work: Work) -> list[dict[str, Any]]:
    """Compute a step with the same images a chip on other numbers of chips."""
    num = work.num_devices
    if chip is None or not chip.clock or not found.cycles or num == 1:
        return []
    sent = sum(row.times * row.sent_bytes for row in found.collectives)
    return [
        scale_row(
            chip,
            chips=chips,
            images=work.images,
            compute_seconds=_cycles(chip, found) / chip.clock,
            ring_bytes=sent * num / (num - 1),
        )._asdict()
        for chips in SCALES
    ]


def _versions() -> dict[str, str]:
    versions = {"jax": jax.__version__}
    try:
        versions["libtpu"] = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        pass
    return versions
