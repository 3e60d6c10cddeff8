"""How many sampling steps? Quality against steps and seconds, for several samplers.

    ldm steps --workdir runs/digits

Prints a table and names the cheapest setting within 5 % of the best; writes steps.json
and steps.png. Quality is the Fréchet distance to the training split, with --protocol of
the features that it looks at, as in `ldm evaluate`: that is FID. Else
it is that of principal components of small averaged images, a stand-in which needs
nothing from outside and sees layout and contrast, not texture.
"""

import argparse
import json
import math
from pathlib import Path

from ldm_jax.config import Config, read_config
from ldm_jax.config.flags import OneLineParser, run_main
from ldm_jax.evaluation.protocols import protocol_of
from ldm_jax.evaluation.request import check_network
from ldm_jax.evaluation.trade_off import (
    LIMIT_SAMPLER,
    TOLERANCE,
    StepsRequest,
    cheapest,
    in_words,
    plot,
    to_table,
)
from ldm_jax.parallel.launch import use_huge_pages
from ldm_jax.types import (
    PROTOCOL_NAMES,
    SAMPLER_NAMES,
    SPACING_NAMES,
    InputError,
    choices,
)

PROG = "ldm steps"


def parse(args: list[str]) -> StepsRequest:
    """Read the command line, as far as the run's config tells without JAX.

    Raises:
      InputError: If it is wrong.
      SystemExit: After printing the help.
    """
    parser = OneLineParser(
        prog=PROG,
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="folder of the run")
    add(
        "--samplers",
        nargs="+",
        default=["ddim", "heun", "dpmpp_2m", "unipc"],
        help=f"some of {', '.join(SAMPLER_NAMES)}",
    )
    add("--steps", type=int, nargs="+", default=[5, 10, 20, 50], help="numbers of them")
    add("--spacing", help=f"one of {', '.join(SPACING_NAMES)}; the run's by default")
    add("--num-images", type=int, default=500, help="images of each setting")
    add("--guidance-scale", type=float, default=1.0, help="1, the default, is none")
    add("--protocol", help=f"one of {', '.join(PROTOCOL_NAMES)}")
    add("--inception", type=Path, help="weights of FID's Inception (.pth, safetensors)")
    add(
        "--limit-steps",
        type=int,
        default=200,
        help=f"steps of {LIMIT_SAMPLER} whose images stand for the converged ones",
    )
    add("--out", type=Path, help="folder of steps.json and steps.png; WORKDIR/steps")
    given = parser.parse_args(args)
    for sampler in given.samplers:
        if sampler not in SAMPLER_NAMES:
            raise InputError(f"--samplers: {choices(sampler, SAMPLER_NAMES)}")
    if given.spacing is not None and given.spacing not in SPACING_NAMES:
        raise InputError(f"--spacing: {choices(given.spacing, SPACING_NAMES)}")
    if given.limit_steps < 1:
        raise InputError(f"--limit-steps: got {given.limit_steps}, wanted 1 or more")
    if given.num_images < 2:
        raise InputError(f"--num-images: got {given.num_images}, wanted 2 or more")
    if not 0.0 <= given.guidance_scale < math.inf:
        raise InputError(
            f"--guidance-scale: got {given.guidance_scale}, wanted 0 or more"
        )
    protocol = None if given.protocol is None else protocol_of(given.protocol)
    if protocol is not None:
        check_network(protocol, given.inception)
    elif given.inception is not None:
        raise InputError("--inception: got it without --protocol; try --protocol adm")
    out = given.out or given.workdir / "steps"
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file, wanted a folder")
    check_run(read_config(given.workdir), given)
    return StepsRequest(
        workdir=given.workdir,
        samplers=tuple(dict.fromkeys(given.samplers)),
        steps=tuple(dict.fromkeys(given.steps)),
        spacing=given.spacing,
        num_images=given.num_images,
        guidance_scale=given.guidance_scale,
        protocol=protocol,
        inception=given.inception,
        limit_steps=given.limit_steps,
        out=out,
    )


def check_run(config: Config, given: argparse.Namespace) -> None:
    """Raise `InputError` if a run cannot be asked this."""
    if "diffusion" not in config.stages:
        raise InputError(
            f"--workdir: {given.workdir} is a run of an autoencoder alone, wanted one "
            "with a diffusion stage"
        )
    second = config.diffusion
    condition, top = second.condition, second.num_timesteps
    if outside := [steps for steps in given.steps if not 1 <= steps <= top]:
        raise InputError(f"--steps: got {outside[0]}, wanted 1 to {top}")
    if condition.context == "embedding" or condition.concat != "none":
        raise InputError(
            f"--workdir: {given.workdir} is conditioned on vectors or pictures; wanted "
            "a model of texts or classes, or without condition"
        )
    reads = condition.uses_tokens or condition.uses_classes
    if given.guidance_scale != 1.0 and not reads:
        raise InputError(
            f"--guidance-scale: got {given.guidance_scale}, but this model has no "
            "condition; leave it at 1"
        )


def main(args: list[str]) -> None:
    """Parse, measure, say what was found."""
    request = parse(args)
    # Only now: help and bad input need not wait for JAX.
    from ldm_jax.evaluation.step_sweep import compare

    found = compare(request)
    chosen = cheapest(found.rows)
    report = {
        "checkpoint": found.digest,
        "platform": found.platform,
        "num_images": request.num_images,
        "guidance_scale": request.guidance_scale,
        "protocol": request.protocol and request.protocol.name,
        "spacing": request.spacing,
        "limit": {"sampler": LIMIT_SAMPLER, "steps": found.limit_steps},
        "held_out_distance": found.floor,
        "num_held_out": found.num_held_out,
        "cheapest": chosen._asdict(),
        "settings": [row._asdict() for row in found.rows],
    }
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    (request.out / "steps.json").write_text(text)
    plot(found.rows, chosen, request.out / "steps.png", floor=found.floor)
    print(to_table(found.rows, chosen))  # noqa: T201
    floor = "too few" if found.floor is None else f"{found.floor:.4g}"
    real = f"{found.num_held_out} held-out images: {floor}"
    print(f"\n{real}; fewer images lie further off, drawn or real")  # noqa: T201
    print(f"cheapest within {TOLERANCE:.0%} of the best: {in_words(chosen)}")  # noqa: T201


if __name__ == "__main__":
    use_huge_pages()
    run_main(main, PROG)
