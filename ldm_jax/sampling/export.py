"""Sample programs as bytes, which run without the networks of this package.

A file is a line with the name of the format, a line of JSON with the inputs of the
program, and a module of `jax.export`. Parameters, keys, conditions and the sampler's
table are inputs, each under its own name, so that no container of this package is
written; a key is stored as its words.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, Key

from ldm_jax.diffusion.schedules import DiscreteSchedule, EdmSchedule, FlowSchedule
from ldm_jax.files import parse_json
from ldm_jax.latent_diffusion import (
    LatentDiffusion,
    SampleParams,
    images_per_call,
    in_chunks,
    null_condition,
)
from ldm_jax.models.conditioning import ConditionInputs, null_inputs
from ldm_jax.rng import image_keys
from ldm_jax.sampling.editing import Edit
from ldm_jax.sampling.program import (
    ImageInputs,
    Models,
    SampleProgram,
    SolverInputs,
    SolverSpec,
    sample_chunk,
)
from ldm_jax.sampling.sample_fn import (
    Samples,
    check_inputs,
    make_program,
    make_solver_inputs,
)
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError, PyTree

MAGIC = b"ldm_jax sample program 2\n"
SCHEDULE_BY_NAME = {
    kind.__name__: kind for kind in (DiscreteSchedule, FlowSchedule, EdmSchedule)
}
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Header(NamedTuple):
    """Description of a program in its file, beside the module."""

    batch: int
    """Images a call; the last call of any number is padded."""
    solver: dict[str, Any]
    """Fields of the `SolverSpec` that its tables depend on."""
    num_classes: int
    """Real classes; the null class has this index."""
    null_tokens: list[int]
    """Tokens of the empty prompt."""
    key_impl: str
    """JAX's name for the kind of key."""
    platforms: list[str]
    """JAX's names of its platforms: cpu, cuda, rocm, tpu."""
    jax_version: str
    """The version of JAX that wrote it."""
    sha256: str
    """Digest of the module."""


def export_sample_program(
    model: LatentDiffusion,
    params: SampleParams,
    *,
    max_steps: int | None = None,
    guided: bool | None = None,
    batch: int | None = None,
    cond: ConditionInputs | None = None,
    platforms: Sequence[str] | None = None,
) -> bytes:
    """Write a sample function as bytes that any process with JAX can run.

    Its images equal, bit for bit, those of `make_sample_fn` on the same machine.

    Args:
      model: The model.
      params: Parameters; only their shapes are used, the values stay inputs.
      max_steps: Largest number of steps; None for that of the schedule.
      guided: Whether calls are guided; None leaves it to the settings of each call.
      batch: Images of a network call; None for `model.chunk`, or for 1 if a CPU is
        among the platforms.
      cond: Conditions of one image or more, whose shapes are used. None where
        the model reads labels, tokens or nothing.
      platforms: Some of `PLATFORMS`; None for this machine's.

    Returns:
      The program.

    Raises:
      ValueError: If a number is out of range, a name unknown, or the shape of the
        condition is not known.
    """
    platforms = [export.default_export_platform()] if platforms is None else platforms
    if batch is None:
        batch = min(images_per_call(model, name) for name in platforms)
    if batch < 1:
        raise ValueError(f"batch: got {batch}, wanted 1 or more")
    if unknown := [name for name in platforms if name not in PLATFORMS]:
        raise ValueError(
            f"platforms: got {unknown[0]!r}, wanted some of {', '.join(PLATFORMS)}"
        )
    program = make_program(model, guided=guided, max_steps=max_steps)
    key_impl = str(jax.random.key_impl(image_keys([0])))
    call = blank_call(program, params, cond, batch=batch)
    flat = jax.jit(flat_program(program, call, key_impl))
    with no_locations():
        exported = export.export(flat, platforms=list(platforms))(by_name(call))
        module = bytes(exported.serialize())
    header = Header(
        batch=batch,
        solver=solver_to_json(program.solver),
        num_classes=model.num_classes,
        null_tokens=list(model.null_tokens),
        key_impl=key_impl,
        platforms=list(exported.platforms),
        jax_version=jax.__version__,
        sha256=hashlib.sha256(module).hexdigest(),
    )
    line = json.dumps(header._asdict()).encode() + b"\n"
    return MAGIC + line + module


def load_sample_program(data: bytes) -> Callable[..., Samples]:
    """Make a sample function of the bytes of `export_sample_program`.

    It is compiled for this machine at the first call.

    Args:
      data: The program.

    Returns:
      `fn(params, keys, cond, settings, *, uncond)` for any number of images.

    Raises:
      InputError: If the bytes are no program, are damaged, or are for another
        platform. The function itself raises it for wrong shapes.
    """
    header, module = split_program(data)
    here = export.default_export_platform()
    if here not in header.platforms:
        raise InputError(
            f"program: made for {', '.join(header.platforms)}, but this is {here}; "
            f"export it with platforms=[{here!r}]"
        )
    try:
        exported = export.deserialize(bytearray(module))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"program: written by JAX {header.jax_version}, and this is "
            f"{jax.__version__}, which cannot read it ({error}); export it anew"
        ) from None
    run = jax.jit(exported.call)
    wanted = jax.tree.unflatten(exported.in_tree, exported.in_avals)[0][0]
    spec = solver_from_json(header.solver)

    def call_program(
        params: SampleParams, solver: SolverInputs, inputs: ImageInputs
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b f h w c"]]:
        words = jax.random.key_data(inputs.keys)
        call = Call(params, solver, words, inputs.cond, inputs.uncond)
        arrays = by_name(call)
        check_arrays(arrays, wanted)
        return run(arrays)

    def program_fn(
        params: SampleParams,
        keys: Key[Array, " b"],
        cond: ConditionInputs,
        settings: SamplingConfig,
        *,
        uncond: ConditionInputs | None = None,
    ) -> Samples:
        if (impl := str(jax.random.key_impl(keys))) != header.key_impl:
            raise InputError(f"keys: got {impl}, wanted {header.key_impl}")
        if uncond is None:
            uncond = null_inputs(
                cond,
                num_classes=header.num_classes,
                null_tokens=tuple(header.null_tokens),
            )
        inputs = ImageInputs(keys, cond, uncond, Edit())
        check_inputs(inputs, num_classes=header.num_classes)
        params = jax.tree.map(jnp.asarray, params)
        solver = make_solver_inputs(spec, settings)
        call = functools.partial(call_program, params, solver)
        images, frames = in_chunks(call, inputs, size=header.batch)
        return Samples(images, jnp.moveaxis(frames, 1, 0))

    return program_fn


class Call(NamedTuple):
    """The inputs of a program; the names of its arrays are paths in here."""

    params: SampleParams
    """Parameters of the model."""
    solver: SolverInputs
    """Sampler and guidance of all images."""
    keys: PyTree
    """Words of the key of each image; typed keys cannot be written."""
    cond: ConditionInputs
    """Condition of each image."""
    uncond: ConditionInputs
    """Condition that each image is guided away from."""


def by_name(call: Call) -> dict[str, Any]:
    """Name every array by its path, as in `params/unet/conv_in/kernel`."""
    leaves = jax.tree_util.tree_flatten_with_path(call)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }


def flat_program(
    program: SampleProgram, like: Call, key_impl: str
) -> Callable[[dict[str, Array]], tuple[Array, Array]]:
    """Make a sample program a function of named arrays."""
    names, structure = list(by_name(like)), jax.tree.structure(like)

    def flat(arrays: dict[str, Array]) -> tuple[Array, Array]:
        call: Call = jax.tree.unflatten(structure, [arrays[name] for name in names])
        keys = jax.random.wrap_key_data(call.keys, impl=key_impl)
        inputs = ImageInputs(keys, call.cond, call.uncond, Edit())
        return sample_chunk(program, Models(call.params, None), call.solver, inputs)

    return flat


def solver_to_json(spec: SolverSpec) -> dict[str, Any]:
    """Convert a `SolverSpec` to JSON; float64 numbers read back exactly."""
    schedule = {k: np.asarray(v).tolist() for k, v in spec.schedule._asdict().items()}
    kind = type(spec.schedule).__name__
    return {**spec._asdict(), "schedule": {"kind": kind, **schedule}}


def solver_from_json(fields: dict[str, Any]) -> SolverSpec:
    """Invert `solver_to_json`."""
    schedule: dict[str, Any] = dict(fields["schedule"])
    kind = SCHEDULE_BY_NAME[schedule.pop("kind")]
    if kind is DiscreteSchedule:
        schedule = {name: np.asarray(value) for name, value in schedule.items()}
    return SolverSpec(**{**fields, "schedule": kind(**schedule)})


def blank_call(
    program: SampleProgram,
    params: SampleParams,
    cond: ConditionInputs | None,
    *,
    batch: int,
) -> Call:
    """Make inputs of the right shapes, with arbitrary values.

    Raises:
      ValueError: If no condition is given and the model reads embeddings or an image,
        whose shape the data determines.
    """
    model = program.model
    conditioner = model.conditioner
    if cond is None:
        stacked = params.unet["conv_in"]["kernel"].shape[2] > model.latent_shape[2]
        if conditioner.reads == "embedding" or stacked:
            raise ValueError(
                "cond: not given, but this model reads vectors or a picture beside "
                "each image; wanted an example whose shapes are taken"
            )
        has_label = conditioner.adds_label or conditioner.reads == "label"
        has_tokens = conditioner.reads == "tokens"
        tokens = jnp.zeros((1, len(model.null_tokens)), jnp.int32)
        label = jnp.zeros((1,), jnp.int32) if has_label else None
        cond = ConditionInputs(label, tokens if has_tokens else None)

    def several(x: Array) -> Array:
        return jnp.zeros((batch, *x.shape[1:]), x.dtype)

    cond = ConditionInputs(*(None if x is None else several(x) for x in cond))
    return Call(
        jax.eval_shape(lambda: params),
        make_solver_inputs(program.solver, SamplingConfig(steps=1)),
        jax.random.key_data(image_keys([0] * batch)),
        cond,
        null_condition(model, cond),
    )


@contextlib.contextmanager
def no_locations() -> Iterator[None]:
    """Lower programs in the block without the paths of our files.

    The paths name folders of this machine: two programs of one model would differ.
    """
    name = "jax_traceback_in_locations_limit"
    limit = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, limit)


def split_program(data: bytes) -> tuple[Header, bytes]:
    """Split a program into its header and its module.

    Raises:
      InputError: If the bytes are no program, or were changed or cut.
    """
    if not data.startswith(MAGIC):
        raise InputError(
            f"program: got {len(data)} bytes that do not begin as a sample program of "
            "this version; wanted what export_sample_program returns"
        )
    line, _, module = data[len(MAGIC) :].partition(b"\n")
    try:
        text = line.decode(errors="replace")
        header = Header(**parse_json(text, what="program", remedy="export it anew"))
    except (InputError, TypeError):
        header = None
    if header is None or hashlib.sha256(module).hexdigest() != header.sha256:
        raise InputError("program: damaged or cut short; export it anew")
    return header, module


def check_arrays(arrays: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise `InputError` if the inputs are not those that a program was made for."""
    if missing := sorted(wanted.keys() - arrays.keys()):
        raise InputError(f"program: it reads {missing[0]}, which is not given")
    if extra := sorted(arrays.keys() - wanted.keys()):
        raise InputError(f"program: got {extra[0]}, which it does not read")
    for name, aval in wanted.items():
        array = arrays[name]
        if (array.shape, array.dtype) != (aval.shape, aval.dtype):
            raise InputError(
                f"program: {name} is {array.dtype}{list(array.shape)}, wanted "
                f"{aval.dtype}{list(aval.shape)}; it was made for another model"
            )
