"""PSNR of stage 1 before its discriminator is switched on, and at the end.

    python benchmarks/adversarial_switch.py --seeds 0 1 2 --check

Trains stage 1 of a config for each seed and prints the PSNR of the held-out images,
reconstructed with the averaged weights. With --check it exits 1 if a number was not
finite, or the discriminator cost more than 1.5 dB.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from command import make_parser

from ldm_jax.build import build_model, load_split, open_iterator
from ldm_jax.cli.exit_codes import run_main
from ldm_jax.config import Config
from ldm_jax.config.load_config import load_config
from ldm_jax.data.pipeline import to_batch
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.pretrained.metric_networks import load_perceptual
from ldm_jax.rng import root_key
from ldm_jax.training.autoencoder_stage import autoencoder_stage, make_reconstruct
from ldm_jax.types import RunError

PROG = "benchmarks/adversarial_switch.py"
MAX_LOSS = 1.5
"""Decibels that the discriminator may cost."""
CHECK_EVERY = 25


class Switch(NamedTuple):
    """Stage 1 around the step at which its discriminator is switched on."""

    before: float
    """PSNR just before that step, in dB."""
    lowest: float
    """Lowest PSNR after it, of those measured every 25 steps."""
    after: float
    """PSNR at the end."""
    finite: bool
    """Whether every number of every step was."""
    last: dict[str, float]
    """Numbers of the last step."""


def measure(config: Config) -> Switch:
    """Train stage 1 and measure it on the way."""
    model, layout = build_model(config), PmapLayout()
    perceptual = load_perceptual(config.autoencoder)
    stage = autoencoder_stage(config, model, Path(), perceptual=perceptual)
    psnr = make_psnr(config)
    state, frozen = layout.place(stage.init()), layout.place(stage.frozen)
    key, step = layout.place(root_key(config.seed)), layout.map_step(stage.step)
    iterator = open_iterator(config, batch_size=stage.batch_size, layout=layout)
    start = config.autoencoder.adversary.start_step
    values, waiting, details, finite = [], [], {}, True
    for done in range(1, stage.num_steps + 1):
        batch = layout.split(to_batch(next(iterator)))
        state, metrics = step(state, frozen, batch, key)
        waiting.append(metrics)
        if done % CHECK_EVERY == 0 or done in (start, stage.num_steps):
            for row in jax.device_get([layout.local(row) for row in waiting]):
                named = row._asdict().items()
                details = {k: float(value) for k, value in named if value is not None}
                finite = finite and bool(np.isfinite(list(details.values())).all())
            waiting = []
            if done >= start:
                values.append(psnr(layout.local(state).ema))
    iterator.close()
    return Switch(values[0], min(values[1:]), values[-1], finite, details)


def make_psnr(config: Config) -> Callable[[Any], float]:
    """Make a function from parameters to the PSNR of the held-out images, in dB."""
    reconstruct = make_reconstruct(build_model(config))
    images = load_split(config, "test").image

    def psnr(params: Any) -> float:
        outputs = reconstruct(params, images).astype(np.float64)
        return float(10 * np.log10(255**2 / np.square(outputs - images).mean()))

    return psnr


def main(args: list[str]) -> None:
    """Measure, print, and check if asked to."""
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--config", default="configs/digits_adversarial.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(args)
    config = load_config(arguments.config)
    failed = []
    print("| seed | PSNR before | lowest after | at the end | logits real, made |")
    print("|---:|---:|---:|---:|---:|")
    for seed in arguments.seeds:
        found = measure(dataclasses.replace(config, seed=seed))
        logits = f"{found.last['logits_real']:.2f}, {found.last['logits_fake']:.2f}"
        print(
            f"| {seed} | {found.before:.2f} dB | {found.lowest:.2f} dB | "
            f"{found.after:.2f} dB | {logits} |",
            flush=True,
        )
        if not found.finite or found.after < found.before - MAX_LOSS:
            failed.append(seed)
    if arguments.check and failed:
        raise RunError(
            f"falls short: seeds {failed}, wanted finite numbers and at most "
            f"{MAX_LOSS} dB lost"
        )


if __name__ == "__main__":
    run_main(main, PROG)
