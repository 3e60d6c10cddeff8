"""What `sample.py` may be asked, checked as far as it can be without JAX."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from ldm_jax.cli import parse_flags, parse_list
from ldm_jax.config import Config, read_config
from ldm_jax.types import (
    SAMPLER_NAMES,
    SPACING_NAMES,
    TAKES_ETA,
    InputError,
    choices,
)

MAX_SEED = 2**32 - 1
STRENGTH_OF_IMAGE = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleArguments:
    """Make images with a trained run, or with weights from elsewhere.

    Lists are numbers, ranges, or both: 3, 0-9, 1,4,7, 0-4,9.
    """

    workdir: Path | None = None
    """Folder of the run, as given to train.py."""
    weights: Path | None = None
    """Instead of a run: a diffusers folder, or a file in CompVis naming."""
    replay: Path | None = None
    """Make an image again from the recipe in its PNG, and compare every pixel."""
    out: Path = Path("samples")
    """Folder for 000000.png ... and grid.png. Images that are there already, made the
    same way, are kept; made otherwise, they stop the command."""
    overwrite: bool = False
    """Replace images that were made otherwise."""
    labels: str | None = None
    """Classes to draw, as a list; all of them by default."""
    prompt: tuple[str, ...] = ()
    """Texts to draw, each with every seed."""
    negative_prompt: str = ""
    """Text to be guided away from."""
    seeds: str = "0-9"
    """Seeds to draw each class or text with, as a list."""
    steps: int = 50
    """Denoising steps, 1 to the run's number of timesteps."""
    sampler: str = "ddim"
    """ddim, ddpm, euler, euler_ancestral, heun, plms, dpmpp_2m, dpmpp_2s,
    dpmpp_sde_2m, unipc or lcm."""
    spacing: str | None = None
    """How the steps are spaced: trailing (the default but for EDM), leading, linspace,
    karras (EDM's default) or ldm (the original's)."""
    eta: float | None = None
    """DDIM's share of fresh noise, 0 to 1 (default 0); for ddim alone."""
    guidance_scale: str = "2.0"
    """0 ignores the label or text, 1 follows it, more exaggerates it. Several, as in
    1,4,1, are spread over the steps with lines between."""
    guidance_rescale: float = 0.0
    """Share of the contrast's correction under guidance, 0 to 1; 0.7 is usual."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only where the noise-to-signal ratio lies between these two."""
    autoguidance: Path | None = None
    """Run of a smaller or less trained model to be guided away from."""
    autoguidance_step: int | None = None
    """Checkpoint of that run to take; the newest by default."""
    image: Path | None = None
    """Picture to change; to upscale, or to fill, where the model does that."""
    mask: Path | None = None
    """White where the picture is made anew, black where it stays as it is."""
    strength: float | None = None
    """Share of the steps an image goes through, above 0 to 1: how much of it changes
    (default 0.75; 1 with a mask)."""
    invert: bool = False
    """Find the noise that the image comes from, and begin there."""
    source: str | None = None
    """What the inverted image shows: a class or a text; the one drawn by default."""
    outpaint: tuple[int, int, int, int] | None = None
    """Pixels to add to the image left, above, right and below."""
    interpolate: int = 0
    """Images from the first seed, class or text to the second, both included."""
    size: tuple[int, int] | None = None
    """Height and width of the images, other than the model was trained on."""
    tile: int = 0
    """Decode in tiles of this many latents, for large images; 0 decodes at once."""
    trajectory: bool = False
    """Also write trajectory.png: the denoising, a row an image."""
    config: Path | None = None
    """Config of weights whose file does not hold it."""
    tokenizer: Path | None = None
    """Folder of the tokenizer's files, where the weights do not hold them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All that makes an image but its seed and what it shows: part of its recipe.

    Attributes:
      workdir: Folder of the run, or None.
      weights: Weights from elsewhere, or None.
      config_file: Config of the weights, or None.
      tokenizer: Folder of the tokenizer, or None.
      sampler: One of `SAMPLER_NAMES`.
      spacing: One of `SPACING_NAMES`, or None for the schedule's own.
      num_steps: Denoising steps, at least 1.
      eta: In [0, 1]; 0 for all but ddim.
      guidance_scale: One, or several spread over the steps; each at least 0.
      guidance_rescale: In [0, 1].
      guidance_interval: Noise-to-signal ratios, or None for all.
      autoguidance: Run of the worse model, or None.
      autoguidance_step: Its checkpoint, or None for the newest.
      image: Picture, or None.
      mask: Of the picture, or None.
      strength: In (0, 1].
      invert: Whether the picture is inverted.
      source: What the inverted picture shows, or None.
      outpaint: Pixels added left, above, right and below, or None.
      size: Height and width, or None for those of training.
      tile: Side of the decoder's tiles in latents, or 0.
    """

    workdir: str | None
    weights: str | None
    config_file: str | None
    tokenizer: str | None
    sampler: str
    spacing: str | None
    num_steps: int
    eta: float
    guidance_scale: tuple[float, ...]
    guidance_rescale: float
    guidance_interval: tuple[float, float] | None
    autoguidance: str | None
    autoguidance_step: int | None
    image: str | None
    mask: str | None
    strength: float
    invert: bool
    source: str | None
    outpaint: tuple[int, int, int, int] | None
    size: tuple[int, int] | None
    tile: int

    @property
    def guided(self) -> bool:
        """Whether guidance has any effect."""
        return self.autoguidance is not None or set(self.guidance_scale) != {1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What `sample.py` was asked.

    Attributes:
      settings: How images are made.
      out: Folder for the images.
      overwrite: Whether images made otherwise are replaced.
      labels: Classes as they were given, or None.
      prompts: Texts, in order.
      negative_prompt: What they are guided away from.
      seeds: Seeds for each class or text, in order.
      interpolate: Images from the first to the second, or 0.
      trajectory: Whether the denoising is drawn.
    """

    settings: Settings
    out: Path
    overwrite: bool
    labels: str | None
    prompts: tuple[str, ...]
    negative_prompt: str
    seeds: list[int]
    interpolate: int
    trajectory: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayRequest:
    """An image to make again.

    Attributes:
      image: The PNG.
      workdir: The run, if it is not where the recipe says; or None.
      weights: The weights likewise.
    """

    image: Path
    workdir: Path | None
    weights: Path | None


def parse_sample(args: list[str]) -> SampleRequest | ReplayRequest:
    """Read the command line of `sample.py`.

    Args:
      args: Without the program's name.

    Returns:
      The request; for a run, checked against its config.

    Raises:
      InputError: If a flag is unknown, a value is wrong, or the folder is no run.
      SystemExit: After printing the help.
    """
    given = parse_flags(SampleArguments, args, default=None, prog="sample.py")
    if given.replay is not None:
        return _replay(given)
    if (given.workdir is None) == (given.weights is None):
        raise InputError(
            "--workdir: not given, wanted either the folder of a run or --weights"
            if given.workdir is None
            else "--weights: got it beside --workdir, wanted one of the two"
        )
    if given.workdir is not None:
        _check_against(read_config(given.workdir), given)
        if given.config is not None:
            raise InputError(
                "--config: got it beside --workdir, wanted none: a run has its own"
            )
    if given.out.exists() and not given.out.is_dir():
        raise InputError(f"--out: {given.out} is a file, wanted a folder")
    settings = _settings(given)
    seeds = parse_list(given.seeds, name="--seeds", low=0, high=MAX_SEED)
    if given.interpolate == 1 or given.interpolate < 0:
        raise InputError(f"--interpolate: got {given.interpolate}, wanted 2 or more")
    return SampleRequest(
        settings=settings,
        out=given.out,
        overwrite=given.overwrite,
        labels=None if given.labels == "all" else given.labels,
        prompts=given.prompt,
        negative_prompt=given.negative_prompt,
        seeds=seeds,
        interpolate=given.interpolate,
        trajectory=given.trajectory,
    )


def _replay(given: SampleArguments) -> ReplayRequest:
    may = {"replay", "workdir", "weights"}
    fields = dataclasses.fields(given)
    for field in fields:
        if field.name not in may and getattr(given, field.name) != field.default:
            flag = field.name.replace("_", "-")
            raise InputError(
                f"--{flag}: got it beside --replay, wanted none: the recipe says all"
            )
    if given.workdir is not None and given.weights is not None:
        raise InputError("--weights: got it beside --workdir, wanted one of the two")
    image = Path(str(given.replay))
    if not image.is_file():
        raise InputError(f"--replay: no file {image}; wanted a PNG that was made here")
    return ReplayRequest(image=image, workdir=given.workdir, weights=given.weights)


def _settings(given: SampleArguments) -> Settings:
    if given.sampler not in SAMPLER_NAMES:
        raise InputError(f"--sampler: {choices(given.sampler, SAMPLER_NAMES)}")
    if given.spacing is not None and given.spacing not in SPACING_NAMES:
        raise InputError(f"--spacing: {choices(given.spacing, SPACING_NAMES)}")
    _want("steps", given.steps >= 1, given.steps, "at least 1")
    if given.sampler not in TAKES_ETA and given.eta is not None:
        raise InputError(
            f"--eta: got {given.eta} with --sampler {given.sampler}, which has none; "
            "try --sampler ddim"
        )
    eta = given.eta or 0.0
    _want("eta", 0.0 <= eta <= 1.0, eta, "0 to 1")
    share = given.guidance_rescale
    _want("guidance-rescale", 0.0 <= share <= 1.0, share, "0 to 1")
    interval = given.guidance_interval
    if interval is not None:
        ordered = 0.0 <= interval[0] < interval[1]
        _want("guidance-interval", ordered, interval, "two rising numbers from 0 on")
    if given.autoguidance_step is not None and given.autoguidance is None:
        raise InputError("--autoguidance-step: got it without --autoguidance")
    tile = given.tile
    _want("tile", tile == 0 or tile >= 4, tile, "0, or at least 4 latents")
    _check_edit(given)
    whole = given.mask is not None or given.outpaint is not None or given.invert
    usual = 1.0 if whole or given.image is None else STRENGTH_OF_IMAGE
    strength = usual if given.strength is None else given.strength
    _want("strength", 0.0 < strength <= 1.0, strength, "above 0, at most 1")
    return Settings(
        workdir=_text(given.workdir),
        weights=_text(given.weights),
        config_file=_text(given.config),
        tokenizer=_text(given.tokenizer),
        sampler=given.sampler,
        spacing=given.spacing,
        num_steps=given.steps,
        eta=eta,
        guidance_scale=_scales(given.guidance_scale),
        guidance_rescale=share,
        guidance_interval=interval,
        autoguidance=_text(given.autoguidance),
        autoguidance_step=given.autoguidance_step,
        image=_text(given.image),
        mask=_text(given.mask),
        strength=strength,
        invert=given.invert,
        source=given.source,
        outpaint=given.outpaint,
        size=given.size,
        tile=tile,
    )


def _check_edit(given: SampleArguments) -> None:
    """Refuse flags of editing that mean nothing without, or beside, each other."""
    for name in ("mask", "strength", "invert", "outpaint"):
        if getattr(given, name) not in (None, False) and given.image is None:
            raise InputError(f"--{name}: got it without --image, wanted a picture")
    for name in ("image", "mask"):
        path = getattr(given, name)
        if path is not None and not path.is_file():
            raise InputError(f"--{name}: no file {path}")
    if given.source is not None and not given.invert:
        raise InputError("--source: got it without --invert, wanted none")
    pairs = (
        ("mask", "outpaint"),
        ("invert", "mask"),
        ("invert", "outpaint"),
        ("invert", "strength"),
        ("size", "image"),
        ("interpolate", "image"),
    )
    for first, second in pairs:
        if getattr(given, first) and getattr(given, second) is not None:
            raise InputError(f"--{first}: got it beside --{second}, wanted one of two")
    if given.invert and given.sampler not in ("ddim", "euler"):
        raise InputError(
            f"--invert: got it with --sampler {given.sampler}, wanted ddim, whose "
            "inverse it is"
        )
    if given.invert and given.eta:
        raise InputError(f"--invert: got it with --eta {given.eta}, wanted 0")
    added = given.outpaint
    if added is not None:
        _want("outpaint", min(added) >= 0 and any(added), added, "pixels to add")
    if given.size is not None:
        _want("size", min(given.size) >= 1, given.size, "height and width in pixels")


def _check_against(config: Config, given: SampleArguments) -> None:
    num_timesteps = config.diffusion.num_timesteps
    if not 1 <= given.steps <= num_timesteps:
        raise InputError(
            f"--steps: got {given.steps}, wanted 1 to {num_timesteps}, the run's "
            "diffusion.num_timesteps"
        )
    if given.labels not in (None, "all") and config.diffusion.condition.uses_classes:
        top = config.data.num_classes - 1
        parse_list(given.labels, name="--labels", low=0, high=top)


def _scales(text: str) -> tuple[float, ...]:
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = (-1.0,)
    good = all(0.0 <= scale < math.inf for scale in scales)
    _want("guidance-scale", good, text, "0 or more, or several as in 1,4,1")
    return scales


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _want(flag: str, holds: bool, got: Any, wanted: str) -> None:
    if not holds:
        raise InputError(f"--{flag}: got {got}, wanted {wanted}")
