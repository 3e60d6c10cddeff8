"""How fast is a whole sample: ours and diffusers', the same weights, taking turns.

    python benchmarks/sampling.py --model digits --batches 1 16
    python benchmarks/sampling.py --config ldm/sd15 --dtype bfloat16

Times 50 guided DDIM steps and the decoder, from noise on the host to images on the
host. What a frozen text encoder would say of a prompt is random vectors here. Prints a
table of both, and what a step costs over the network alone; JSON with --json FILE. With
--check it exits 1 if the scan adds 3 % or more to the network, or the two do not draw
the same images (in float32). Needs the extra `parity`.
"""

import dataclasses
import json
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from command import make_parser
from jax import Array
from side_by_side import (
    LATENT_SCALE,
    alternate,
    draw_model,
    import_peers,
    text_config,
)

from ldm_jax.build import build_model
from ldm_jax.cli.exit_codes import run_main
from ldm_jax.cli.huge_pages import use_huge_pages
from ldm_jax.config import Config
from ldm_jax.config.load_config import load_config
from ldm_jax.latent_diffusion import (
    LatentDiffusion,
    SampleParams,
    calls_at_once,
    denoiser_of,
    images_per_call,
    null_condition,
    prepare,
)
from ldm_jax.models.conditioning import ConditionInputs
from ldm_jax.pretrained.diffusers_export import write_folder
from ldm_jax.pretrained.model_weights import ModelWeights
from ldm_jax.pretrained.open_weights import to_sample_params
from ldm_jax.rng import Stream, image_keys, image_step_keys, normal
from ldm_jax.sampling.sample_fn import make_sample_fn
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError

PROG = "benchmarks/sampling.py"

MAX_SCAN_OVERHEAD = 0.03
MAX_DIFFERENCE = 1e-2
SCALE = 2.0
Draw = Callable[[], Any]
Pass = Callable[[SampleParams, jax.Array], jax.Array]


class Case(NamedTuple):
    """One batch to draw."""

    model: LatentDiffusion
    """With `chunk` images a call."""
    params: SampleParams
    """Of both stages."""
    cond: ConditionInputs
    """What each image shows."""
    noise: np.ndarray
    """Where each begins, on the host."""
    steps: int
    """Denoising steps."""


def config_of(name: str, *, dtype: str | None) -> Config:
    """Return the config of a model as it samples: from vectors where it reads text."""
    config = text_config() if name == "text" else load_config(name)
    second = dataclasses.replace(config.diffusion, remat=False)
    if second.condition.freezes_text:
        second = dataclasses.replace(second, condition=second.condition.as_vectors())
    first = config.autoencoder
    if dtype is not None:
        first, second = (
            dataclasses.replace(stage, dtype=dtype) for stage in (first, second)
        )
    return dataclasses.replace(config, autoencoder=first, diffusion=second)


def make_case(config: Config, weights: ModelWeights, *, batch: int, steps: int) -> Case:
    """Choose conditions and seeds for a batch."""
    model = build_model(config)._replace(chunk=batch)
    label, embedding = None, None
    if config.diffusion.condition.label:
        label = jnp.arange(batch, dtype=jnp.int32) % config.data.num_classes
    else:
        condition = config.diffusion.condition
        shape = (batch, condition.embedding_length, condition.embedding_width)
        embedding = jnp.asarray(np.random.RandomState(1).randn(*shape), jnp.float32)
    cond = ConditionInputs(label=label, embedding=embedding)
    keys = image_step_keys(image_keys(list(range(batch))), Stream.SAMPLE_START)
    noise = np.asarray(normal(keys, model.latent_shape))
    return Case(model, to_sample_params(weights), cond, noise, steps)


def our_sample(case: Case) -> Draw:
    """Make what draws a batch with this package."""
    batch = len(case.noise)
    sample_fn = make_sample_fn(case.model, guided=True)
    settings = SamplingConfig(steps=case.steps, guidance_scale=(SCALE,))

    def draw() -> np.ndarray:
        keys = image_keys(list(range(batch)))
        return np.asarray(sample_fn(case.params, keys, case.cond, settings).images)

    return draw


def their_sample(case: Case, folder: Path, *, mode: str | None) -> Draw:
    """Make what draws the same batch with diffusers, eager or compiled in a mode."""
    torch, library, device = import_peers()
    dtype = getattr(torch, np.dtype(case.model.unet.dtype).name)
    has_labels = case.cond.label is not None
    name = "UNet2DModel" if has_labels else "UNet2DConditionModel"
    parts = [(name, "unet"), ("AutoencoderKL", "vae")]
    unet, vae = (
        getattr(library, cls)
        .from_pretrained(folder, subfolder=sub, torch_dtype=dtype)
        .to(device, memory_format=torch.channels_last)
        .eval()
        for cls, sub in parts
    )
    scheduler = library.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    decoder = vae.decode
    if mode is not None:
        unet = torch.compile(unet, dynamic=False, mode=mode)
        decoder = torch.compile(decoder, dynamic=False)
    null = null_condition(case.model, case.cond)
    word = "class_labels" if has_labels else "encoder_hidden_states"
    rows = [c.label if has_labels else c.embedding for c in (null, case.cond)]
    both = torch.from_numpy(np.concatenate([np.asarray(row) for row in rows]))
    details = both.to(device) if has_labels else both.to(device, dtype)
    start = torch.from_numpy(case.noise.transpose(0, 3, 1, 2).copy())

    @torch.inference_mode()
    def draw() -> np.ndarray:
        scheduler.set_timesteps(case.steps, device=device)
        x, cond = start.to(device, dtype), {word: details}
        for t in scheduler.timesteps:
            uncond, conditional = unet(torch.cat([x, x]), t, **cond).sample.chunk(2)
            guided = uncond + SCALE * (conditional - uncond)
            x = scheduler.step(guided, t, x).prev_sample
        images = decoder(x / LATENT_SCALE).sample.clamp(-1, 1)
        return images.permute(0, 2, 3, 1).float().cpu().numpy()

    return draw


def our_parts(case: Case) -> tuple[dict[str, Draw], float]:
    """Make the parts of our sample, and count the operations of one forward pass.

    Returns:
      `network`: the passes of the network for the whole batch, in the calls that the
      sampler makes (on a CPU, an image each, side by side); `plain`: the same as one
      plain batch; `one step`: a sample of one step, for what a sample costs around its
      steps. And the floating-point operations of a pass of the whole batch, with
      condition and without, as XLA counts them.
    """
    model, params, batch = case.model, case.params, len(case.noise)
    null = null_condition(model, case.cond)
    pair = [prepare(model, params, inputs) for inputs in (null, case.cond)]
    size = images_per_call(model, jax.default_backend())
    at_once = calls_at_once(model, jax.default_backend())

    def network(num: int) -> tuple[Pass, jax.Array]:
        cond = jax.tree.map(
            lambda *rows: jnp.concatenate([r[:num] for r in rows]), *pair
        )
        t = jnp.full(2 * num, 500.0)

        def forward(params: SampleParams, x: jax.Array) -> jax.Array:
            return denoiser_of(model, params)(x, t, cond)

        return forward, jnp.concatenate([jnp.asarray(case.noise[:num])] * 2)

    def repeated(num: int) -> Draw:
        forward, x_t = network(num)

        # One program: a call from Python costs 0.2 ms, which no sampler step pays.
        # Each pass needs the one before, and stays near the start.
        @jax.jit
        def run(params: SampleParams, x: Array) -> Array:
            def step(_: int, y: jax.Array) -> jax.Array:
                return x + 1e-3 * forward(params, y)

            return jax.lax.fori_loop(0, case.steps, step, x)

        def several() -> None:
            with ThreadPoolExecutor(at_once) as threads:
                list(threads.map(once, range(batch // num)))

        def once(_: int) -> None:
            jax.block_until_ready(run(params, x_t))

        once(0)  # compiled by one thread alone
        return several

    forward, x_t = network(batch)
    cost: Any = jax.jit(forward).lower(params, x_t).cost_analysis()
    parts = {
        "network": repeated(size),
        "plain": repeated(batch),
        "one step": our_sample(case._replace(steps=1)),
    }
    return parts, float(cost["flops"])


def measure(
    config: Config, weights: ModelWeights, folder: Path, args: Namespace
) -> Iterator[dict[str, Any]]:
    """Measure every batch size; yield a row of figures for each."""
    for batch in args.batches:
        case = make_case(config, weights, batch=batch, steps=args.steps)
        draws = {"ours": our_sample(case)}
        if not args.no_eager:
            draws["diffusers"] = their_sample(case, folder, mode=None)
        if not args.no_compile:
            draws["compiled"] = their_sample(case, folder, mode=args.compile_mode)
        parts: dict[str, Draw] = {}
        flops = 0.0
        if not args.no_parts:
            parts, flops = our_parts(case)
        first = {name: draw() for name, draw in (draws | parts).items()}
        seconds = alternate(draws | parts, rounds=args.rounds)
        median = {name: statistics.median(s) for name, s in seconds.items()}
        theirs = [name for name in draws if name != "ours"]
        row: dict[str, Any] = {
            "batch": batch,
            "seconds": {name: median[name] for name in draws},
            "images_per_second": {name: batch / median[name] for name in draws},
            "diffusers_over_ours": {n: median[n] / median["ours"] for n in theirs},
            "largest_difference": {
                name: float(np.abs(first[name] - first["ours"]).max())
                for name in theirs
            },
        }
        if parts:
            row |= part_figures(seconds, steps=case.steps)
            row["gflop_per_step"] = flops / 1e9
            row["gflops_per_second"] = flops * case.steps / median["ours"] / 1e9
        yield row


def part_figures(seconds: dict[str, list[float]], *, steps: int) -> dict[str, float]:
    """Return what a step takes and what the scan and the calls add to the network."""
    median = {name: statistics.median(s) for name, s in seconds.items()}
    each = [
        (whole - one) / (steps - 1)
        for whole, one in zip(seconds["ours"], seconds["one step"], strict=True)
    ]
    over = [
        steps * one / all_passes - 1
        for one, all_passes in zip(each, seconds["network"], strict=True)
    ]
    step = statistics.median(each)
    return {
        "ms_per_step": 1e3 * step,
        "ms_network": 1e3 * median["network"] / steps,
        "ms_plain_batch": 1e3 * median["plain"] / steps,
        "ms_around": 1e3 * (median["one step"] - step),
        "scan_overhead": statistics.median(over),
        "calls_over_plain": median["network"] / median["plain"] - 1,
    }


def to_text(row: dict[str, Any]) -> str:
    """Write the figures of a batch size."""
    lines = [f"batch {row['batch']}", "| | seconds | images/s | over ours | differs |"]
    lines.append("|---|---:|---:|---:|---:|")
    for name, seconds in row["seconds"].items():
        ratio = row["diffusers_over_ours"].get(name, 1.0)
        apart = row["largest_difference"].get(name, 0.0)
        speed = row["images_per_second"][name]
        lines.append(
            f"| {name} | {seconds:.3f} | {speed:.3g} | {ratio:.2f} | {apart:.0e} |"
        )
    if "ms_per_step" not in row:
        return "\n".join(lines)
    lines += [
        f"a step {row['ms_per_step']:.2f} ms, of which the network as it is called "
        f"{row['ms_network']:.2f} ms: the scan adds {row['scan_overhead']:+.1%}",
        f"the network as one plain batch {row['ms_plain_batch']:.2f} ms: the calls add "
        f"{row['calls_over_plain']:+.1%}",
        f"around the steps, the decoder and Python, {row['ms_around']:.1f} ms a batch",
        f"{row['gflop_per_step']:.2f} GFLOP a "
        f"step, {row['gflops_per_second']:.1f} GFLOP/s over the whole sample",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Measure, print, and check if asked to."""
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--model", choices=("digits", "text"), default="digits")
    parser.add_argument("--config", help="a recipe, in the place of --model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of both")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="theirs, eager only")
    parser.add_argument("--no-eager", action="store_true", help="theirs, compiled only")
    parser.add_argument("--no-parts", action="store_true", help="whole samples only")
    parser.add_argument("--compile-mode", default="default", help="of torch.compile")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    if args.steps < 2 or min(args.batches) < 1 or args.rounds < 1:
        raise InputError(
            "--steps, --batches, --rounds: wanted 2 steps or more, and batches and "
            "rounds of 1 or more"
        )
    name = args.config or args.model
    config = config_of(
        "configs/digits.py" if name == "digits" else name, dtype=args.dtype
    )
    weights = draw_model(config)
    rows: list[dict[str, Any]] = []
    print(f"{name}, {args.steps} guided DDIM steps, {jax.devices()[0].device_kind}")
    with tempfile.TemporaryDirectory() as folder:
        write_folder(weights, Path(folder))
        for row in measure(config, weights, Path(folder), args):
            rows.append(row)
            print("\n" + to_text(row), flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=2) + "\n")
    slow = [row for row in rows if row.get("scan_overhead", 0.0) >= MAX_SCAN_OVERHEAD]
    apart = [
        row
        for row in rows
        if max(row["largest_difference"].values(), default=0.0) > MAX_DIFFERENCE
    ]
    if args.check and (slow or apart):
        raise InputError(
            f"falls short: the scan adds {MAX_SCAN_OVERHEAD:.0%} or more at batch "
            f"{[row['batch'] for row in slow]}; images differ at batch "
            f"{[row['batch'] for row in apart]}"
        )


if __name__ == "__main__":
    use_huge_pages()
    run_main(main, PROG)
