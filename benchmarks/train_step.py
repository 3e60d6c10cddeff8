"""How fast is a training step of stage 2: ours and diffusers', taking turns.

    python benchmarks/train_step.py --model digits --batches 32 --against diffusers
    python benchmarks/train_step.py --config ldm/sd15 --batches 32 \
        --dtype bfloat16

Times whole updates from random latents: noise, loss, gradients, clipping, AdamW and the
average of the weights, as the recipe trains: as many steps a dispatch, on as many
devices. Prints the time of a step, images/s, the FLOP/s of the mathematics and their
share of the chip's peak, memory, what compiling takes with an empty cache and with a
full one, and how long the host is busy with a step. JSON with --json FILE. With
--against diffusers (the extra `parity`) it trains their UNet too, eager and compiled,
of the same weights, with the same batch and precision.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from command import make_parser
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
from ldm_jax.config.launch import Launch
from ldm_jax.config.load_config import load_config
from ldm_jax.parallel.launch import start
from ldm_jax.parallel.make_layout import make_layout
from ldm_jax.pretrained.diffusers_export import write_folder
from ldm_jax.pretrained.model_weights import ModelWeights
from ldm_jax.rng import root_key
from ldm_jax.tools.plan.compiling import Memory, chip_of, compile_program
from ldm_jax.tools.plan.programs import step_flops
from ldm_jax.tools.plan.request import ELSEWHERE, PlanRequest, change
from ldm_jax.training.diffusion_stage import diffusion_stage
from ldm_jax.training.diffusion_step import DiffusionParams, FrozenParams
from ldm_jax.training.dispatch import several_steps
from ldm_jax.training.dry_run import batch_shapes
from ldm_jax.training.state import init_state, make_optimizer
from ldm_jax.types import InputError

PROG = "benchmarks/train_step.py"
CACHE = "compiled"
"""Within the temporary folder: JAX keeps to the first folder it is given."""
INNER = 4
"""Steps between two waits for the device, at the least: training waits now and then."""
Round = Callable[[], Any]


class Ours(NamedTuple):
    """Our side, ready to train."""

    round_of: Callable[[], float]
    """Makes some steps, waits for them, and returns the seconds of these that the host
    was busy."""
    seconds_cold: float
    """Of tracing and compiling with an empty cache."""
    seconds_warm: float
    """Of tracing again and loading what the cache has."""
    memory: Memory
    """What the compiler says a device needs."""
    flops: int
    """Of the mathematics of one step."""


def steps_of_round(config: Config) -> int:
    """Return how many steps a turn makes: whole dispatches."""
    size = config.parallel.steps_per_dispatch
    return -(-INNER // size) * size


def prepare_config(
    config: Config,
    *,
    batch: int,
    dtype: str | None,
    remat: bool,
    dispatch: int | None,
) -> Config:
    """Return the config of a step from latents, of one batch size and precision."""
    request = PlanRequest(config, None, "diffusion", None, "ddim", 50, False)
    config = change(request, batch_size=batch).config
    data = dataclasses.replace(config.data, latents=ELSEWHERE)
    second = config.diffusion
    if dtype is not None:
        second = dataclasses.replace(second, dtype=dtype)
    if not remat:
        second = dataclasses.replace(second, remat=False)
    parallel = config.parallel
    if dispatch is not None:
        parallel = dataclasses.replace(parallel, steps_per_dispatch=dispatch)
    return dataclasses.replace(config, data=data, diffusion=second, parallel=parallel)


def random_batch(config: Config) -> Any:
    """Draw moments of unit size, labels, tokens or vectors: none of them means much."""
    random = np.random.RandomState(0)
    condition = config.diffusion.condition
    highest = {"label": config.data.num_classes, "tokens": condition.vocab_size}
    size = config.diffusion.batch_size

    def draw(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        if np.issubdtype(leaf.dtype, np.floating):
            return random.randn(*leaf.shape).astype(leaf.dtype)
        top = max(highest.get(path[0].name, size), 1)
        return random.randint(top, size=leaf.shape).astype(leaf.dtype)

    shapes = batch_shapes(build_model(config), config.data, "diffusion", size)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def prepare_ours(
    config: Config, weights: ModelWeights, batch: Any, cache: Path
) -> Ours:
    """Compile our step twice, and start training."""
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    model, layout = build_model(config), make_layout(config.parallel)
    layout.check_batch_size(config.diffusion.batch_size, "--batches")
    condition, null = config.diffusion.condition, None
    if condition.freezes_text:
        vectors = condition.as_vectors()
        shape = (vectors.embedding_length, vectors.embedding_width)
        null = np.zeros(shape, np.float32)
    frozen = FrozenParams({}, jnp.float32(LATENT_SCALE), {})
    stage = diffusion_stage(config, model, frozen, Path(), null_embedding=null)
    conditioner = weights.conditioner if condition.trained else {}
    params = jax.tree.map(jnp.asarray, DiffusionParams(weights.unet, conditioner))
    optimizer = make_optimizer(config.diffusion.optim, num_steps=config.diffusion.steps)
    size, step = config.parallel.steps_per_dispatch, stage.step
    if size > 1:
        batch = jax.tree.map(lambda leaf: np.stack([leaf] * size), batch)
        step = several_steps(step)
    mapped = layout.map_step(step)
    state: Any = layout.init(lambda: init_state(params, optimizer))
    placed, key = layout.place(stage.frozen), layout.place(root_key(config.seed))
    sent = layout.split(batch, stacked=size > 1)

    cold = compile_program(
        lambda: mapped.lower(state, placed, sent, key),
        label="a step",
        say=lambda line: None,
    )
    jax.clear_caches()
    if cold.memory is None:
        raise InputError(f"--batches: a step needs {cold.shortage}; try a smaller one")
    jax.block_until_ready((state, placed, sent))
    began = time.perf_counter()
    state, _ = mapped(state, placed, sent, key)
    seconds_warm = time.perf_counter() - began

    def round_of() -> float:
        nonlocal state
        busy = 0.0
        for _ in range(steps_of_round(config) // size):
            began = time.perf_counter()
            state, _ = mapped(state, placed, sent, key)
            busy += time.perf_counter() - began
        jax.block_until_ready(state)
        return busy

    request = PlanRequest(config, None, "diffusion", None, "ddim", 50, False)
    flops = step_flops(request, config.diffusion.batch_size)
    return Ours(round_of, cold.seconds, seconds_warm, cold.memory, flops)


def prepare_theirs(
    config: Config, folder: Path, batch: Any, *, compiled: bool
) -> Round:
    """Make what trains the same UNet with diffusers and torch, eager or compiled.

    The posterior's noise, the dropping of conditions, the levels, clipping, AdamW and
    the average of the weights are there, as in ours.
    """
    torch, library, device = import_peers()
    settings, optim = config.diffusion, config.diffusion.optim
    has_labels = settings.condition.label
    if settings.prediction != "eps" or not (has_labels or batch.embedding is not None):
        raise InputError(
            f"--against: got a model that predicts {settings.prediction} on "
            f"{settings.condition.context}, wanted eps on a class or on vectors"
        )
    name = "UNet2DModel" if has_labels else "UNet2DConditionModel"
    unet = getattr(library, name).from_pretrained(folder, subfolder="unet")
    unet = unet.to(device, memory_format=torch.channels_last).train()
    averaged = [p.detach().clone() for p in unet.parameters()]
    weights = list(unet.parameters())
    optimizer = torch.optim.AdamW(
        weights,
        lr=optim.lr,
        betas=(optim.b1, optim.b2),
        weight_decay=optim.weight_decay,
        fused=True,
    )
    network = torch.compile(unet, dynamic=False) if compiled else unet
    scheduler = library.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    abar = scheduler.alphas_cumprod.to(device)
    moments = torch.from_numpy(batch.moments.transpose(0, 3, 1, 2).copy()).to(device)
    mean, log_variance = moments.chunk(2, dim=1)
    std = (0.5 * log_variance.clamp(-30.0, 20.0)).exp()
    word = "class_labels" if has_labels else "encoder_hidden_states"
    cond = torch.from_numpy(np.asarray(batch.label if has_labels else batch.embedding))
    cond = cond.to(device)
    null = torch.full_like(cond, config.data.num_classes if has_labels else 0)
    size = len(mean)
    keep_shape = (size, *[1] * (cond.ndim - 1))
    half = settings.dtype == "bfloat16"

    def step() -> None:
        x_0 = LATENT_SCALE * (mean + std * torch.randn_like(mean))
        eps = torch.randn_like(x_0)
        t = torch.randint(settings.num_timesteps, (size,), device=device)
        level = abar[t].view(-1, 1, 1, 1)
        x_t = (level.sqrt() * x_0 + (1.0 - level).sqrt() * eps).contiguous(
            memory_format=torch.channels_last
        )
        drop = torch.rand(keep_shape, device=device) < settings.condition_dropout
        given = torch.where(drop, null, cond)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            predicted = network(x_t, t, **{word: given}).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averaged, weights, 1.0 - optim.ema_decay)

    def round_of() -> None:
        for _ in range(steps_of_round(config)):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    return round_of


def measure(
    config: Config, weights: ModelWeights, folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Measure one batch size."""
    batch = random_batch(config)
    ours = prepare_ours(config, weights, batch, folder / CACHE)
    rounds_of: dict[str, Round] = {"ours": ours.round_of}
    if args.against:
        rounds_of["diffusers"] = prepare_theirs(config, folder, batch, compiled=False)
        if not args.no_compile:
            rounds_of["compiled"] = prepare_theirs(config, folder, batch, compiled=True)
    for round_of in rounds_of.values():
        round_of()
    seconds = alternate(rounds_of, rounds=args.rounds)
    each = steps_of_round(config)
    busy = statistics.median(ours.round_of() for _ in range(args.rounds)) / each
    steps = {name: statistics.median(row) / each for name, row in seconds.items()}
    device = jax.devices()[0]
    chip, size = chip_of(device), config.diffusion.batch_size
    mfu = None
    if chip is not None and config.diffusion.dtype == "bfloat16":
        mfu = ours.flops / steps["ours"] / chip.peak / len(jax.devices())
    stats = device.memory_stats() or {}
    return {
        "device": device.device_kind,
        "devices": len(jax.devices()),
        "batch_size": size,
        "dtype": config.diffusion.dtype,
        "steps_a_dispatch": config.parallel.steps_per_dispatch,
        "seconds_a_step": steps,
        "images_per_second": {name: size / value for name, value in steps.items()},
        "theirs_over_ours": {n: v / steps["ours"] for n, v in steps.items()},
        "gflop_a_step": ours.flops / 1e9,
        "gflops_per_second": {n: ours.flops / v / 1e9 for n, v in steps.items()},
        "mfu": mfu,
        "bytes_by_the_compiler": ours.memory.peak,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "seconds_to_compile": ours.seconds_cold,
        "seconds_from_cache": ours.seconds_warm,
        "seconds_host_is_busy": busy,
    }


def to_text(row: dict[str, Any]) -> str:
    """Write the figures of a batch size."""
    lines = [
        f"batch {row['batch_size']}, {row['dtype']}, {row['devices']} x "
        f"{row['device']}, {row['gflop_a_step']:.2f} GFLOP a step",
        "| | ms a step | images/s | GFLOP/s | over ours |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, seconds in row["seconds_a_step"].items():
        lines.append(
            f"| {name} | {1e3 * seconds:.1f} | {row['images_per_second'][name]:.4g} | "
            f"{row['gflops_per_second'][name]:.4g} | "
            f"{row['theirs_over_ours'][name]:.2f} |"
        )
    mfu, peak = row["mfu"], row["peak_bytes"]
    of_peak = "no peak known" if mfu is None else f"{mfu:.1%} of the peak (MFU)"
    frozen_weights = (
        "" if peak is None else f", {peak / 2**30:.2f} GiB taken at the most"
    )
    return "\n".join(
        [
            *lines,
            f"{of_peak}; a device needs {row['bytes_by_the_compiler'] / 2**30:.2f} GiB "
            f"by the compiler{frozen_weights}",
            f"traced and compiled in {row['seconds_to_compile']:.1f} s, from the cache "
            f"in {row['seconds_from_cache']:.1f} s",
            f"the host is busy for {1e3 * row['seconds_host_is_busy']:.2f} ms a step",
        ]
    )


def main(arguments: list[str]) -> None:
    """Measure and print."""
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--model", choices=("digits", "text"), default="digits")
    parser.add_argument("--config", help="a recipe, in the place of --model")
    parser.add_argument("--batches", type=int, nargs="+", default=[32])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--against", choices=("diffusers",))
    parser.add_argument("--no-compile", action="store_true", help="theirs, eager only")
    parser.add_argument("--no-remat", action="store_true", help="keep activations")
    parser.add_argument("--dispatch", type=int, help="steps at once, ours; as trained")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if min(*args.batches, args.dispatch or 1, args.rounds) < 1:
        raise InputError("--batches, --dispatch, --rounds: wanted 1 or more")
    name = args.config or args.model
    if args.config or args.model == "digits":
        config = load_config(args.config or "configs/digits.py")
    else:
        config = text_config()
    parallel = config.parallel
    start(
        Launch(), peer_timeout=parallel.peer_timeout, cpu_devices=parallel.cpu_devices
    )
    weights = draw_model(config)
    rows: list[dict[str, Any]] = []
    print(f"{name}, {jax.default_backend()}")
    with tempfile.TemporaryDirectory() as folder:
        if args.against:
            write_folder(weights, Path(folder))
        for size in args.batches:
            one = prepare_config(
                config,
                batch=size,
                dtype=args.dtype,
                remat=not args.no_remat,
                dispatch=args.dispatch,
            )
            rows.append(measure(one, weights, Path(folder), args))
            print("\n" + to_text(rows[-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    use_huge_pages()
    run_main(main, PROG)
