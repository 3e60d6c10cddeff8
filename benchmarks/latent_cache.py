"""Time and FLOPs that a cache of latents saves: steps from it and from images.

    python benchmarks/latent_cache.py --workdir runs/digits
    python benchmarks/latent_cache.py --recipes lsun_churches256_kl8 sd15

The first trains the same model twice, from images and from a cache that it makes, and
prints the median time of a step of both, how far their losses are apart, and the bytes.
The second counts the products in a step of recipes of configs/ldm, from images and from
latents, forward and backward; it needs no data. JSON with --json FILE. With --check it
exits 1 if the first 20 losses differ by more than 1e-5 or the cache saves no time.
"""

import dataclasses
import functools
import json
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from command import make_parser

from ldm_jax.build import build_model, open_iterator
from ldm_jax.cli.exit_codes import run_main
from ldm_jax.cli.huge_pages import use_huge_pages
from ldm_jax.config import Config, read_config
from ldm_jax.config.load_config import load_config
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.parallel.make_layout import Layout, make_layout
from ldm_jax.pretrained.frozen import first_stage_of, load_frozen, open_encoders
from ldm_jax.rng import root_key
from ldm_jax.tools.plan.programs import step_flops
from ldm_jax.tools.plan.request import PlanRequest
from ldm_jax.training.diffusion_stage import diffusion_stage
from ldm_jax.training.diffusion_step import FrozenParams
from ldm_jax.training.encode_latents import make_cache
from ldm_jax.training.latent_cache import check_cache, open_cache, open_latents
from ldm_jax.training.prefetch import Prefetch
from ldm_jax.types import InputError, RunError

PROG = "benchmarks/latent_cache.py"
MAX_DIFFERENCE = 1e-5
NUM_COMPARED = 20
"""First losses that are held to it: rounding grows from step to step of training."""
WARM_UP = 3
"""First steps of a side, which compile, are not counted."""
RECIPES = (
    "lsun_churches256_kl8",
    "imagenet256_vq4_cfg",
    "text2img256_kl8_1p4b",
    "sd15",
)
Round = Callable[[int], list[tuple[float, float]]]


def reading(config: Config, folder: str) -> Config:
    """Return a config that reads a cache."""
    data = dataclasses.replace(config.data, latents=folder)
    return dataclasses.replace(config, data=data)


def open_side(
    config: Config, model: LatentDiffusion, frozen: FrozenParams, layout: Layout
) -> Round:
    """Start training; return what makes steps, and says seconds and loss of each."""
    note = check_cache(
        config,
        model,
        Path(),
        first_stage=frozen.autoencoder,
        conditioner=frozen.conditioner,
    )
    cache = open_cache(config, frozen.autoencoder, note)
    null = None if cache is None else cache.null_embedding
    stage = diffusion_stage(config, model, frozen, Path(), null_embedding=null)
    opened = functools.partial(open_iterator, config)
    if cache is not None:
        opened = functools.partial(open_latents, cache, seed=config.seed)
    mapped = layout.map_step(stage.step)
    placed = layout.place(stage.frozen)
    key = layout.place(root_key(config.seed))
    batches = Prefetch(opened(batch_size=stage.batch_size, layout=layout), layout)
    state: Any = layout.init(stage.init)

    def round_of(num_steps: int) -> list[tuple[float, float]]:
        nonlocal state
        details = []
        for _ in range(num_steps):
            began = time.perf_counter()
            batch, _ = batches.take(1, then=1)
            state, metrics = mapped(state, placed, batch, key)
            loss = float(layout.local(metrics).loss)
            details.append((time.perf_counter() - began, loss))
        return details

    return round_of


def measure(workdir: Path, args: Namespace) -> dict[str, Any]:
    """Make a cache of a run, and train from it and from images, taking turns."""
    config = read_config(workdir)
    model = build_model(config)
    frozen_weights = load_frozen(config, model, workdir)
    params, scale, _ = first_stage_of(config, frozen_weights, workdir)
    if scale is None:
        raise InputError(f"--workdir: stage 1 of {workdir} is not finished")
    frozen = FrozenParams(params, scale, frozen_weights.conditioner)
    layout = make_layout(config.parallel)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        asked = {"num_shards": None, "batch_size": 32, "states": True}
        note = make_cache(
            config, workdir, Path(folder), open_encoders=open_encoders, **asked
        ).note
        made = time.perf_counter() - began
        sides = {
            "images": open_side(config, model, frozen, layout),
            "latents": open_side(reading(config, folder), model, frozen, layout),
        }
        rows = {name: round_of(WARM_UP) for name, round_of in sides.items()}
        for _ in range(args.rounds):
            for name, round_of in sides.items():
                rows[name] += round_of(args.steps)
    seconds = {
        name: statistics.median(second for second, _ in row[WARM_UP:])
        for name, row in rows.items()
    }
    pairs = zip(rows["images"], rows["latents"], strict=True)
    apart = [abs(a / b - 1.0) for (_, a), (_, b) in pairs]
    per_step = seconds["images"] - seconds["latents"]
    data = config.data
    return {
        "num_steps": args.rounds * args.steps,
        "batch_size": config.diffusion.batch_size,
        "seconds_a_step": seconds,
        "latents_over_images": seconds["latents"] / seconds["images"],
        "difference_of_first_losses": max(apart[:NUM_COMPARED]),
        "difference_of_all_losses": max(apart),
        "seconds_to_make": made,
        "steps_that_pay_for_it": made / per_step if per_step > 0.0 else None,
        "num_examples": note.num_examples,
        "bytes_of_pixels": data.image_size**2 * data.image_channels,
        "bytes_of_record": note.record_size,
        "bytes_of_cache": sum(shard.size for shard in note.shards),
    }


def count(name: str) -> dict[str, Any]:
    """Count the products of a recipe's step for one image, by shape alone.

    Raises:
      InputError: If there is no such recipe, or it cannot be trained from latents.
    """
    config = load_config(f"configs/ldm/{name}.py")
    ours = reading(dataclasses.replace(config, first_stage="elsewhere"), "elsewhere")
    flops = {}
    for side, each in (("images", config), ("latents", ours)):
        request = PlanRequest(each, None, "diffusion", None, "ddim", 50, False)
        flops[side] = step_flops(request, 1)
    size, _, channels = config.moments_shape
    condition, states = config.diffusion.condition, 0
    if condition.freezes_text:
        vectors = condition.as_vectors()
        states = vectors.embedding_length * vectors.embedding_width
    return {
        "recipe": name,
        "flops_an_image": flops,
        "saved": 1.0 - flops["latents"] / flops["images"],
        "bytes_of_pixels": config.data.image_size**2 * config.data.image_channels,
        "bytes_of_moments": 4 * size * size * channels,
        "bytes_of_states": 4 * states,
    }


def in_words(found: dict[str, Any]) -> str:
    """Write what was measured of a run."""
    ms = {name: 1e3 * value for name, value in found["seconds_a_step"].items()}
    pays = found["steps_that_pay_for_it"]
    pay = "never" if pays is None else f"after {pays:.0f} steps"
    return "\n".join(
        [
            f"{found['num_steps']} steps of {found['batch_size']} from each, "
            f"{jax.default_backend()}",
            f"a step from images  {ms['images']:8.2f} ms",
            f"a step from latents {ms['latents']:8.2f} ms, "
            f"{found['latents_over_images']:.3f} of it",
            f"the first {NUM_COMPARED} losses differ by at most "
            f"{found['difference_of_first_losses']:.1e}, all by "
            f"{found['difference_of_all_losses']:.1e} (relative)",
            f"made in {found['seconds_to_make']:.1f} s, paid for {pay}",
            f"{found['num_examples']} records of {found['bytes_of_record']} bytes; an "
            f"image has {found['bytes_of_pixels']} as pixels; "
            f"{found['bytes_of_cache'] / 2**20:.1f} MiB on disk",
        ]
    )


def to_table(rows: list[dict[str, Any]]) -> str:
    """Write what was counted of recipes."""
    lines = [
        "| recipe | TFLOP an image | from latents | saved | KiB of pixels | of moments "
        "| of text embeddings |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        flops = {name: value / 1e12 for name, value in row["flops_an_image"].items()}
        sizes = (row[f"bytes_of_{name}"] for name in ("pixels", "moments", "states"))
        details = " | ".join(f"{size / 2**10:.0f}" for size in sizes)
        lines.append(
            f"| `{row['recipe']}` | {flops['images']:.3f} | {flops['latents']:.3f} | "
            f"{row['saved']:.0%} | {details} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Measure or count, print, and check if asked to."""
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--workdir", type=Path, help="a run with a finished stage 1")
    parser.add_argument("--recipes", nargs="*", default=None, help="of configs/ldm")
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    if args.steps < 1 or args.rounds < 1:
        raise InputError("--steps, --rounds: wanted 1 or more")
    if args.workdir is None and args.recipes is None:
        raise InputError("--workdir: wanted the folder of a run, or --recipes NAME ...")
    found, rows = None, []
    if args.workdir is not None:
        found = measure(args.workdir, args)
        print(in_words(found))
    if args.recipes is not None:
        rows = [count(name) for name in args.recipes or RECIPES]
        print(to_table(rows))
    if args.json:
        args.json.write_text(json.dumps({"run": found, "recipes": rows}, indent=2))
    if args.check and found is not None:
        apart = found["difference_of_first_losses"] > MAX_DIFFERENCE
        if apart or found["latents_over_images"] >= 1.0:
            raise RunError("falls short: losses differ, or no time is saved")


if __name__ == "__main__":
    use_huge_pages()
    run_main(main, PROG)
