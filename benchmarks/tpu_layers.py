"""What a TPU's compiler expects of single layers: the plain ones, and ours.

    python benchmarks/tpu_layers.py --topology v6e:2x2

Compiles attention with its projections, and 3x3 convolutions, of Stable Diffusion 1.5
at 4 images a chip and of LDM-4 at 16, values and gradients in bfloat16, for a TPU that
need not be here (the extra `plan`). Prints for each the bytes moved, the temporaries
and the estimated cycles, those of kernels among them. JSON with --json FILE.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from command import make_parser
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array

from ldm_jax.cli.exit_codes import run_main
from ldm_jax.models.attention import attend_plainly
from ldm_jax.models.kernels.convolution import convolve
from ldm_jax.models.kernels.packed_heads import attend_in_lanes
from ldm_jax.models.layers import Affine
from ldm_jax.tools.plan.compiling import chip_of, compile_program
from ldm_jax.tools.plan.kernels import kernel_cycles
from ldm_jax.tools.plan.programs import open_devices
from ldm_jax.tools.plan.topology import parse_topology, prepare_environment
from ldm_jax.types import InputError

PROG = "benchmarks/tpu_layers.py"
NUMBERS = ("NHWC", "HWIO", "NHWC")
STRIDES, PADDING = (1, 1), ((1, 1), (1, 1))


class Layer(NamedTuple):
    """A layer to compile in two ways."""

    name: str
    """What it is."""
    plain: Callable[..., Array]
    """The usual operations."""
    ours: Callable[..., Array]
    """What the networks call."""
    shapes: tuple[tuple[int, ...], ...]
    """Of its inputs."""


def attention(model: str, *sizes: int) -> Layer:
    """Attention of images, tokens, heads and channels of a head, and projections."""
    images, tokens, heads, width = sizes
    channels = heads * width
    name = f"{model}: {images} x {tokens} tokens, {heads} heads of {width}"

    def plain(x: Array, *kernels: Array) -> Array:
        *ways_in, out = kernels
        q, k, v = ((x @ way).reshape(images, tokens, heads, width) for way in ways_in)
        return attend_plainly(q, k, v).reshape(images, tokens, channels) @ out

    def ours(x: Array, *kernels: Array) -> Array:
        q, k, v, out = (Affine(kernel, None) for kernel in kernels)
        return attend_in_lanes(x, x, (q, k, v, out), heads, jnp.bfloat16)

    shapes = ((images, tokens, channels), *[(channels, channels)] * 4)
    return Layer(name, plain, ours, shapes)


def convolution(model: str, *sizes: int) -> Layer:
    """SiLU, a convolution that keeps the number of channels, and SiLU."""
    images, side, channels = sizes

    def layer(convolve: Callable[..., Array]) -> Callable[..., Array]:
        def call(x: Array, kernel: Array) -> Array:
            y = convolve(
                jax.nn.silu(x), kernel, STRIDES, PADDING, dimension_numbers=NUMBERS
            )
            return jax.nn.silu(y)

        return call

    shapes = ((images, side, side, channels), (3, 3, channels, channels))
    name = f"{model}: 3x3, {images} x {side}x{side}x{channels}"
    return Layer(name, layer(jax.lax.conv_general_dilated), layer(convolve), shapes)


LAYERS = (
    attention("SD 1.5", 4, 4096, 8, 40),
    attention("SD 1.5", 4, 1024, 8, 80),
    attention("LDM-4", 16, 1024, 14, 32),
    convolution("SD 1.5", 4, 64, 320),
)


def measure(fn: Callable[..., Array], layer: Layer, device: Any) -> dict[str, float]:
    """Compile values and gradients, and read what the compiler counted."""
    here = SingleDeviceSharding(device)
    inputs = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here)
        for shape in layer.shapes
    ]
    out = jax.eval_shape(fn, *inputs)
    slope = jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=here)

    def both(slope: Array, *inputs: Array) -> Any:
        values, pull = jax.vjp(fn, *inputs)
        return values, pull(slope)

    found = compile_program(
        lambda: jax.jit(both).lower(slope, *inputs), label="", say=lambda _: None
    )
    chip = chip_of(device)
    if found.memory is None or chip is None:
        raise InputError(f"{layer.name}: does not fit on a chip; try a larger one")
    of_kernels = kernel_cycles(chip, found.kernels)
    return {
        "moved": found.moved,
        "temporaries": found.memory.temporaries,
        "cycles": found.cycles + of_kernels,
        "cycles of kernels": of_kernels,
        "seconds to compile": found.seconds,
    }


def main(args: list[str]) -> None:
    """Compile every layer both ways, and print a table."""
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--topology", default="v6e:2x2", help="as of ldm plan")
    parser.add_argument("--json", type=Path, help="file to write")
    given = parser.parse_args(args)
    prepare_environment()
    # JAX is imported already, and reads these two no more from the environment.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    devices = open_devices(parse_topology(given.topology))
    if devices is None:
        raise InputError(f"--topology: got {given.topology!r}, wanted a TPU's")
    rows: list[dict[str, Any]] = []
    print("| layer | moved, MB | temporaries, MB | M cycles | of kernels |")
    print("|---|---:|---:|---:|---:|")
    for layer in LAYERS:
        for kind in ("plain", "ours"):
            found = measure(getattr(layer, kind), layer, devices[0])
            rows.append({"layer": layer.name, "kind": kind, **found})
            print(
                f"| {layer.name}, {kind} | {found['moved'] / 1e6:,.0f} "
                f"| {found['temporaries'] / 1e6:,.0f} | {found['cycles'] / 1e6:.2f} "
                f"| {found['cycles of kernels'] / 1e6:.2f} |",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main, PROG)
