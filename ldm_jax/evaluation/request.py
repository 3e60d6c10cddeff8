"""What `ldm evaluate` may be asked; imports no JAX."""

import argparse
from pathlib import Path
from typing import NamedTuple

from ldm_jax.config import Config, read_config
from ldm_jax.config.flags import OneLineParser
from ldm_jax.config.launch import Launch, add_flags, check_launch, check_local
from ldm_jax.evaluation.protocols import Protocol, protocol_of
from ldm_jax.sampling.request import MAX_SEED
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import PROTOCOL_NAMES, InputError

PROG = "ldm evaluate"


class EvaluationRequest(NamedTuple):
    """What was asked."""

    protocol: Protocol
    """How images are measured."""
    settings: tuple[SamplingConfig, ...]
    """How samples are made; each way is measured by itself."""
    num_images: int
    """How many; seeds 0 to one less."""
    inception: Path | None
    """File of Inception's weights, or None for the classifier."""
    reference: Path | None
    """File of statistics to compare with; None for the run's own data."""
    out: Path
    """Folder for everything that is written."""
    workdir: Path
    """Folder of the run."""
    reconstructions: bool
    """Whether the first stage is measured, not samples."""
    lpips: tuple[str, ...]
    """Files of LPIPS' weights."""
    launch: Launch
    """How the program starts."""


def parse(args: list[str], *, about: str | None) -> EvaluationRequest:
    """Read the command line, as far as the run's config tells without JAX.

    Args:
      about: What the program is for.

    Raises:
      InputError: If it is wrong.
      SystemExit: After printing the help.
    """
    parser = OneLineParser(
        prog=PROG,
        description=about,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="folder of the run")
    add("--step", type=int, help="checkpoint to take; the newest by default")
    add("--protocol", help=f"one of {', '.join(PROTOCOL_NAMES)}")
    add("--inception", type=Path, help="weights of FID's Inception (.pth, safetensors)")
    add(
        "--reference",
        type=Path,
        help="statistics of real images, or a reference batch of ADM's; the run's own "
        "images by default",
    )
    add("--num-images", type=int, help="samples; the protocol's number by default")
    add("--sampler", default="ddim")
    add("--steps", type=int, nargs="+", default=[50], help="of each sample, or several")
    add("--spacing", help="of the steps; the run's by default")
    add("--eta", type=float, default=0.0, help="DDIM's share of fresh noise")
    add(
        "--guidance-scale",
        nargs="+",
        default=["1"],
        help="1, the default, is none; several are measured one after the other",
    )
    add(
        "--ema-lengths",
        nargs="+",
        type=float,
        default=[None],
        metavar="LENGTH",
        help="of the average of the weights, as shares of training, where the run kept "
        "averages; several are measured one after the other",
    )
    add(
        "--reconstructions",
        action="store_true",
        help="measure the first stage on held-out images, not samples",
    )
    add("--lpips", nargs="+", default=[], help="weights of VGG16 and of LPIPS' heads")
    add("--out", type=Path, help="folder for the results; WORKDIR/evaluation")
    add_flags(parser)
    given = parser.parse_args(args)
    name = given.protocol or ("adm" if given.inception else "dataset-classifier")
    protocol = protocol_of(name)
    check_network(protocol, given.inception)
    if given.lpips and not given.reconstructions:
        raise InputError("--lpips: got it without --reconstructions, wanted none")
    num_images = protocol.num_images if given.num_images is None else given.num_images
    if not 2 <= num_images <= MAX_SEED:
        raise InputError(f"--num-images: got {num_images}, wanted 2 or more")
    check_local(given.workdir, "--workdir")
    config = read_config(given.workdir)
    if not given.reconstructions:
        check_run(config, given)
    out = given.out or given.workdir / "evaluation"
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file, wanted a folder")
    return EvaluationRequest(
        protocol=protocol,
        settings=()
        if given.reconstructions
        else tuple(
            settings_of(given, steps=steps, scale=scale, ema_length=length)
            for length in dict.fromkeys(given.ema_lengths)
            for steps in dict.fromkeys(given.steps)
            for scale in dict.fromkeys(given.guidance_scale)
        ),
        num_images=num_images,
        inception=given.inception,
        reference=given.reference,
        out=out,
        workdir=given.workdir,
        reconstructions=given.reconstructions,
        lpips=tuple(given.lpips),
        launch=check_launch(given, beside=given.workdir),
    )


def check_network(
    protocol: Protocol, inception: Path | None, *, flag: str = "--inception"
) -> None:
    """Raise `InputError` if weights are missing, or are given and not used."""
    if protocol.network == "inception" and inception is None:
        raise InputError(
            f"{flag}: not given, but protocol {protocol.name} measures with FID's "
            f"Inception network; try {flag} pt_inception-2015-12-05-6726825d.pth "
            "(of pytorch-fid), or protocol dataset-classifier, which needs no file"
        )
    if protocol.network != "inception" and inception is not None:
        raise InputError(
            f"{flag}: got it with protocol {protocol.name}, which reads none"
        )


def check_run(config: Config, given: argparse.Namespace) -> None:
    """Raise `InputError` if a run cannot be asked this."""
    if "diffusion" not in config.stages:
        raise InputError(
            f"--workdir: {given.workdir} is a run of an autoencoder alone, wanted one "
            "with a diffusion stage; try --reconstructions"
        )
    condition = config.diffusion.condition
    if condition.context == "embedding" or condition.concat != "none":
        raise InputError(
            f"--workdir: {given.workdir} is conditioned on vectors or images; wanted "
            "a model of classes or texts, or without condition"
        )


def settings_of(
    given: argparse.Namespace, *, steps: int, scale: str, ema_length: float | None
) -> SamplingConfig:
    """Make the settings of `sample.py`, with all its checks.

    Args:
      given: The other flags.
      steps: Of each sample.
      scale: Of guidance, as it was given.
      ema_length: Of the average of the weights.

    Raises:
      InputError: If one has no meaning.
    """
    try:
        scales = tuple(float(part) for part in scale.split(","))
    except ValueError:
        raise InputError(f"--guidance-scale: got {scale!r}, wanted numbers") from None
    try:
        return SamplingConfig(
            workdir=str(given.workdir),
            step=given.step,
            sampler=given.sampler,
            spacing=given.spacing,
            steps=steps,
            eta=given.eta,
            guidance_scale=scales,
            ema_length=ema_length,
        )
    except InputError as error:
        raise InputError(f"--{error}") from None
