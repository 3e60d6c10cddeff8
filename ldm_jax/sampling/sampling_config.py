"""All that makes an image but its seed and what it shows, checked at birth."""

from ldm_jax.config.diffusion import LONGEST_AVERAGE
from ldm_jax.config.validation import checked_dataclass, require
from ldm_jax.types import (
    SAMPLER_NAMES,
    SPACING_NAMES,
    TAKES_ETA,
    InputError,
    choices,
)

INVERTIBLE = ("ddim", "euler")
MIN_DECODER_TILE = 4
ONE_OF_TWO = (
    ("mask", "outpaint"),
    ("invert", "mask"),
    ("invert", "outpaint"),
    ("invert", "strength"),
    ("size", "image"),
)


@checked_dataclass
class SamplingConfig:
    """How images are made: the flags of `sample.py` that a recipe keeps.

    Every number is finite, so that a recipe is strict JSON.
    """

    workdir: str | None
    """Folder of the run, or None."""
    weights: str | None
    """Weights from elsewhere, or None."""
    step: int | None
    """Checkpoint of the run's second stage, or None for the newest."""
    config_file: str | None
    """Config of the weights, or None."""
    tokenizer: str | None
    """Folder of the tokenizer, or None."""
    sampler: str
    """One of `SAMPLER_NAMES`."""
    spacing: str | None
    """One of `SPACING_NAMES`, or None for the schedule's own."""
    steps: int
    """Denoising steps, at least 1."""
    eta: float
    """In [0, 1]; 0 for all but ddim."""
    guidance_scale: tuple[float, ...]
    """One, or several spread over the steps; each at least 0."""
    guidance_rescale: float
    """In [0, 1]."""
    guidance_low: float
    """Noise-to-signal ratio from which on there is guidance, at least 0."""
    guidance_high: float | None
    """Ratio up to which there is; None for no end."""
    autoguidance: str | None
    """Run of the worse model, or None."""
    autoguidance_step: int | None
    """Its checkpoint, or None for the newest."""
    image: str | None
    """Picture, or None."""
    mask: str | None
    """Of the picture, or None."""
    strength: float | None
    """In (0, 1]; None for what suits the model and the other settings."""
    invert: bool
    """Whether the picture is inverted."""
    source: str | None
    """What the inverted picture shows, or None for what is drawn."""
    outpaint: tuple[int, int, int, int] | None
    """Pixels added left, above, right and below, or None."""
    size: tuple[int, int] | None
    """Height and width, or None for those of training."""
    tile: int
    """Side of the decoder's tiles in latents, or 0."""
    ema_length: float | None = None
    """Relative length of the average of the weights, or None for the one that training
    used; recipes that were written before it came lack it."""

    @property
    def guided(self) -> bool:
        """Whether guidance has any effect."""
        return self.autoguidance is not None or set(self.guidance_scale) != {1.0}

    def _check(self) -> None:
        if self.sampler not in SAMPLER_NAMES:
            raise InputError(f"sampler: {choices(self.sampler, SAMPLER_NAMES)}")
        if self.spacing is not None and self.spacing not in SPACING_NAMES:
            raise InputError(f"spacing: {choices(self.spacing, SPACING_NAMES)}")
        require(self, "steps", self.steps >= 1, "at least 1")
        if self.step is not None and self.workdir is None:
            raise InputError(
                f"step: got {self.step} without --workdir, wanted none: weights have "
                "no checkpoints"
            )
        if self.ema_length is not None:
            self._check_length(self.ema_length)
        require(self, "eta", 0.0 <= self.eta <= 1.0, "0 to 1")
        if self.eta and self.sampler not in TAKES_ETA:
            raise InputError(
                f"eta: got {self.eta} with --sampler {self.sampler}, which has none; "
                "try --sampler ddim"
            )
        self._check_guidance()
        self._check_edit()
        tile = self.tile == 0 or self.tile >= MIN_DECODER_TILE
        require(self, "tile", tile, f"0, or at least {MIN_DECODER_TILE} latents")

    def _check_length(self, length: float) -> None:
        if self.workdir is None:
            raise InputError(
                f"ema_length: got {length:g} without --workdir, wanted none: weights "
                "are of one average"
            )
        good = 0.0 < length <= LONGEST_AVERAGE
        require(self, "ema_length", good, f"above 0, at most {LONGEST_AVERAGE}")

    def _check_guidance(self) -> None:
        scales = self.guidance_scale
        positive = bool(scales) and min(scales) >= 0.0
        require(self, "guidance_scale", positive, "0 or more, or several as in 1,4,1")
        require(self, "guidance_rescale", 0.0 <= self.guidance_rescale <= 1.0, "0 to 1")
        low, high = self.guidance_low, self.guidance_high
        if low < 0.0 or (high is not None and high <= low):
            raise InputError(
                f"guidance_low: got {low:g} with guidance_high {high}, wanted two "
                "rising numbers from 0 on"
            )
        if self.autoguidance_step is not None and self.autoguidance is None:
            raise InputError(
                f"autoguidance_step: got {self.autoguidance_step} without "
                "--autoguidance, wanted none"
            )

    def _check_edit(self) -> None:
        """Refuse what means nothing without, or beside, something else."""
        for name in ("mask", "strength", "invert", "outpaint"):
            if getattr(self, name) not in (None, False) and self.image is None:
                raise InputError(f"{name}: got it without --image, wanted a picture")
        for first, second in ONE_OF_TWO:
            if getattr(self, first) and getattr(self, second) is not None:
                raise InputError(
                    f"{first}: got it beside --{second}, wanted one of the two"
                )
        if self.source is not None and not self.invert:
            raise InputError(
                f"source: got {self.source!r} without --invert, wanted none"
            )
        if self.invert and self.sampler not in INVERTIBLE:
            raise InputError(
                f"invert: got it with --sampler {self.sampler}, wanted ddim, whose "
                "inverse it is"
            )
        if self.invert and self.eta:
            raise InputError(f"invert: got it with --eta {self.eta}, wanted 0")
        if self.strength is not None:
            good = 0.0 < self.strength <= 1.0
            require(self, "strength", good, "above 0, at most 1")
        if (added := self.outpaint) is not None:
            good = len(added) == 4 and min(added) >= 0 and any(added)
            require(self, "outpaint", good, "four numbers from 0 on, not all 0")
        if self.size is not None:
            good = len(self.size) == 2 and min(self.size) >= 1
            require(self, "size", good, "height and width in pixels")
