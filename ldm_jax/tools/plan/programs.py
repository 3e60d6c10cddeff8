"""The programs of a run, by shape alone, for devices that need not be here."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from ldm_jax.build import build_model, shape_of
from ldm_jax.config import Config
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
from ldm_jax.parallel.make_layout import Layout, make_layout
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
from ldm_jax.tools.plan.arguments import Request, batch_size_of, change
from ldm_jax.tools.plan.flops import count_flops
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
    """One program and what is known of it before it is compiled."""

    lower: Callable[[], jax.stages.Lowered]
    """Traces it."""
    num_devices: int
    """Devices that run it together."""
    images: int
    """Images of each."""
    state_bytes: float
    """Bytes of the state that each keeps, without padding."""
    frozen_bytes: float
    """Bytes of the parameters that each only reads."""
    input_bytes: float
    """Bytes of a batch that each is sent."""
    gradient_bytes: int
    """Bytes of all gradients; 0 where none are taken."""
    flops: int
    """Of the mathematics, for each device."""


def open_devices(topology: Topology | None) -> list[Any] | None:
    """Return the devices of a topology; None for those that are here.

    Raises:
      InputError: If libtpu knows no such slice.
    """
    if topology is None:
        return None
    # A v4 chip runs as one device, as on the real machine.
    kwargs = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **kwargs
        )
    except Exception as error:  # whatever its plugin raises
        reason = " ".join(str(error).split())
        raise InputError(
            f"--topology: libtpu refuses {topology.name!r}: {reason}"
        ) from None
    return list(found.devices)


def resolve(request: Request, num_devices: int) -> Config:
    """Return the config of a question, its batch made that of these devices."""
    if request.work == "sample" or request.batch_per_device is None:
        return change(request.config, request.work)
    size = request.batch_per_device * num_devices
    return change(request.config, request.work, batch_size=size)


def step_work(config: Config, request: Request, devices: list[Any] | None) -> Work:
    """Prepare the training step of a stage.

    Raises:
      InputError: If the batch does not divide by devices and parts, or images are too
        small for what is asked.
    """
    layout = make_layout(config.parallel, devices)
    layout.check_batch_size(
        batch_size_of(config, request.work),
        f"{request.work}.batch_size",
        accumulate=config.parallel.accumulate,
    )
    stage = _stage(config, request)
    state = jax.eval_shape(stage.init)
    batch = batch_shapes(build_model(config), config.data, stage.name, stage.batch_size)
    placed = layout.stand_ins(state, stage.frozen, batch)
    local = stage.batch_size // layout.num_devices
    step = skip_nonfinite(stage.step) if config.max_skipped_steps else stage.step
    share = functools.partial(_share, num_devices=_copies(layout))

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
        flops=step_flops(config, request, local),
    )


def step_flops(config: Config, request: Request, images: int) -> int:
    """Count the FLOPs of a step's mathematics on a number of images."""
    plain = change(config, request.work, remat=False, accumulate=1)
    stage = _stage(plain, request)
    return count_flops(
        functools.partial(stage.step, reduce=reduce_over_axis),
        jax.eval_shape(stage.init),
        stage.frozen,
        batch_shapes(build_model(plain), plain.data, stage.name, images),
        jax.eval_shape(lambda: jax.random.key(0)),
    )


def sample_work(config: Config, request: Request, devices: list[Any] | None) -> Work:
    """Prepare a call of the sampler: one device's chunk; devices do not communicate.

    Raises:
      InputError: If the number of steps or the sampler is not one the schedule has.
    """
    layout = make_layout(config.parallel, devices)
    model = build_model(config)
    images = request.batch_per_device or images_per_call(model, layout.platform)
    program = make_program(model, guided=True, max_steps=request.num_steps)
    settings = SamplingConfig(sampler=request.sampler, steps=request.num_steps)
    try:
        solver = make_solver_inputs(program.solver, settings)
        levels = make_levels(model.schedule, request.num_steps)
        table = make_sampler_table(program.solver, levels, settings)
    except ValueError as error:
        raise InputError(f"--sample: {error}") from None
    # Of its own length, so that calls that never take place are not counted.
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


def _stage(config: Config, request: Request) -> Stage:
    stages = stages_by_shape(config, build_model(config))
    return next(stage for stage in stages if stage.name == request.work)


def _copies(layout: Layout) -> int:
    return len(layout.devices)


def _share(tree: PyTree, *, num_devices: int) -> float:
    """Count the bytes of a placed tree that lie on one device."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        shape, parts = leaf.shape, num_devices
        if getattr(leaf, "sharding", None) is not None:
            shape, parts = leaf.sharding.shard_shape(shape), 1
        total += math.prod(shape) * leaf.dtype.itemsize / parts
    return total
