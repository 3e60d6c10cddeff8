"""What `sample.py` may be asked, checked as far as it can be without JAX."""

import dataclasses
import math
from pathlib import Path

from ldm_jax.config import Config, read_config
from ldm_jax.config.flags import parse_flags, parse_list
from ldm_jax.config.launch import Launch, check_launch, check_local
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError

MAX_SEED = 2**32 - 1
DEFAULT_OUT = Path("samples")
PLACES = ("workdir", "weights", "tokenizer", "autoguidance", "image", "mask")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleArguments:
    """Make images with a trained run, or with weights from elsewhere.

    Lists are numbers, ranges, or both: 3, 0-9, 1,4,7, 0-4,9.
    """

    workdir: Path | None = None
    """Folder of the run, as given to train.py."""
    weights: Path | None = None
    """Instead of a run: a diffusers folder, or a file in CompVis naming."""
    step: int | None = None
    """Checkpoint of the run to take, by its step; the newest by default."""
    ema_length: float | None = None
    """Relative length of the average of the weights, where the run kept some
    (--diffusion.average-lengths); the one of optim.ema_decay by default."""
    replay: Path | None = None
    """Make an image again from the recipe in its PNG, and compare every pixel."""
    out: Path | None = None
    """Folder for 000000.png ... and grid.png (default: samples). Images that are there
    already, made the same way, are kept; made otherwise, they stop the command."""
    as_dataset: Path | None = None
    """Instead of --out: folder for a labelled data set, as a folder of images in
    images/ and as tfds:synthetic in tfds/ (docs/sampling.md)."""
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
    guidance_scale: str | None = None
    """0 ignores the label or text, 1 follows it, more exaggerates it (default 2; 1 with
    --invert). Several, as in 1,4,1, are spread over the steps with lines between."""
    guidance_rescale: float = 0.0
    """Share of the contrast's correction under guidance, 0 to 1; 0.7 is usual."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only where the noise-to-signal ratio lies between these two; the second may
    be inf."""
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
    """Also write trajectory.png: the denoising, a row an image (draws those of the grid
    a second time)."""
    process: str = "0/1"
    """This process' share of the images, as in 0/4, 1/4 ... for four commands that
    write to one folder; the first one draws the grid of what it finds."""
    pod: bool = False
    """Join the other processes of a TPU pod, SLURM step or Kubernetes job and share the
    images with them."""
    coordinator: str | None = None
    """HOST:PORT of process 0, to join by hand."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which one this is, from 0."""
    compilation_cache: str | None = None
    """Folder of compiled programs, or none; beside --workdir by default."""
    config: Path | None = None
    """Config of weights whose file does not hold it."""
    tokenizer: Path | None = None
    """Folder of the tokenizer's files, where the weights do not hold them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What `sample.py` was asked."""

    settings: SamplingConfig
    """How images are made."""
    out: Path
    """Folder for the images."""
    as_dataset: bool
    """Whether they become a labelled data set there."""
    overwrite: bool
    """Whether images made otherwise are replaced."""
    labels: str | None
    """Classes as they were given, or None."""
    prompts: tuple[str, ...]
    """Texts, in order."""
    negative_prompt: str
    """What they are guided away from."""
    seeds: list[int]
    """Seeds for each class or text, in order."""
    interpolate: int
    """Images from the first to the second, or 0."""
    trajectory: bool
    """Whether the denoising is drawn."""
    share_index: int
    """Which of the processes this is, from 0."""
    num_shares: int
    """How many share the images."""
    launch: Launch
    """How the program starts; the processes of a pod share the images."""

    @property
    def out_flag(self) -> str:
        """The flag that names the folder, for messages."""
        return "--as-dataset" if self.as_dataset else "--out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayRequest:
    """An image to make again."""

    image: Path
    """The PNG."""
    moved: dict[str, str | None]
    """Where what it was made with is now, by the names of `SamplingConfig`; what is not
    in here is where the metadata says."""


def parse_sample(args: list[str]) -> SampleRequest | ReplayRequest:
    """Read the command line of `sample.py`.

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
    out = _out(given)
    settings = _settings(given)
    seeds = parse_list(given.seeds, name="--seeds", low=0, high=MAX_SEED)
    check_local(given.workdir, "--workdir")
    share_index, num_shares = _share(given.process)
    launch = check_launch(given, beside=given.workdir)
    if launch.pod and num_shares > 1:
        raise InputError(
            f"--process: got {given.process} in a pod, wanted none: its processes "
            "share the images by themselves"
        )
    if given.interpolate == 1 or given.interpolate < 0:
        raise InputError(f"--interpolate: got {given.interpolate}, wanted 2 or more")
    if given.interpolate and given.image is not None:
        raise InputError("--interpolate: got it beside --image, wanted one of the two")
    if given.negative_prompt and given.autoguidance is not None:
        raise InputError(
            "--negative-prompt: got it beside --autoguidance, which guides away from a "
            "model, wanted one of the two"
        )
    return SampleRequest(
        settings=settings,
        out=out,
        as_dataset=given.as_dataset is not None,
        overwrite=given.overwrite,
        labels=None if given.labels == "all" else given.labels,
        prompts=given.prompt,
        negative_prompt=given.negative_prompt,
        seeds=seeds,
        interpolate=given.interpolate,
        trajectory=given.trajectory,
        share_index=share_index,
        num_shares=num_shares,
        launch=launch,
    )


def _replay(given: SampleArguments) -> ReplayRequest:
    may = {"replay", *PLACES}
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
    moved = {name: getattr(given, name) for name in PLACES}
    moved = {name: str(place) for name, place in moved.items() if place is not None}
    models: dict[str, str | None] = {"workdir": None, "weights": None}
    model_moved = not models.keys().isdisjoint(moved)
    return ReplayRequest(
        image=image, moved={**(models if model_moved else {}), **moved}
    )


def _out(given: SampleArguments) -> Path:
    """Check where the images go, and what a data set cannot be made of."""
    flag, out = "--out", given.out or DEFAULT_OUT
    if given.as_dataset is not None:
        flag, out = "--as-dataset", given.as_dataset
        if given.out is not None:
            raise InputError("--out: got it beside --as-dataset, wanted one of the two")
        if given.interpolate:
            raise InputError(
                "--interpolate: got it beside --as-dataset, wanted none: what lies "
                "between two classes or texts has no label"
            )
        if given.image is not None:
            raise InputError(
                "--image: got it beside --as-dataset, wanted none: a data set is drawn "
                "from noise alone"
            )
    check_local(out, flag)
    if out.exists() and not out.is_dir():
        raise InputError(f"{flag}: {out} is a file, wanted a folder")
    return out


def _share(text: str) -> tuple[int, int]:
    share_index, slash, num_shares = text.partition("/")
    numbers = (
        slash
        and share_index.isascii()
        and share_index.isdigit()
        and num_shares.isdigit()
    )
    if not numbers or int(share_index) >= int(num_shares):
        raise InputError(f"--process: got {text!r}, wanted one of several, as in 0/4")
    return int(share_index), int(num_shares)


def _settings(given: SampleArguments) -> SamplingConfig:
    for name in ("image", "mask"):
        path = getattr(given, name)
        if path is not None and not path.is_file():
            raise InputError(f"--{name}: no file {path}")
    low, high = given.guidance_interval or (0.0, math.inf)
    if not 0.0 <= low < high:
        raise InputError(
            f"--guidance-interval: got {low:g} {high:g}, wanted two rising numbers "
            "from 0 on, as in 0.5 5 or 0.5 inf"
        )
    usual = "1.0" if given.invert else "2.0"
    kept = {field.name for field in dataclasses.fields(SamplingConfig)}
    values = {name: value for name, value in vars(given).items() if name in kept}
    values |= {
        "config_file": given.config,
        "eta": given.eta or 0.0,
        "guidance_scale": _scales(given.guidance_scale or usual),
        "guidance_low": low,
        "guidance_high": None if high == math.inf else high,
    }
    paths = {k: str(value) for k, value in values.items() if isinstance(value, Path)}
    try:
        return SamplingConfig(**{**values, **paths})
    except InputError as error:
        field, colon, details = str(error).partition(":")
        flag = field.replace("_", "-").removeprefix("--")
        raise InputError(f"--{flag}{colon}{details}") from None


def _check_against(config: Config, given: SampleArguments) -> None:
    num_timesteps = config.diffusion.num_timesteps
    if not 1 <= given.steps <= num_timesteps:
        raise InputError(
            f"--steps: got {given.steps}, wanted 1 to {num_timesteps}, the run's "
            "diffusion.num_timesteps"
        )
    kept = config.diffusion.average_lengths
    if given.ema_length is not None and not kept:
        raise InputError(
            f"--ema-length: got {given.ema_length:g}, but the run kept no averages of "
            "its weights, wanted none; try train.py --diffusion.average-lengths 0.05 "
            "0.1 in another --workdir"
        )
    if given.labels not in (None, "all") and config.diffusion.condition.uses_classes:
        top = config.data.num_classes - 1
        parse_list(given.labels, name="--labels", low=0, high=top)


def _scales(text: str) -> tuple[float, ...]:
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = (-1.0,)
    if not all(0.0 <= scale < math.inf for scale in scales):
        raise InputError(
            f"--guidance-scale: got {text}, wanted 0 or more, or several as in 1,4,1"
        )
    return scales
