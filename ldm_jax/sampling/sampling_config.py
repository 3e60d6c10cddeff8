"""Settings of sampled images, which the metadata of a PNG holds."""

import math

from ldm_jax.config.diffusion import LONGEST_AVERAGE
from ldm_jax.config.validation import Text, checked_dataclass, require
from ldm_jax.types import (
    MIN_DECODER_TILE,
    TAKES_ETA,
    InputError,
    PrecisionName,
    SamplerName,
    SpacingName,
)

INVERTIBLE: tuple[SamplerName, ...] = ("ddim", "euler")
DEFAULT_GUIDANCE_SCALE = 2.0
EXCLUSIVE = (
    ("mask", "outpaint"),
    ("invert", "mask"),
    ("invert", "outpaint"),
    ("invert", "strength"),
    ("size", "image"),
)


@checked_dataclass
class SamplingConfig:
    """Settings of sampled images, without their seeds and conditions.

    The names of the fields are keys of the metadata in a PNG and never change. Every
    number is finite, so that the metadata is strict JSON.
    """

    workdir: str | None = None
    """Folder of the run, as given to ldm train."""
    weights: str | None = None
    """Instead of a run: a diffusers folder, or a file in CompVis naming."""
    step: int | None = None
    """Checkpoint of the run, by its diffusion step; the newest by default."""
    config_file: str | None = None
    """Config of weights whose file does not hold it."""
    tokenizer: str | None = None
    """Folder of the tokenizer's files, if the weights have none."""
    sampler: SamplerName = "ddim"
    """Sampler, the solver of the denoising equation."""
    spacing: SpacingName | None = None
    """Spacing of the steps: trailing (the default but for EDM), leading, linspace,
    karras (EDM's default) or ldm (the original's)."""
    steps: int = 50
    """Denoising steps, 1 to the model's number of timesteps."""
    eta: float = 0.0
    """DDIM's share of fresh noise, 0 to 1; for ddim alone."""
    guidance_scale: tuple[float, ...] = ()
    """0 ignores the label or text, 1 follows it, more exaggerates it (default 2; 1 with
    --invert). Several, as in 1,4,1, are spread over the steps with lines between."""
    guidance_rescale: float = 0.0
    """Share of the contrast's correction under guidance, 0 to 1; 0.7 is usual."""
    guidance_low: float = 0.0
    """Noise-to-signal ratio above which guidance acts, at least 0."""
    guidance_high: float | None = None
    """Noise-to-signal ratio below which guidance acts; None has no end."""
    autoguidance: str | None = None
    """Run of a smaller or less trained model to be guided away from."""
    autoguidance_step: int | None = None
    """Checkpoint of that run; the newest by default."""
    image: str | None = None
    """Image to change; or to upscale or fill, if the model does that."""
    mask: str | None = None
    """White where the image is sampled, black where it is kept."""
    strength: float | None = None
    """Share of the steps an image goes through, above 0 to 1: how much of it changes
    (default 0.75; 1 with a mask)."""
    invert: bool = False
    """Find the noise that the image comes from, and start from it."""
    source: Text | None = None
    """Class or text of the inverted image; by default that of each image made."""
    outpaint: tuple[int, int, int, int] | None = None
    """Pixels to add to the image left, above, right and below."""
    size: tuple[int, int] | None = None
    """Height and width of the images, other than the model was trained on."""
    tile: int = 0
    """Decode in tiles of this many latents, for large images; 0 decodes at once."""
    ema_length: float | None = None
    """Relative length of the average of the weights, where the run kept some
    (--diffusion.average-lengths); the one of optim.ema_decay by default."""
    precision: PrecisionName | None = None
    """Products of float32 on GPUs and TPUs: highest (full float32) or default (that of
    the chip); the run's by default."""

    @property
    def guided_ratios(self) -> tuple[float, float]:
        """Noise-to-signal ratios between which guidance acts."""
        high = self.guidance_high
        return self.guidance_low, math.inf if high is None else high

    @property
    def guided(self) -> bool:
        """Whether guidance has any effect."""
        return self.autoguidance is not None or set(self.guidance_scale) != {1.0}

    def _check(self) -> None:
        if not self.guidance_scale:
            usual = 1.0 if self.invert else DEFAULT_GUIDANCE_SCALE
            object.__setattr__(self, "guidance_scale", (usual,))
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
        positive = min(self.guidance_scale) >= 0.0
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
        """Refuse settings of an edit that need, or exclude, another setting."""
        for name in ("mask", "invert", "outpaint"):
            if getattr(self, name) not in (None, False) and self.image is None:
                raise InputError(f"{name}: got it without --image, wanted an image")
        for first, second in EXCLUSIVE:
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
            good = min(added) >= 0 and any(added)
            require(self, "outpaint", good, "four numbers from 0 on, not all 0")
        if self.size is not None:
            require(self, "size", min(self.size) >= 1, "height and width in pixels")
