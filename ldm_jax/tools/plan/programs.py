"""Programs of a run, traced by shape only, for devices that need not be present."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from ldm_jax.build import build_model, shape_of
from ldm_jax.diffusion.tables import unpadded
from ldm_jax.diffusion.timesteps import make_levels
from ldm_jax.latent_diffusion import (
    SampleParams,
    blank_inputs,
    images_per_call,
    init_autoencoder,
    init_conditioner,
    init_unet,
    null_condition,
    param_shapes,
)
from ldm_jax.models.attention import for_chip
from ldm_jax.parallel.make_layout import make_layout
from ldm_jax.parallel.reduce import reduce_over_axis
from ldm_jax.rng import image_keys
from ldm_jax.sampling.editing import Edit
from ldm_jax.sampling.program import ImageInputs, Models, sample_chunk
from ldm_jax.sampling.sample_fn import (
    make_program,
    make_sampler_table,
    make_solver_inputs,
)
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.tools.plan.flops import count_flops
from ldm_jax.tools.plan.request import PlanRequest, change
from ldm_jax.tools.plan.topology import Topology
from ldm_jax.training.dispatch import skip_nonfinite
from ldm_jax.training.dry_run import (
    batch_shapes,
    stages_by_shape,
    tree_bytes,
)
from ldm_jax.training.loop import Stage
from ldm_jax.types import InputError, PyTree


class Work(NamedTuple):
    """A program and its sizes before compilation; bytes are without padding."""

    lower: Callable[[], jax.stages.Lowered]
    """Traces the program."""
    num_devices: int
    """Devices that run it together."""
    images: int
    """Images of a device."""
    state_bytes: float
    """Bytes of a device's part of the state."""
    frozen_bytes: float
    """Bytes of a device's frozen parameters."""
    input_bytes: float
    """Bytes of a device's part of a batch."""
    gradient_bytes: int
    """Bytes of all gradients; 0 for a sampling call."""
    flops: int
    """FLOPs of the mathematics of a device."""


def open_devices(topology: Topology | None) -> list[Any] | None:
    """Return the devices of a topology; None for those of this machine.

    Raises:
      InputError: If libtpu knows no such slice.
    """
    if topology is None:
        return None
    # JAX sees a v4 chip, which has two cores, as one device.
    kwargs = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **kwargs
        )
    except Exception as error:  # the plugin documents no types
        reason = " ".join(str(error).split())
        raise InputError(
            f"--topology: libtpu refuses {topology.name!r}: {reason}"
        ) from None
    return list(found.devices)


def step_work(request: PlanRequest, devices: list[Any] | None) -> Work:
    """Prepare the training step of a stage.

    Raises:
      InputError: If the batch size does not divide by devices and parts, or images are
        too small for a loss.
    """
    config = request.config
    layout = make_layout(config.parallel, devices)
    stage = _stage(request)
    layout.check_batch_size(
        stage.batch_size,
        f"{request.work}.batch_size",
        accumulate=config.parallel.accumulate,
    )
    state = jax.eval_shape(stage.init)
    batch = batch_shapes(build_model(config), config.data, stage.name, stage.batch_size)
    placed = layout.stand_ins(state, stage.frozen, batch)
    local = stage.batch_size // layout.num_devices
    step = skip_nonfinite(stage.step) if config.max_skipped_steps else stage.step
    share = functools.partial(_device_bytes, num_devices=len(layout.devices))

    def lower() -> jax.stages.Lowered:
        with for_chip(layout.devices[0].device_kind):
            return layout.lower(
                step,
                state,
                stage.frozen,
                batch,
                accumulate=config.parallel.accumulate,
            )

    return Work(
        lower=lower,
        num_devices=layout.num_devices,
        images=local,
        state_bytes=share(placed[0]),
        frozen_bytes=share(placed[1]),
        input_bytes=share(placed[2]),
        gradient_bytes=tree_bytes(state.params),
        flops=step_flops(request, local),
    )


def step_flops(request: PlanRequest, images: int) -> int:
    """Count the FLOPs of a training step's mathematics on a number of images."""
    plain = change(request, remat=False, accumulate=1)
    stage = _stage(plain)
    return count_flops(
        functools.partial(stage.step, reduce=reduce_over_axis),
        jax.eval_shape(stage.init),
        stage.frozen,
        batch_shapes(build_model(plain.config), plain.config.data, stage.name, images),
        jax.eval_shape(lambda: jax.random.key(0)),
    )


def sample_work(request: PlanRequest, devices: list[Any] | None) -> Work:
    """Prepare a sampling call of one device; devices do not communicate.

    Raises:
      InputError: If the schedule does not allow the sampler or the number of steps.
    """
    layout = make_layout(request.config.parallel, devices)
    model = build_model(request.config)
    images = request.batch_per_device or images_per_call(model, layout.platform)
    program = make_program(model, guided=True, max_steps=request.num_steps)
    settings = SamplingConfig(sampler=request.sampler, steps=request.num_steps)
    try:
        solver = make_solver_inputs(program.solver, settings)
        levels = make_levels(model.schedule, request.num_steps)
        table = make_sampler_table(program.solver, levels, settings)
    except ValueError as error:
        raise InputError(f"--sample: {error}") from None
    # Without padding, so that steps that are skipped do not count.
    solver = solver._replace(
        table=jax.tree.map(jnp.asarray, unpadded(table)),
        scales=solver.scales[: table.num_calls],
    )
    cond = jax.eval_shape(lambda: blank_inputs(model, batch_size=images))
    models = Models(
        SampleParams(
            param_shapes(init_autoencoder, model),
            param_shapes(init_unet, model),
            param_shapes(init_conditioner, model),
            shape_of((), jnp.float32),
        ),
        None,
    )
    inputs = ImageInputs(
        jax.eval_shape(lambda: image_keys([0] * images)),
        cond,
        jax.eval_shape(lambda c: null_condition(model, c), cond),
        Edit(),
    )
    fn = functools.partial(sample_chunk, program)
    here = SingleDeviceSharding(layout.devices[0])

    def on_device(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

    args = jax.tree.map(on_device, (models, solver, inputs))

    def lower() -> jax.stages.Lowered:
        with for_chip(layout.devices[0].device_kind):
            return jax.jit(fn).lower(*args)

    return Work(
        lower=lower,
        num_devices=1,
        images=images,
        state_bytes=0,
        frozen_bytes=tree_bytes(models),
        input_bytes=tree_bytes(inputs.cond),
        gradient_bytes=0,
        flops=count_flops(fn, models, solver, inputs),
    )


def _stage(request: PlanRequest) -> Stage:
    stages = stages_by_shape(request.config, build_model(request.config))
    return next(stage for stage in stages if stage.name == request.work)


def _device_bytes(tree: PyTree, *, num_devices: int) -> float:
    """Count the bytes of a placed tree on one device."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        shape, parts = leaf.shape, num_devices
        if getattr(leaf, "sharding", None) is not None:
            shape, parts = leaf.sharding.shard_shape(shape), 1
        total += math.prod(shape) * leaf.dtype.itemsize / parts
    return total
