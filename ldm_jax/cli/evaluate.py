"""`ldm evaluate`."""

from pathlib import Path
from typing import Annotated

from ldm_jax.cli.sample import read_scales
from ldm_jax.config import read_config
from ldm_jax.config.flags import Inline, as_flag, parse_flags
from ldm_jax.config.launch import Launch
from ldm_jax.config.validation import checked_dataclass
from ldm_jax.data.tfds_builders import check_builder
from ldm_jax.evaluation.protocols import protocol_of
from ldm_jax.evaluation.request import (
    EvaluationRequest,
    check_network,
    check_run,
)
from ldm_jax.parallel.launch import start
from ldm_jax.sampling.request import MAX_SEED
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import (
    InputError,
    PrecisionName,
    ProtocolName,
    SamplerName,
    SpacingName,
)


@checked_dataclass
class Flags:
    """Measure a run's samples against real images, by a named protocol.

        ldm evaluate --workdir runs/digits --num-images 1500
        ldm evaluate --workdir runs/digits --guidance-scale 1 1.5 2 3
        ldm evaluate --workdir RUN --ema-lengths 0.03 0.05 0.1 0.2
        ldm evaluate --workdir RUN --protocol adm --inception FILE.pth
        ldm evaluate --workdir runs/digits --reconstructions

    Makes the images of seeds 0, 1, 2 ... over all devices and prints FID, KID,
    Inception Score, precision, recall, density and coverage, beside those of held-out
    real images. Features come from FID's Inception network, read from a file, or from a
    classifier trained on the data set's own labels. The same command resumes after an
    interruption. metrics.json has the scores and all settings that reproduce them.
    """

    workdir: Path
    """Folder of the run."""
    step: int | None = None
    """Step of the checkpoint; the newest by default."""
    protocol: ProtocolName | None = None
    """Protocol of the scores; dataset-classifier by default, adm with --inception."""
    inception: Path | None = None
    """Weights of FID's Inception network (.pth, safetensors)."""
    reference: Path | None = None
    """Statistics of real images, or a reference batch of ADM's; those of the run's own
    images by default."""
    num_images: int | None = None
    """Samples; the protocol's number by default."""
    sampler: SamplerName = "ddim"
    """Sampler of the samples."""
    steps: tuple[int, ...] = (50,)
    """Denoising steps; several values are measured in turn."""
    spacing: SpacingName | None = None
    """Spacing of the steps; the run's by default."""
    eta: float = 0.0
    """DDIM's share of fresh noise."""
    guidance_scale: tuple[str, ...] = ("1",)
    """Guidance scale, 1 for none; several values are measured in turn."""
    ema_lengths: tuple[float, ...] = ()
    """Relative lengths of a post-hoc EMA, as shares of training, if the run kept
    averages; several are measured in turn."""
    precision: PrecisionName | None = None
    """Products of float32 on GPUs and TPUs; the run's by default."""
    reconstructions: bool = False
    """Measure the first stage on held-out images, not samples."""
    lpips: tuple[Path, ...] = ()
    """Weights of VGG16 and of LPIPS' heads, for --reconstructions."""
    builder: str | None = None
    """The file and config of the run's data set, FILE.py or FILE.py/CONFIG, where its
    config names one: reading the data runs it."""
    out: Path | None = None
    """Folder for the results; WORKDIR/evaluation by default."""
    launch: Annotated[Launch, Inline] = Launch()
    """Processes and compilation cache of the program."""

    def _check(self) -> None:
        for flag in ("steps", "guidance_scale"):
            if not getattr(self, flag):
                raise InputError(f"{flag}: got no value, wanted one or several")
        if self.lpips and not self.reconstructions:
            raise InputError("lpips: got it without --reconstructions, wanted none")
        number = self.num_images
        if number is not None and not 2 <= number <= MAX_SEED:
            raise InputError(f"num_images: got {number}, wanted 2 or more")


def parse(args: list[str]) -> tuple[EvaluationRequest, Launch]:
    """Read the command line, as far as the run's config allows without JAX.

    Raises:
      InputError: If it is wrong.
      SystemExit: After printing the help.
    """
    flags = parse_flags(Flags, args, prog="ldm evaluate")
    name = flags.protocol or ("adm" if flags.inception else "dataset-classifier")
    protocol = protocol_of(name)
    check_network(protocol, flags.inception)
    config = read_config(flags.workdir)
    check_builder(config.data.source, flags.builder)
    if not flags.reconstructions:
        check_run(config, flags.workdir, try_="--reconstructions")
    out = flags.out or flags.workdir / "evaluation"
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file, wanted a folder")
    settings = (
        _settings(flags, steps, scale, length)
        for length in dict.fromkeys(flags.ema_lengths or (None,))
        for steps in dict.fromkeys(flags.steps)
        for scale in dict.fromkeys(flags.guidance_scale)
    )
    return EvaluationRequest(
        protocol=protocol,
        settings=() if flags.reconstructions else tuple(settings),
        num_images=flags.num_images or protocol.num_images,
        inception=flags.inception,
        reference=flags.reference,
        out=out,
        workdir=flags.workdir,
        reconstructions=flags.reconstructions,
        lpips=tuple(map(str, flags.lpips)),
        precision=flags.precision,
    ), flags.launch


def _settings(
    flags: Flags, steps: int, scale: str, ema_length: float | None
) -> SamplingConfig:
    try:
        scales = read_scales(scale)
    except InputError as error:
        raise InputError(f"--guidance-scale: {error}") from None
    try:
        return SamplingConfig(
            workdir=str(flags.workdir),
            step=flags.step,
            sampler=flags.sampler,
            spacing=flags.spacing,
            steps=steps,
            eta=flags.eta,
            guidance_scale=scales,
            ema_length=ema_length,
            precision=flags.precision,
        )
    except InputError as error:
        raise as_flag(error) from None


def main(args: list[str]) -> None:
    """Measure, and print the scores."""
    request, launch = parse(args)
    start(launch, beside=request.workdir)
    from ldm_jax.evaluation.evaluate import evaluate, evaluate_first_stage

    if request.reconstructions:
        found = evaluate_first_stage(request)
        if found is not None:
            for name, value in found.quality._asdict().items():
                print(f"{name} {_number(value) or 'not measured'}")
            print(found.path)
        return
    outcomes = evaluate(request)
    if not outcomes:
        return
    columns = {in_words(one.settings): one.scores for one in outcomes}
    if outcomes[0].held_out is not None:
        columns["held-out real"] = outcomes[0].held_out
    print(f"| {request.protocol.name} | {' | '.join(columns)} |")
    print(f"|---|{'---:|' * len(columns)}")
    for name in outcomes[0].scores:
        texts = [_number(scores.get(name)) for scores in columns.values()]
        print(f"| {name} | {' | '.join(texts)} |")
    for outcome in outcomes:
        print(outcome.path)


def in_words(settings: SamplingConfig) -> str:
    """Return the column head of samples with these settings."""
    scale = ",".join(f"{value:g}" for value in settings.guidance_scale)
    text = f"{settings.sampler} {settings.steps}, guidance {scale}"
    length = settings.ema_length
    return text if length is None else f"{text}, EMA {length:g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
